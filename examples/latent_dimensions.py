# %% [markdown]
# # How many latent dimensions?
# VAEs of the digits with latent spaces of 2, 5, 10 and 20 dimensions, fitted alike. Under each:
# log p of held-out digits, by importance sampling, and how many dimensions are active (the mean
# of q varies by more than 0.01 over the data). Of more than two the two most used are shown.
# %%
import sys

import torch
from sklearn.datasets import load_digits

from ppl_vae import VAE, Gaussian, digits, fit_svi
from ppl_vae.data.image_grid import ImageGrid
from ppl_vae.evaluation.latent_space.latent_spaces import latent_spaces
from ppl_vae.evaluation.latent_space.traversal import (
    METHODS,
    decode_grid,
    interpolate,
    normal_quantiles,
)
from ppl_vae.plots import images as tile_plots
from ppl_vae.plots import latent_spaces as latent_plots

SMOKE = "--smoke" in sys.argv
EPOCHS, NUM_SCORED, DRAWS, REFINE = (2, 60, 50, 5) if SMOKE else (300, 300, 500, 200)
order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
x, labels = torch.as_tensor(digits(), dtype=torch.float32)[order], load_digits().target[order]
x, x_val, x_test = x[:1347], x[1347:1497], x[1497 : 1497 + NUM_SCORED]

# %%
pairs, vaes = {}, {}
for latent_dim in (2, 5, 10, 20):
    likelihood = Gaussian("shared", initial=0.2)  # at 1 every dimension would collapse
    vae = VAE.mlp(64, latent_dim, hidden=(128,), likelihood=likelihood, seed=0)
    how = {"epochs": EPOCHS, "batch_size": 128, "lr": 2e-3, "patience": 20, "seed": 0}
    fit = fit_svi(vae.model, vae.guide, x, x_val=x_val, **how)
    print(f"K = {latent_dim}: {fit.stopped}, {fit.seconds:.0f} s")
    pairs[f"K = {latent_dim}"], vaes[latent_dim] = (vae.model, vae.guide), vae

# %%
classes = labels[1497 : 1497 + NUM_SCORED]
found = latent_spaces(pairs, x_test, labels=classes, num_samples=DRAWS, refine=REFINE, seed=0)
print(found)
latent_plots.latent_spaces(found).savefig("latent_dimensions.png", dpi=150)

# %% [markdown]
# The plane of the smallest, and interpolations between codes of held-out digits: linear and
# spherical.
# %%
small, at = vaes[2], normal_quantiles(9)
ticks = [f"{place:.1f}" for place in at]
image_grid = ImageGrid.of(decode_grid(small.model, x, values=at), ticks[::-1], ticks, x, (8, 8))
plane = tile_plots.manifold(image_grid, heading="K = 2: the mean of x over the plane of the codes")
plane.figure.savefig("latent_plane.png", dpi=150)
ends, how = (x_test[:1], x_test[1:2]), {"guide": small.guide, "num_steps": 9}
paths = [interpolate(small.model, *ends, **how, method=name)[0] for name in METHODS]
image_grid = ImageGrid.of(
    torch.stack(paths), METHODS, [f"{k / 8:.2f}" for k in range(9)], x, (8, 8)
)
lines = tile_plots.interpolation(image_grid, heading="K = 2: from one held-out digit to another")
lines.set_ylabel("interpolation")
lines.figure.savefig("latent_interpolations.png", dpi=150)
print("wrote latent_dimensions.png, latent_plane.png and latent_interpolations.png")
