"""
Uncertainty of a PPCA map with missing values
=============================================

Counts of 18 amino acids in the coat protein of 38 Tobamoviruses. Tipping and Bishop (1999) mapped
the complete table, and the table with each value removed with probability 20 %. The loadings are
determined up to a rotation, so the second map is rotated onto the first. ``--smoke`` uses
simulated data.
"""

# %%
import os
import sys

import matplotlib.pyplot as plt
import numpy as np
from scipy.linalg import orthogonal_procrustes

from ppl_vae import PPCA, fit_em, read_table

if "--smoke" in sys.argv:
    x = PPCA(18, 2, seed=0).double().sample(38, seed=0).numpy()
else:
    folder = os.environ.get("PPL_VAE_DATA") or sys.exit("set PPL_VAE_DATA to the data's folder")
    x = read_table(f"{folder}/Tobamovirus/tobamovirus.csv").values
incomplete = np.where(np.random.default_rng(0).random(x.shape) < 0.2, np.nan, x)
removed = np.isnan(incomplete).sum(1)
# %%
maps = []
for table in (x, incomplete):
    ppca = PPCA.like(table, 2, seed=0)
    print(fit_em(ppca, table))
    q = ppca.canonical().posterior(table)
    maps.append([part.detach().numpy() for part in (q.mean, q.covariance_matrix)])
(complete, covariance), (means, covariances) = maps
rotation = orthogonal_procrustes(means, complete)[0]
means, covariances = means @ rotation, rotation.T @ covariances @ rotation
shift = means - complete
distance = np.sqrt(np.einsum("ni,nij,nj->n", shift, np.linalg.inv(covariances), shift))
sd = np.linalg.det(covariances) ** 0.25  # of the circle with the area of the ellipse
print(f"posterior sd of a complete row: {np.linalg.det(covariance[0]) ** 0.25:.3f}")
print("removed   rows   posterior sd   distance from the first map, in sds: mean   largest")
for count in np.unique(removed):
    s, d = sd[removed == count], distance[removed == count]
    print(f"{count:7d}{len(s):7d}{s.mean():15.3f}{d.mean():44.2f}{d.max():10.2f}")
# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharex=True, sharey=True)
circle = np.stack([f(np.linspace(0, 2 * np.pi, 60)) for f in (np.cos, np.sin)])
shades = plt.cm.ScalarMappable(plt.Normalize(-3, removed.max()), "Blues")
shown = (complete, covariance, 0 * removed), (means, covariances, removed)
for ax, rows in zip(axes, shown, strict=True):
    for mean, spread, count in zip(*rows, strict=True):
        edge = mean[:, None] + np.linalg.cholesky(spread) @ circle
        ax.fill(*edge, fc=shades.to_rgba(count, 0.25), ec=shades.to_rgba(count))
    ax.plot(*rows[0].T, "k.", ms=4)
    ax.set(xlabel="$z_1$, prior sds", ylabel="$z_2$, prior sds", aspect="equal")
axes[1].plot(*np.moveaxis(np.stack([complete, means]), 2, 0), color="tab:orange", lw=1.2)
axes[0].set_title("Complete; ellipses of one posterior sd")
axes[1].set_title(f"{removed.sum()} of {x.size} values removed; lines from the first map")
figure.colorbar(shades, ax=axes, label=f"values removed, of {x.shape[1]} per row").ax.set_ylim(0)
figure.savefig("tobamovirus_map.png", dpi=150)
print("wrote tobamovirus_map.png")
