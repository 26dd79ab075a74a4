"""
Denoising held-out images
=========================

A denoising autoencoder encodes noisy images while its model scores the clean ones. It is compared
with the posterior mean of PPCA, the best linear map under the assumptions of PPCA, with K chosen
on validation rows. PPCA is fitted to clean rows; the variance of the noise is then added to its
own.
"""

# %%
import os
import sys
from functools import partial

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import PPCA, Autoencoder, Gaussian, digits, fit_closed_form, fit_svi, plots
from ppl_vae.data import image_set
from ppl_vae.evaluation import compare_denoisers
from ppl_vae.networks import GaussianNoise

SMOKE = "--smoke" in sys.argv
SCALE = 0.4
noise, order = GaussianNoise(SCALE), torch.Generator().manual_seed(0)
rows = torch.as_tensor(digits(), dtype=torch.float32)[torch.randperm(1797, generator=order)]
sets = {"digits": (rows, (8, 8), 100 if SMOKE else 400)}
if os.environ.get("PPL_VAE_DATA") and not SMOKE:
    sets["MNIST"] = image_set("MNIST").shuffled(0).x[:13_000], (28, 28), 30
fit = partial(fit_svi, batch_size=128, lr=1e-3, scheduler=CosineAnnealingLR, seed=0)


def ppca_denoiser(x, latent_dim):
    ppca = PPCA.like(x.double(), latent_dim)
    fit_closed_form(ppca, x)
    sigma = (ppca.noise_scale.detach().square() + SCALE**2).sqrt()
    return PPCA.from_parameters(ppca.loadings.detach(), ppca.loc.detach(), sigma).reconstruct


# %%
for name, (rows, shape, epochs) in sets.items():
    x, x_val, x_test = rows.tensor_split([len(rows) * 3 // 4, len(rows) * 3 // 4 + len(rows) // 8])
    network = partial(Autoencoder.mlp, x.shape[1], 64, hidden=(512,), corruption=noise)
    autoencoder = network(likelihood=Gaussian(0.2), seed=0).center(x)
    print(name, fit(autoencoder.model, autoencoder.guide, x, epochs=epochs), sep=": ")
    sizes = (2, 5, 10, 15, 20, 30, 40, 60, 80, 120, 200, 300, 500)
    linear = {f"PPCA, K = {K}": ppca_denoiser(x, K) for K in sizes if x.shape[1] - 4 >= K}
    best = compare_denoisers(linear, x_val, noise, seed=1).best
    denoisers = {"autoencoder": autoencoder.reconstruct, best: linear[best]}
    comparison = compare_denoisers(denoisers, x_test, noise, seed=2)
    print(comparison, end="\n\n")
    ax = plots.plot_denoised(comparison.image_grid(range(8), shape))
    ax.figure.savefig(f"denoising_{name}.png", dpi=150)
print(f"wrote {', '.join(f'denoising_{name}.png' for name in sets)}")
