r"""
A VAE fitted to a ring
======================

:math:`x = z/10 + z/|z|` with z ~ N(0, I) in the plane is a ring with a known density (see the
example on pushforwards). A VAE is fitted to samples of x and compared with it. The decoder's
noise starts small: the variance of the data is 0.63 along each axis, so at sigma = 1 both latent
dimensions would collapse.
"""

# %%
import math
import sys
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import IWAE, VAE, Gaussian, fit_svi, log_likelihood

STEPS, SAMPLES = (800, 200) if "--smoke" in sys.argv else (3000, 1000)
z = torch.randn(2, 2000, 2, generator=torch.Generator().manual_seed(0))
s = z.norm(dim=2, keepdim=True)
x, x_test = z / 10 + z / s
log_p = -s[1].square() / 2 - math.log(2 * math.pi / 10) - (1 / 10 + 1 / s[1]).log()

# %%
likelihood = Gaussian("shared", initial=0.1)
vae = VAE.mlp(2, 2, hidden=(64, 64), covariance="full", likelihood=likelihood, seed=0)
fit = partial(fit_svi, batch_size=256, lr=5e-3, scheduler=CosineAnnealingLR, seed=0)
print(fit(vae.model, vae.guide, x, objective=IWAE(8), steps=STEPS))
print(f"held out, by change of variables: {log_p.mean():.3f} nats per datum; by the VAE:")
print(log_likelihood(vae.model, vae.guide, x_test[:500], SAMPLES, seed=0))

# %%
new = vae.sample(2000, seed=0)
angles = [torch.atan2(rows[:, 1], rows[:, 0]) for rows in (x, new)]
radii = [rows.norm(dim=1) for rows in (x, new)]
print(f"mean radius: data {radii[0].mean():.4f}, samples {radii[1].mean():.4f}")
uniform = stats.kstest(angles[1].numpy() / (2 * math.pi) + 0.5, "uniform")
print(f"Kolmogorov-Smirnov, uniform angle: {uniform.statistic:.3f}, p = {uniform.pvalue:.2g}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
for name, rows, radius, angle in zip(("data", "VAE"), (x, new), radii, angles, strict=True):
    axes[0].scatter(*rows.T.numpy(), s=4, lw=0, label=name)
    axes[1].hist(radius.numpy(), np.linspace(0, 1.8, 46), histtype="step", label=name)
    axes[2].hist(angle.numpy(), np.linspace(-np.pi, np.pi, 25), histtype="step", label=name)
axes[0].set(xlabel="$x_1$, units of x", ylabel="$x_2$, units of x", aspect="equal")
axes[1].set(xlabel="radius, units of x", ylabel="number of samples")
axes[2].set(xlabel="angle, radians", ylabel="number of samples", ylim=0)
axes[1].legend()
figure.savefig("ring.png", dpi=150)
print("wrote ring.png")
