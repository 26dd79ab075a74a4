"""
One decoder with six likelihoods, on MNIST
==========================================

Each likelihood is a density of the same dequantized pixels, so their held-out log-likelihoods can
be compared in nats per datum in the units of the data. A Bernoulli of grey values is not a
density: its value bounds a cross-entropy and is listed separately. ``--smoke`` uses the
digits of scikit-learn, enlarged to 28 x 28 pixels, so that its values are not those of MNIST.
"""

# %%
import sys
from functools import partial

import torch

import ppl_vae as pv
from ppl_vae import plots
from ppl_vae.data import Dequantization, ImageGrid
from ppl_vae.evaluation import draw_data

SMOKE = "--smoke" in sys.argv
EPOCHS, NUM_SCORED, SAMPLES, REFINE = (8, 50, 50, 20) if SMOKE else (20, 200, 500, 200)
torch.manual_seed(0)


def pixels(part):  # (N, 784), in 0, 1/255 .. 1
    if not SMOKE:
        return pv.data.image_set("MNIST", part).x
    rows = torch.as_tensor(pv.digits(), dtype=torch.float32)
    rows = (rows[:1500] if part == "train" else rows[1500:]).reshape(-1, 1, 8, 8)
    rows = torch.nn.functional.interpolate(rows, (28, 28), mode="bilinear").flatten(1)
    return (255 * rows).round() / 255


grey, x, x_test = Dequantization(), pixels("train"), pixels("test")
x_test = x_test[torch.randperm(len(x_test))[:NUM_SCORED]]
y_test, no_density = grey.apply(x_test), "Bernoulli, no density"
likelihoods = {
    "one sigma": pv.Gaussian("shared", initial=0.3),
    "optimal sigma": pv.likelihoods.OptimalGaussian(),
    "sigma per pixel": pv.Gaussian("per-dim", initial=0.3, floor=1e-3),
    "sigma by a network": pv.Gaussian("network", initial=0.3, floor=1e-3),
    "continuous Bernoulli": pv.ContinuousBernoulli(),
    no_density: pv.Bernoulli(soft_targets=True),
}
fit = partial(
    pv.fit_svi, epochs=EPOCHS, batch_size=100 if SMOKE else 256, lr=1e-3, grad_clip=1e3, seed=0
)
# %%
estimates, draws = {}, {"held out": y_test[:8]}
for name, likelihood in likelihoods.items():
    vae = pv.VAE.mlp(784, 20, hidden=(400,), likelihood=likelihood, seed=0).center(grey.apply(x))
    result = fit(vae.model, vae.guide, x, epoch_transform=grey.apply)
    print(f"{name}: {result.seconds:.0f} s", *result.notes, sep="\n  ")
    estimate = pv.log_likelihood(vae.model, vae.guide, y_test, SAMPLES, refine=REFINE, seed=0)
    estimates[name] = estimate.shifted(grey.log_jacobian(x_test))
    draws[name] = draw_data(vae.model, y_test[:8], seed=0)
apart = estimates.pop(no_density)
print(pv.compare(estimates), f"{no_density}: {apart.mean:.2f}. {apart.notes[0]}", sep="\n")
# %%
grid = ImageGrid.of(torch.stack(list(draws.values())), list(draws), "12345678", x, (28, 28))
plots.plot_samples(grid).figure.savefig("likelihoods_on_mnist.png", dpi=150)
plots.plot_comparison(pv.compare(estimates)).figure.savefig("likelihoods_compared.png", dpi=150)
print("wrote likelihoods_on_mnist.png and likelihoods_compared.png")
