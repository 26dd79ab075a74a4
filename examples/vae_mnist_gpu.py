# %% [markdown]
# # A VAE on MNIST, on a GPU if there is one
# Each pixel is a coin of its grey value, so that a Bernoulli decoder is a density; training rows
# are tossed anew for each epoch. MNIST comes from the folder PPL_VAE_DATA (`MNIST/raw/*.gz`), else
# from the user's cache, to which it is downloaded. `--smoke`: a few made-up images, without data.
# %%
import sys

import torch

from ppl_vae import VAE, Bernoulli, binarize, fit_svi, image_set, log_likelihood
from ppl_vae.data.image_grid import ImageGrid
from ppl_vae.evaluation.prediction.predictive import draw_data, reconstruct
from ppl_vae.plots import images as tile_plots

SMOKE = "--smoke" in sys.argv
EPOCHS, NUM_SCORED, DRAWS, REFINE = (2, 20, 100, 5) if SMOKE else (50, 500, 1000, 200)


def grey(part):  # (N, 784), in 0..1
    if not SMOKE:
        return image_set("MNIST", part, download=True).x
    smooth = torch.nn.functional.interpolate(torch.rand(300, 1, 4, 4), (28, 28), mode="bicubic")
    return smooth.clamp(0, 1).flatten(1)


torch.manual_seed(0)
x, x_test = grey("train"), binarize(grey("test"))
x, x_val = x[: -len(x) // 10], binarize(x[-len(x) // 10 :])
# %%
vae = VAE.mlp(784, 20, hidden=(400,), likelihood=Bernoulli(), seed=0)
how = {"epochs": EPOCHS, "batch_size": 128, "patience": 10, "device": "auto", "seed": 0}
how["epoch_transform"] = binarize
fit = fit_svi(vae.model, vae.guide, x, x_val=x_val, **how)
device = next(vae.parameters()).device
print(f"{fit}\n{fit.steps / fit.seconds:.0f} steps per second on {device}")
# %%
scored = x_test[torch.randperm(len(x_test))[:NUM_SCORED]]
print(log_likelihood(vae.model, vae.guide, scored, DRAWS, refine=REFINE, seed=0))

# %%
rows = {"held out": scored[:8], "rebuilt": reconstruct(vae.model, vae.guide, scored[:8]).cpu()}
rows["drawn"] = draw_data(vae.model, scored[:8], seed=0).cpu()
image_grid = ImageGrid.of(
    torch.stack(list(rows.values())), list(rows), "12345678", x[:1000], (28, 28)
)
picture = tile_plots.reconstructions(image_grid)
picture.set(xlabel="number of the image or draw", ylabel="")
picture.figure.savefig("vae_mnist.png", dpi=150)
print("wrote vae_mnist.png")
