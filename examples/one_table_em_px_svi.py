"""
A table with missing values by EM, PX-EM and SVI
================================================

EM, PX-EM and SVI maximise the log-likelihood of the observed entries from one start. The guide of
SVI is the exact posterior, with the KL taken on the same sample, so that one sample gives log p
itself and SVI is gradient ascent by Adam. NaN becomes the mask of model and guide. The table
holds metabolites in the folder PPL_VAE_DATA, or simulated data without it and for ``--smoke``.
"""

# %%
import itertools
import os
import sys

import matplotlib.pyplot as plt
import numpy as np
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import ELBO, PPCA, ExactGuide, fit_em, fit_svi, read_table
from ppl_vae.evaluation import subspace

STEPS, K, TOLERANCE = 1000 if "--smoke" in sys.argv else 3000, 5, 0.01
if "PPL_VAE_DATA" in os.environ and "--smoke" not in sys.argv:
    x = read_table(f"{os.environ['PPL_VAE_DATA']}/pcaMethods/metaboliteData.csv").values.T
else:
    x = PPCA(20, K, seed=0).double().sample(60, seed=0).numpy()
    x[np.random.default_rng(0).random(x.shape) < 0.1] = np.nan
# %%
models = {name: PPCA.like(x, K, seed=0) for name in ("EM", "PX-EM", "SVI")}
fits = {name: fit_em(models[name], x, accelerate=name == "PX-EM") for name in ("EM", "PX-EM")}
pair, schedule = (models["SVI"].model, ExactGuide(models["SVI"])), CosineAnnealingLR
objective = ELBO(kl="sampled")
fits["SVI"] = fit_svi(
    *pair, x, objective=objective, steps=STEPS, lr=1e-2, scheduler=schedule, seed=0, capture=False
)
# %%
final = {name: model.log_likelihood(x).mean().item() for name, model in models.items()}
best = max(final.values())
figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.6), layout="constrained", sharey=True)
print(f"       log p, nats per datum    steps  seconds   within {TOLERANCE} of the best after")
for name, fit in fits.items():
    each = len(fit.objective) // fit.steps  # EM has two values per iteration: E-step, M-step
    below = best - np.append(fit.objective[::each], final[name])
    seconds = np.append(fit.elapsed[::each], fit.seconds)
    first = next(iter(np.flatnonzero(below < TOLERANCE)), None)
    reached = "never" if first is None else f"{first} steps, {seconds[first]:.2f} s"
    print(f"{name:5s}{final[name]:23.4f}{fit.steps:9d}{fit.seconds:9.2f}   {reached}")
    for ax, at in zip(axes, (np.arange(len(below)), seconds), strict=True):
        ax.loglog(at[1:], below[1:], label=name)
for a, b in itertools.combinations(models, 2):
    print(f"{a}, {b}: {subspace(models[a], models[b])}")
axes[0].set(xlabel="iterations or steps", ylabel="log p below the best, nats per datum")
axes[1].set(xlabel="seconds", ylim=(1e-6, None))
axes[0].legend()
figure.savefig("one_table_em_px_svi.png", dpi=150)
print("wrote one_table_em_px_svi.png")
