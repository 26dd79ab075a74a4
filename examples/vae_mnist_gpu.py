"""
A VAE on binarized MNIST, on a GPU if there is one
==================================================

Pixels are binarized stochastically with their grey values as probabilities, again in each epoch,
so that a Bernoulli decoder is a density. MNIST is read from the folder PPL_VAE_DATA
(``MNIST/raw/*.gz``), or from the user's cache, to which it is downloaded. ``--smoke`` uses
the digits of scikit-learn, enlarged from 8 x 8 to 28 x 28 pixels, so that its values of log p are
not those of MNIST.
"""

# %%
import sys
from functools import partial

import torch

from ppl_vae import VAE, Bernoulli, binarize, digits, fit_svi, log_likelihood, plots
from ppl_vae.data import ImageGrid, image_set
from ppl_vae.evaluation import draw_data, reconstruct

SMOKE = "--smoke" in sys.argv
EPOCHS, NUM_SCORED, SAMPLES, REFINE = (20, 50, 100, 20) if SMOKE else (50, 500, 1000, 200)


def grey(part):  # (N, 784), in [0, 1]
    if not SMOKE:
        return image_set("MNIST", part, download=True).x
    rows = torch.as_tensor(digits(), dtype=torch.float32)
    rows = (rows[:1500] if part == "train" else rows[1500:]).reshape(-1, 1, 8, 8)
    return torch.nn.functional.interpolate(rows, (28, 28), mode="bilinear").flatten(1)


torch.manual_seed(0)
x, x_test = grey("train"), binarize(grey("test"))
x, x_val = x[: -len(x) // 10], binarize(x[-len(x) // 10 :])
# %%
vae = VAE.mlp(784, 20, hidden=(400,), likelihood=Bernoulli(), seed=0)
fit_mnist = partial(fit_svi, batch_size=128, epoch_transform=binarize, device="auto", seed=0)
fit = fit_mnist(vae.model, vae.guide, x, x_val=x_val, epochs=EPOCHS, patience=10)
device = next(vae.parameters()).device
print(f"{fit}\n{fit.steps / fit.seconds:.0f} steps per second on {device}")
# %%
scored = x_test[torch.randperm(len(x_test))[:NUM_SCORED]]
print(log_likelihood(vae.model, vae.guide, scored, SAMPLES, refine=REFINE, seed=0))

# %%
rows = {"held out": scored[:8]}
rows["reconstructed"] = reconstruct(vae.model, vae.guide, scored[:8]).cpu()
rows["sampled"] = draw_data(vae.model, scored[:8], seed=0).cpu()
grid = ImageGrid.of(torch.stack(list(rows.values())), list(rows), "12345678", x, (28, 28))
ax = plots.plot_reconstructions(grid, heading="Held-out images, reconstructions and samples")
ax.set(xlabel="number of the image or sample", ylabel="")
ax.figure.savefig("vae_mnist.png", dpi=150)
print("wrote vae_mnist.png")
