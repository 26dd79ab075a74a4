"""
Linear autoencoders and PCA
===========================

A linear autoencoder finds the subspace of PCA: soon if its two maps share their weights, and
slowly if they do not. One nonlinear layer before the code does no better; only a nonlinear decoder
does. In nats, by the Gaussian that codes and squared error imply, PCA falls short of PPCA, which
takes into account that a code is not known exactly.
"""

# %%
import sys
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import ppl_vae as pv
from ppl_vae.inference import fit_pca, implied_gaussian

K, STEPS = 10, 400 if "--smoke" in sys.argv else 1500
fit = partial(pv.fit_svi, scheduler=CosineAnnealingLR, steps=STEPS, seed=0, capture=False)
linear = partial(pv.Autoencoder.linear, seed=0)
# %%
# Digits: one affine map each way, or one nonlinear layer and an affine map.
x, best = torch.as_tensor(pv.digits()), pv.PPCA.like(pv.digits(), K)
pv.fit_closed_form(best, x)
print(f"digits, K = {K}: PPCA {best.log_likelihood(x).detach().mean():.2f} nats per datum, exact")
print("autoencoder    squared error  angle to PCA  implied log p")
autoencoders = {"PCA": linear(64, K), "linear": linear(64, K), "tied": linear(64, K, tied=True)}
autoencoders["orthonormal"] = linear(64, K, tied=True, columns="orthonormal")
autoencoders["one layer, relu"] = linear(64, K, code_activation="relu")
autoencoders["one layer, sigmoid"] = linear(64, K, code_activation="sigmoid")
for name, network in autoencoders.items():
    pair = network.double().center(x)
    fit_pca(pair, x) if name == "PCA" else fit(pair.model, pair.guide, x, lr=0.01)
    error = (pair.reconstruct(x) - x).square().sum(1).mean()
    implied = implied_gaussian(pair, x)
    nats, angle = implied.log_likelihood(x).detach().mean(), pv.evaluation.subspace(best, implied)
    print(f"{name:18s}{error:10.4f}{angle.largest_angle:13.1f}°{nats:15.2f}")
# %%
# A helix, with one code per point: a straight line, or the curve of a network with four layers.
t = np.linspace(0, 4 * np.pi, 1000)
helix = torch.as_tensor(np.stack([np.cos(t), np.sin(t), t / 3], 1))
helix = (helix - helix.mean(0)) / helix.std(0)
line = linear(3, 1).double()
fit_pca(line, helix)
network = partial(pv.Autoencoder.mlp, 3, 1, hidden=(50,), activation="sigmoid", seed=0)
curve = network(likelihood=pv.Gaussian(0.3)).double()
fit(curve.model, curve.guide, helix, lr=0.03)
axes = plt.figure(figsize=(10, 4.4), layout="constrained").subplots(1, 2)
for ax, j in zip(axes, (1, 2), strict=True):
    ax.plot(*helix[:, [0, j]].T, ".", ms=3, color="lightgrey", label="data")
    ax.set(xlabel="$x_1$, sds", ylabel=f"$x_{j + 1}$, sds", title="One code per point")
for name, pair in (("PCA", line), ("four layers", curve)):
    rows = pair.reconstruct(helix)
    print(f"helix, K = 1: squared error {(rows - helix).square().sum(1).mean():.3f}, {name}")
    rows = rows[pair.features(helix)[:, 0].argsort()]
    for ax, j in zip(axes, (1, 2), strict=True):
        ax.plot(*rows[:, [0, j]].T, lw=1.8, label=name)
axes[0].legend()
axes[0].figure.savefig("linear_autoencoders.png", dpi=150)
print("wrote linear_autoencoders.png")
