# %% [markdown]
# # Maps of the digits without t-SNE
# Two latent dimensions by PPCA, a deep autoencoder, a denoising one and a VAE, all fitted to the
# same rows without their classes. Under each map two numbers on held-out digits: how far they are
# from what their place decodes to, and how often the five nearest training rows name their class.
# %%
import sys

import torch
from sklearn.datasets import load_digits

from ppl_vae import (
    PPCA,
    VAE,
    Autoencoder,
    ExactGuide,
    Gaussian,
    GaussianNoise,
    compare_embeddings,
    digits,
    fit_closed_form,
    fit_svi,
)
from ppl_vae.plots import latent_spaces as latent_plots

EPOCHS = 2 if "--smoke" in sys.argv else 300
order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
x, labels = torch.as_tensor(digits(), dtype=torch.float32)[order], load_digits().target[order]
x, x_val, x_test = x[:1200], x[1200:1297], x[1297:]
y, y_test = labels[:1200], labels[1297:]

# %%
ppca = PPCA.like(x.double(), latent_dim=2)
fit_closed_form(ppca, x)
ppca = ppca.canonical()
pairs = {"PPCA": (ppca.model, ExactGuide(ppca))}
how = {"hidden": (128, 64), "seed": 0}
made = {
    "deep autoencoder": Autoencoder.mlp(64, 2, **how),
    "denoising autoencoder": Autoencoder.mlp(64, 2, corruption=GaussianNoise(0.2), **how),
    "VAE": VAE.mlp(64, 2, likelihood=Gaussian("shared", initial=0.2), **how),
}
for name, pair in made.items():
    how = {"epochs": EPOCHS, "batch_size": 100, "lr": 2e-3, "patience": 30, "seed": 0}
    fit = fit_svi(pair.center(x).model, pair.guide, x, x_val=x_val, **how)
    print(f"{name}: {fit.stopped}; on validation rows {fit.validation.max():.2f} nats per datum")
    pairs[name] = (pair.model, pair.guide)

# %%
found = compare_embeddings(pairs, x, y, x_test, y_test)
print(found)
latent_plots.maps(found).savefig("maps.png", dpi=150)
print("wrote maps.png")
