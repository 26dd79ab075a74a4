# %% [markdown]
# # A map that knows what it has not seen
# Counts of 18 amino acids in the coat protein of 38 Tobamoviruses: Tipping and Bishop (1999)
# mapped them whole, and with each value removed with probability 20 %. W is determined up to a
# rotation: the second map is turned onto the first. `--smoke` runs on a made table, without data.
# %%
import os
import sys

import matplotlib.pyplot as plt
import numpy as np
from scipy.linalg import orthogonal_procrustes

from ppl_vae import PPCA, fit_em, read_table
from ppl_vae.plots.drawing import ORANGE, new_axes, title

if "--smoke" in sys.argv:
    x = PPCA(18, 2, seed=0).double().sample(38, seed=0).numpy()
else:
    folder = os.environ.get("PPL_VAE_DATA") or sys.exit("set PPL_VAE_DATA to the data's folder")
    x = read_table(f"{folder}/Tobamovirus/tobamovirus.csv").values
holed = np.where(np.random.default_rng(0).random(x.shape) < 0.2, np.nan, x)
lost = np.isnan(holed).sum(1)
# %%
maps = []
for table in (x, holed):
    ppca = PPCA.like(table, 2, seed=0)
    print(fit_em(ppca, table))
    q = ppca.canonical().posterior(table)
    maps.append([part.detach().numpy() for part in (q.mean, q.covariance_matrix)])
(whole, spread), (means, spreads) = maps
turn = orthogonal_procrustes(means, whole)[0]
means, spreads = means @ turn, turn.T @ spreads @ turn
off = means - whole
moved = np.sqrt(np.einsum("ni,nij,nj->n", off, np.linalg.inv(spreads), off))
sd = np.linalg.det(spreads) ** 0.25  # of the circle that is as large as the ellipse
seen = np.linalg.det(spread[0]) ** 0.25, ppca.posterior(x[:1]).scale_tril.det().item() ** 0.5
print(f"posterior sd of complete rows: {seen[0]:.3f}; by the second model {seen[1]:.3f}")
print("cells lost   rows   posterior sd   moved by, in posterior sds: mean   largest")
for count in np.unique(lost):
    s, m = sd[lost == count], moved[lost == count]
    print(f"{count:10d}{len(s):7d}{s.mean():15.3f}{m.mean():35.2f}{m.max():10.2f}")
print(f"median move {np.median(moved):.2f}, largest {moved.max():.2f} (row {moved.argmax() + 1})")
# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharex=True, sharey=True)
circle = np.stack([f(np.linspace(0, 2 * np.pi, 60)) for f in (np.cos, np.sin)])
shades = plt.cm.ScalarMappable(plt.Normalize(-3, lost.max()), "Blues")
for ax, *rows in ((axes[0], whole, spread, 0 * lost), (axes[1], means, spreads, lost)):
    for mean, covariance, count in zip(*rows, strict=True):
        edge = mean[:, None] + np.linalg.cholesky(covariance) @ circle
        new_axes(ax).fill(*edge, fc=shades.to_rgba(count, 0.25), ec=shades.to_rgba(count))
    ax.plot(*rows[0].T, "k.", ms=4)
    ax.set(xlabel="$z_1$, sds of the prior", ylabel="$z_2$, sds of the prior", aspect="equal")
axes[1].plot(*np.moveaxis(np.stack([whole, means]), 2, 0), color=ORANGE, lw=1.2)
title(axes[0], "All cells seen; ellipses: one posterior sd")
title(axes[1], f"{lost.sum()} of {x.size} cells lost; lines from the left map")
figure.colorbar(shades, ax=axes, label=f"cells lost, of {x.shape[1]} in a row").ax.set_ylim(0)
figure.savefig("tobamovirus_map.png", dpi=150)
print("wrote tobamovirus_map.png")
