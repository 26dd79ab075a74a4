# %% [markdown]
# # Where the lectures start: autoencoders and PCA
# A linear autoencoder finds PCA's axes, and a single nonlinear layer does no better: what it
# takes is a decoder that bends. In nats, by the Gaussian that codes and squared error imply, PCA
# falls short of PPCA, which knows that codes are not exact.
# %%
import os
import sys

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import ppl_vae as pv
from ppl_vae.plots.drawing import BLUE, GREY, ORANGE, legend_below, new_axes, title

K, STEPS, smoke = 10, 30 if "--smoke" in sys.argv else 1500, "--smoke" in sys.argv
how = {"scheduler": CosineAnnealingLR, "steps": STEPS, "lr": 0.01, "seed": 0}
# %% Digits: one affine map each way, or one nonlinear layer and an affine map.
x, best = torch.as_tensor(pv.digits()), pv.PPCA.like(pv.digits(), K)
pv.fit_closed_form(best, x)
print(f"digits, K = {K}: PPCA {best.log_likelihood(x).detach().mean():.2f} nats per datum, exact")
print("autoencoder    squared error  angle to PCA  nats per datum, implied")
linear, orthonormal = {}, {"tied": True, "columns": "orthonormal"}
kinds = {"PCA": linear, "linear": linear, "tied": {"tied": True}, "orthonormal": orthonormal}
kinds |= {f"one layer, {name}": {"code_activation": name} for name in ("relu", "sigmoid")}
for name, kind in kinds.items():
    made = pv.Autoencoder.linear(64, K, **kind, seed=0).double().center(x)
    fit = pv.fit_pca(made, x) if name == "PCA" else pv.fit_svi(made.model, made.guide, x, **how)
    error = float((made.reconstruct(x) - x).square().sum(1).mean())
    implied = pv.implied_gaussian(made, x)
    nats, angle = implied.log_likelihood(x).detach().mean(), pv.subspace(best, implied)
    print(f"{name:18s}{error:10.4f}{angle.largest_angle:13.1f}°{nats:23.2f}")
# %% The helix: one number a point, through a line or through a curve of four layers.
t = np.linspace(0, 4 * np.pi, 1000)
helix = np.stack([np.cos(t), np.sin(t), t / 3], 1)
if not smoke and (folder := os.environ.get("PPL_VAE_DATA")):
    helix = pv.read_table(f"{folder}/pcaMethods/helix.csv").values
helix = torch.as_tensor((helix - helix.mean(0)) / helix.std(0))
line = pv.Autoencoder.linear(3, 1, seed=0).double()
pv.fit_pca(line, helix)
deep = {"hidden": (50,), "activation": "sigmoid", "likelihood": pv.Gaussian(0.3), "seed": 0}
curve = pv.Autoencoder.mlp(3, 1, **deep).double()
pv.fit_svi(curve.model, curve.guide, helix, **(how | {"lr": 0.03}))
figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
for name, made, shade in (("PCA", line, ORANGE), ("four layers", curve, BLUE)):
    rows = made.reconstruct(helix)
    print(f"helix, K = 1: squared error {(rows - helix).square().sum(1).mean():.3f}, {name}")
    rows = rows[made.features(helix)[:, 0].argsort()]
    for ax, (i, j) in zip(axes, ((0, 1), (0, 2)), strict=True):
        if name == "PCA":
            new_axes(ax).plot(*helix[:, [i, j]].T, ".", ms=3, color=GREY, label="data")
        ax.plot(*rows[:, [i, j]].T, color=shade, lw=1.8, label=name)
        ax.set(xlabel=f"$x_{i + 1}$, sds", ylabel=f"$x_{j + 1}$, sds", aspect="equal")
        title(ax, f"One code a point: $x_{i + 1}$ and $x_{j + 1}$")
        legend_below(ax)
figure.savefig("linear_autoencoders.png", dpi=150)
print("wrote linear_autoencoders.png")
