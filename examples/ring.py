# %% [markdown]
# # A ring, learned back
# x = g(z) = z/10 + z/|z| with z ~ N(0, I_2) is a ring, and its density is known (pushforward.py).
# A VAE sees draws of x alone and has to find such a g. Its noise starts small: the data's
# variance is 0.63 along each axis, and at sigma = 1 both latent dimensions would collapse.
# %%
import math
import sys

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import IWAE, VAE, Gaussian, fit_svi, log_likelihood
from ppl_vae.plots.drawing import BLUE, ORANGE, legend_below, new_axes, title

STEPS, DRAWS = (30, 50) if "--smoke" in sys.argv else (3000, 1000)
z = torch.randn(2, 2000, 2, generator=torch.Generator().manual_seed(0))
s = z.norm(dim=2, keepdim=True)
x, x_test = z / 10 + z / s
log_p = -s[1].square() / 2 - math.log(2 * math.pi / 10) - (1 / 10 + 1 / s[1]).log()

# %%
how = {"covariance": "full", "likelihood": Gaussian("shared", initial=0.1), "seed": 0}
vae = VAE.mlp(2, 2, hidden=(64, 64), **how)
how = {"steps": STEPS, "batch_size": 256, "lr": 5e-3, "scheduler": CosineAnnealingLR, "seed": 0}
print(fit_svi(vae.model, vae.guide, x, objective=IWAE(8), **how))
print(f"held out, by change of variables: {log_p.mean():.3f} nats per datum; by the VAE:")
print(log_likelihood(vae.model, vae.guide, x_test[:500], DRAWS, seed=0))

# %%
new = vae.sample(2000, seed=0)
angles = [torch.atan2(rows[:, 1], rows[:, 0]) for rows in (x, new)]
radii = [rows.norm(dim=1) for rows in (x, new)]
print(f"mean radius: data {radii[0].mean():.4f}, drawn {radii[1].mean():.4f}")
uniform = stats.kstest(angles[1].numpy() / (2 * math.pi) + 0.5, "uniform")
print(f"the angles' distance from uniform: {uniform.statistic:.3f}, p = {uniform.pvalue:.2g}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
looks = (("data", ORANGE), ("VAE", BLUE))
for (name, shade), rows, r, a in zip(looks, (x, new), radii, angles, strict=True):
    axes[0].scatter(*rows.T.numpy(), s=4, lw=0, color=shade, label=name)
    look = {"histtype": "step", "color": shade, "label": name, "lw": 1.4}
    axes[1].hist(r.numpy(), np.linspace(0, 1.8, 46), **look)
    axes[2].hist(a.numpy(), np.linspace(-np.pi, np.pi, 25), **look)
axes[0].set(xlabel="$x_1$, units of x", ylabel="$x_2$, units of x", aspect="equal")
axes[1].set(xlabel="radius, units of x", ylabel="draws")
axes[2].set(xlabel="angle, radians", ylabel="draws", ylim=0)
for ax, text in zip(axes, ("Draws", "Radii", "Angles"), strict=True):
    title(new_axes(ax), text)
    legend_below(ax)
figure.savefig("ring.png", dpi=150)
print("wrote ring.png")
