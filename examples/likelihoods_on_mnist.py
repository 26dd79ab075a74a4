# %% [markdown]
# # One decoder, many likelihoods, on MNIST
# Each is a density of the same dequantized pixels, so that their held-out log p stand in one
# table, in nats per datum in the units of the data. A Bernoulli over grey values is none: its
# number bounds a cross-entropy, and stands apart. `--smoke`: a few made-up images, without data.
# %%
import sys

import torch

import ppl_vae as pv
from ppl_vae.data.image_grid import ImageGrid
from ppl_vae.evaluation.prediction.predictive import draw_data
from ppl_vae.plots import images as tile_plots
from ppl_vae.plots import lineage as plots

SMOKE = "--smoke" in sys.argv
EPOCHS, NUM_SCORED, DRAWS, REFINE = (2, 20, 50, 5) if SMOKE else (20, 200, 500, 200)
torch.manual_seed(0)


def pixels(part):  # (N, 784), in 0, 1/255 .. 1
    if not SMOKE:
        return pv.image_set("MNIST", part).x
    smooth = torch.nn.functional.interpolate(torch.rand(300, 1, 4, 4), (28, 28), mode="bicubic")
    return (255 * smooth.clamp(0, 1)).round().flatten(1) / 255


grey, x, x_test = pv.Dequantization(), pixels("train"), pixels("test")
x_test = x_test[torch.randperm(len(x_test))[:NUM_SCORED]]
y_test, apart = grey.apply(x_test), "Bernoulli, no density"
likelihoods = {
    "one sigma": pv.Gaussian("shared"),
    "optimal sigma": pv.OptimalGaussian(),
    "a sigma a pixel": pv.Gaussian("per-dim", floor=1e-3),
    "a network's sigma": pv.Gaussian("network", initial=0.3, floor=1e-3),
    "continuous Bernoulli": pv.ContinuousBernoulli(),
    apart: pv.Bernoulli(soft_targets=True),
}
# %%
found, draws = {}, {"held out": y_test[:8]}
for name, likelihood in likelihoods.items():
    vae = pv.VAE.mlp(784, 20, hidden=(400,), likelihood=likelihood, seed=0).center(grey.apply(x))
    how = {"epochs": EPOCHS, "batch_size": 256, "epoch_transform": grey.apply, "grad_clip": 1e3}
    fit = pv.fit_svi(vae.model, vae.guide, x, lr=1e-3, **how, seed=0)
    print(f"{name}: {fit.seconds:.0f} s", *fit.notes, sep="\n  ")
    estimate = pv.log_likelihood(vae.model, vae.guide, y_test, DRAWS, refine=REFINE, seed=0)
    found[name] = estimate.shifted(grey.log_jacobian(x_test))
    draws[name] = draw_data(vae.model, y_test[:8], seed=0)
alone = found.pop(apart)
print(pv.compare(found), f"apart: {alone.mean:.2f}. {alone.notes[0]}", sep="\n")
# %%
image_grid = ImageGrid.of(
    torch.stack(list(draws.values())), list(draws), "12345678", x[:1000], (28, 28)
)
picture = tile_plots.samples(image_grid)
picture.figure.savefig("likelihoods_on_mnist.png", dpi=150)
plots.comparison(pv.compare(found)).figure.savefig("likelihoods_compared.png", dpi=150)
print("wrote likelihoods_on_mnist.png and likelihoods_compared.png")
