# %% [markdown]
# # Noise taken off held-out images
# A denoising autoencoder sees noisy images in training while its model scores the clean ones.
# Against it stands PPCA's posterior mean, the best linear map where its assumptions hold, with its
# best K on validation rows. It is fitted to clean rows and told of the noise: to its own variance
# that of the noise is added, which is what it would learn from ever more noisy copies of them.
# %%
import os
import sys

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import (
    PPCA,
    Autoencoder,
    Gaussian,
    GaussianNoise,
    compare_denoisers,
    digits,
    fit_closed_form,
    fit_svi,
    image_set,
)
from ppl_vae.plots import images as tile_plots

SMOKE = "--smoke" in sys.argv
SCALE = 0.4
noise, order = GaussianNoise(SCALE), torch.Generator().manual_seed(0)
rows = torch.as_tensor(digits(), dtype=torch.float32)[torch.randperm(1797, generator=order)]
sets = {"digits": (rows, (8, 8), 2 if SMOKE else 400)}
if os.environ.get("PPL_VAE_DATA") and not SMOKE:
    sets["MNIST"] = image_set("MNIST").shuffled(0).x[:13_000], (28, 28), 30

# %%
for name, (rows, shape, epochs) in sets.items():
    size = len(rows)
    x, x_val, x_test = rows.split([size * 3 // 4, size // 8, size - size * 3 // 4 - size // 8])
    how = {"hidden": (512,), "corruption": noise, "likelihood": Gaussian(0.2), "seed": 0}
    ours = Autoencoder.mlp(x.shape[1], 64, **how).center(x)
    how = {"epochs": epochs, "batch_size": 128, "scheduler": CosineAnnealingLR, "seed": 0}
    print(name, fit_svi(ours.model, ours.guide, x, lr=1e-3, **how), sep=": ")
    candidates = {}
    for K in (2, 5, 10, 15, 20, 30, 40, 60, 80, 120, 200, 300, 500):
        if x.shape[1] - 4 >= K:
            ppca = PPCA.like(x.double(), latent_dim=K)
            fit_closed_form(ppca, x)
            sigma = (ppca.noise_scale.detach().square() + SCALE**2).sqrt()
            told = PPCA.from_parameters(ppca.loadings.detach(), ppca.loc.detach(), sigma)
            candidates[f"PPCA, K = {K}"] = told.reconstruct
    best = compare_denoisers(candidates, x_val, noise, seed=1).best
    denoisers = {"autoencoder": ours.reconstruct, best: candidates[best]}
    found = compare_denoisers(denoisers, x_test, noise, seed=2)
    print(found, end="\n\n")
    picture = tile_plots.denoised(found.image_grid(range(8), shape))
    picture.figure.savefig(f"denoising_{name}.png", dpi=150)
print(f"wrote {', '.join(f'denoising_{name}.png' for name in sets)}")
