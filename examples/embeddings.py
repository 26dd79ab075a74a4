"""
Two-dimensional embeddings of the digits
========================================

PPCA, a deep autoencoder, a denoising autoencoder and a VAE with two latent dimensions are fitted
to the same rows without their classes. Each embedding is judged on held-out digits by two
numbers: the squared error of the decoded embedding, and the accuracy of a classifier that takes
the majority of the five nearest training rows.
"""

# %%
import sys
from functools import partial

import torch
from sklearn.datasets import load_digits

from ppl_vae import (
    PPCA,
    VAE,
    Autoencoder,
    ExactGuide,
    Gaussian,
    digits,
    fit_closed_form,
    fit_svi,
    plots,
)
from ppl_vae.evaluation import compare_embeddings
from ppl_vae.networks import GaussianNoise

EPOCHS = 60 if "--smoke" in sys.argv else 300
order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
x, labels = torch.as_tensor(digits(), dtype=torch.float32)[order], load_digits().target[order]
x, x_val, x_test = x[:1200], x[1200:1297], x[1297:]
y, y_test = labels[:1200], labels[1297:]
fit = partial(fit_svi, epochs=EPOCHS, batch_size=100, lr=2e-3, patience=30, seed=0)

# %%
ppca = PPCA.like(x.double(), latent_dim=2)
fit_closed_form(ppca, x)
ppca = ppca.canonical()
pairs = {"PPCA": (ppca.model, ExactGuide(ppca))}
network = partial(Autoencoder.mlp, 64, 2, hidden=(128, 64), seed=0)
likelihood = Gaussian("shared", initial=0.2)
untrained = {
    "deep autoencoder": network(),
    "denoising autoencoder": network(corruption=GaussianNoise(0.2)),
    "VAE": VAE.mlp(64, 2, hidden=(128, 64), likelihood=likelihood, seed=0),
}
for name, pair in untrained.items():
    result = fit(pair.center(x).model, pair.guide, x, x_val=x_val)
    best = result.validation.max()
    print(f"{name}: {result.stopped}; validation objective {best:.2f} nats per datum")
    pairs[name] = (pair.model, pair.guide)

# %%
embeddings = compare_embeddings(pairs, x, y, x_test, y_test)
print(embeddings)
plots.plot_embeddings(embeddings).savefig("embeddings.png", dpi=150)
print("wrote embeddings.png")
