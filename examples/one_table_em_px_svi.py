# %% [markdown]
# # One table with missing values, three ways up
# EM, PX-EM and SVI climb log p of the observed cells from the same start. The guide of SVI is the
# exact posterior; with the KL taken on the same draw one draw gives log p itself, so this is
# gradient ascent, by Adam. NaN becomes the mask of model and guide. The table: metabolites, a
# sample per row, from the folder PPL_VAE_DATA, or else, and for `--smoke`, a made one.
# %%
import itertools
import os
import sys

import matplotlib.pyplot as plt
import numpy as np
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import ELBO, PPCA, ExactGuide, fit_em, fit_svi, read_table, subspace
from ppl_vae.plots.drawing import NATS, PALETTE, legend_below, log_scale, new_axes, title

STEPS, K, NEAR = 100 if "--smoke" in sys.argv else 3000, 5, 0.01
if "PPL_VAE_DATA" in os.environ and "--smoke" not in sys.argv:
    x = read_table(f"{os.environ['PPL_VAE_DATA']}/pcaMethods/metaboliteData.csv").values.T
else:
    x = PPCA(20, K, seed=0).double().sample(60, seed=0).numpy()
    x[np.random.default_rng(0).random(x.shape) < 0.1] = np.nan
# %%
models = {name: PPCA.like(x, K, seed=0) for name in ("EM", "PX-EM", "SVI")}
fits = {name: fit_em(models[name], x, accelerate=name == "PX-EM") for name in ("EM", "PX-EM")}
how = {"steps": STEPS, "lr": 1e-2, "scheduler": CosineAnnealingLR, "seed": 0, "capture": False}
pair = models["SVI"].model, ExactGuide(models["SVI"])
fits["SVI"] = fit_svi(*pair, x, objective=ELBO(kl="sampled"), **how)
# %%
ends = {name: model.log_likelihood(x).mean().item() for name, model in models.items()}
best, needed = max(ends.values()), {}
figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.6), layout="constrained", sharey=True)
print(f"       log p, {NATS}    steps  seconds   within {NEAR} of the best after")
for (name, fit), dash, shade in zip(fits.items(), ("-", "--", ":"), PALETTE, strict=False):
    each = len(fit.objective) // fit.steps  # EM's holds two values an iteration: E-step, M-step
    below = best - np.append(fit.objective[::each], ends[name])
    seconds = np.append(fit.elapsed[::each], fit.seconds)
    first = needed[name] = next(iter(np.flatnonzero(below < NEAR)), np.inf)
    when = f"{first} steps, {seconds[first]:.2f} s" if first < np.inf else "never"
    print(f"{name:5s}{ends[name]:21.4f}{fit.steps:9d}{fit.seconds:9.2f}   {when}")
    for ax, at in zip(axes, (np.arange(len(below)), seconds), strict=True):
        new_axes(ax).plot(at[1:], below[1:], dash, color=shade, label=name)
for a, b in itertools.combinations(models, 2):
    print(f"{a}, {b}: {subspace(models[a], models[b])}")
print(
    f"Fewest iterations: {', then '.join(sorted(needed, key=lambda name: needed[name]))}. The ends"
    f" lie up to {best - min(ends.values()):.2g} {NATS} apart."
)
# %%
for ax, along in zip(axes, ("iterations or steps", "seconds"), strict=True):
    ax.set(yscale="log", ylim=(1e-6, None), xlabel=along)
    log_scale(ax, "x")
    title(ax, f"Left to climb, against {along}")
legend_below(axes[0])
axes[0].set_ylabel(f"log p below the best, {NATS}")
figure.savefig("one_table_em_px_svi.png", dpi=150)
print("wrote one_table_em_px_svi.png")
