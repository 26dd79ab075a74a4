"""
Samples from VAEs with 2, 5, 10 and 20 latent dimensions
========================================================

Each sheet shows decoded samples of z from the prior: the mean of x given z, without the decoder's
noise. With two latent dimensions there are few kinds of samples. The held-out log-likelihood,
which is printed for each K, improves up to about ten dimensions.
"""

# %%
import sys
from functools import partial

import torch

from ppl_vae import VAE, Gaussian, digits, fit_svi, log_likelihood, plots
from ppl_vae.data import ImageGrid

SMOKE = "--smoke" in sys.argv
EPOCHS, NUM_SCORED, SAMPLES, REFINE = (40, 100, 50, 20) if SMOKE else (300, 300, 500, 150)
ROWS, COLUMNS = 6, 12
order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
x, x_val, x_test = torch.as_tensor(digits()).float()[order].split([1347, 150, 300])
fit = partial(fit_svi, epochs=EPOCHS, batch_size=128, lr=2e-3, patience=20, seed=0)

# %%
vaes = {}
for latent_dim in (2, 5, 10, 20):
    likelihood = Gaussian("shared", initial=0.2)  # with sigma = 1 every dimension collapses
    vae = VAE.mlp(64, latent_dim, hidden=(128,), likelihood=likelihood, seed=0)
    fit(vae.model, vae.guide, x, x_val=x_val)
    estimate = log_likelihood(
        vae.model, vae.guide, x_test[:NUM_SCORED], SAMPLES, refine=REFINE, seed=0
    )
    print(f"K = {latent_dim:2d}: {estimate.mean:.2f} ± {estimate.mean_error:.2f} nats per datum")
    vaes[latent_dim] = vae

# %%
# One sheet per latent dimension, K = 2, 5, 10 and 20.
for latent_dim, vae in vaes.items():
    z = torch.randn(ROWS, COLUMNS, latent_dim, generator=torch.Generator().manual_seed(0))
    means = vae.decode(z).mean.detach()
    names = [str(row + 1) for row in range(ROWS)], [str(column + 1) for column in range(COLUMNS)]
    ax = plots.plot_samples(ImageGrid.of(means, *names, x, (8, 8)))
    ax.set_title(f"K = {latent_dim}: decoded samples from the prior", loc="left")
    ax.set(xlabel="column", ylabel="row")
    ax.figure.savefig(f"samples_{latent_dim}.png", dpi=150)
print("wrote samples_2.png, samples_5.png, samples_10.png and samples_20.png")
