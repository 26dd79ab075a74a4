"""
How many latent dimensions?
===========================

VAEs of the digits with 2, 5, 10 and 20 latent dimensions are fitted alike. For each of them two
numbers are given: the log-likelihood of held-out digits by importance sampling, and the number of
active units, whose posterior mean varies by more than 0.01 over the data. If there are more than
two dimensions, the two with the largest KL are shown.
"""

# %%
import sys
from functools import partial

import torch
from sklearn.datasets import load_digits

from ppl_vae import VAE, Gaussian, digits, fit_svi, plots
from ppl_vae.data import ImageGrid
from ppl_vae.evaluation import decode_grid, interpolate, latent_spaces, normal_quantiles

SMOKE = "--smoke" in sys.argv
EPOCHS, NUM_SCORED, SAMPLES, REFINE = (40, 100, 100, 30) if SMOKE else (300, 300, 500, 200)
order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
x, labels = torch.as_tensor(digits(), dtype=torch.float32)[order], load_digits().target[order]
x, x_val, x_test = x[:1347], x[1347:1497], x[1497 : 1497 + NUM_SCORED]
fit = partial(fit_svi, epochs=EPOCHS, batch_size=128, lr=2e-3, patience=20, seed=0)

# %%
vaes = {}
for latent_dim in (2, 5, 10, 20):
    likelihood = Gaussian("shared", initial=0.2)  # with sigma = 1 every dimension collapses
    vae = VAE.mlp(64, latent_dim, hidden=(128,), likelihood=likelihood, seed=0)
    result = fit(vae.model, vae.guide, x, x_val=x_val)
    print(f"K = {latent_dim}: {result.stopped}, {result.seconds:.0f} s")
    vaes[latent_dim] = vae
pairs = {f"K = {latent_dim}": (vae.model, vae.guide) for latent_dim, vae in vaes.items()}

# %%
classes = labels[1497 : 1497 + NUM_SCORED]
spaces = latent_spaces(pairs, x_test, labels=classes, num_samples=SAMPLES, refine=REFINE, seed=0)
print(spaces)
plots.plot_latent_spaces(spaces).savefig("latent_dimensions.png", dpi=150)

# %%
# The latent plane of the smallest model, and a linear and a spherical interpolation in it.
small, values = vaes[2], normal_quantiles(9)
ticks = [f"{value:.1f}" for value in values]
grid = ImageGrid.of(decode_grid(small.model, x, values=values), ticks[::-1], ticks, x, (8, 8))
plane = plots.plot_manifold(grid, heading="K = 2: the mean of x over the latent plane")
plane.figure.savefig("latent_plane.png", dpi=150)
ends = x_test[:1], x_test[1:2]
rows = [
    interpolate(small.model, *ends, guide=small.guide, num_steps=9, method=name)[0]
    for name in ("linear", "spherical")
]
columns = [f"{k / 8:.2f}" for k in range(9)]
grid = ImageGrid.of(torch.stack(rows), ("linear", "spherical"), columns, x, (8, 8))
lines = plots.plot_interpolation(grid, heading="K = 2: between two held-out digits")
lines.figure.savefig("interpolation.png", dpi=150)
print("wrote latent_dimensions.png, latent_plane.png and interpolation.png")
