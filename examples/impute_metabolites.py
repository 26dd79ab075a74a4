# %% [markdown]
# # Missing values filled with intervals, beside the truth
# 154 metabolites in 52 samples of Arabidopsis, a sample per row once the file is turned (Scholz
# and others, 2005). Of 419 cells taken out at random the truth is known. K is chosen without it:
# each fifth of the other cells is hidden in turn, and their log density decides. `--smoke`: made
# data.
# %%
import os
import sys

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import norm

from ppl_vae import PPCA, fit_em, read_table
from ppl_vae.plots.drawing import BLUE, ORANGE, legend_below, new_axes, title

rng = np.random.default_rng(0)
if "--smoke" in sys.argv:
    truth = PPCA(12, 3, seed=0).double().sample(40, seed=0).numpy()
    x = np.where(rng.random(truth.shape) < 0.05, np.nan, truth)
else:
    folder = os.environ.get("PPL_VAE_DATA") or sys.exit("set PPL_VAE_DATA to the data's folder")
    files = (f"{folder}/pcaMethods/metaboliteData{which}.csv" for which in ("", "Complete"))
    x, truth = (read_table(file).values.T for file in files)
holes = np.isnan(x)
part = np.where(holes, 5, rng.integers(5, size=x.shape))
# %%
scores, fills = {}, {}
errors = {0: np.sqrt(np.mean((np.nanmean(x, 0) - truth)[holes] ** 2))}  # K = 0: column means
print(
    " K   hidden cells, nats per cell   RMSE of missing values   of column means'   95 % "
    "intervals cover"
)
for K in range(1, 9):
    mean, sd = np.zeros((2, *x.shape))
    for number in range(6):  # the last are the missing values, given all that was observed
        cells = part == number
        ppca = PPCA.like(x, K, mask=~cells, seed=0)
        fit, filled = fit_em(ppca, x, mask=~cells), ppca.impute(x, mask=~cells)
        mean[cells], sd[cells] = filled.mean.numpy()[cells], filled.sd.numpy()[cells]
    missed = abs(mean - truth)[holes] > 1.96 * sd[holes]
    scores[K] = norm.logpdf(x, mean, sd)[~holes].mean()
    errors[K] = rmse = np.sqrt(np.mean((mean - truth)[holes] ** 2))
    fills[K] = (truth[holes], mean[holes], 1.96 * sd[holes]), missed, fit
    print(f"{K:2d}{scores[K]:28.3f}{rmse:16.4f}{rmse / errors[0]:19.3f}{1 - missed.mean():23.3f}")
best = max(scores, key=scores.get)
cells, missed, fit = fills[best]
print(f"K = {best} is chosen\n{fit}")
# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.6), layout="constrained")
for which, mark, shade, name in ((~missed, ".", BLUE, "inside"), (missed, "D", ORANGE, "outside")):
    look = {"fmt": mark, "ms": 4, "lw": 0.6, "color": shade, "label": f"truth {name}"}
    left.errorbar(*(values[which] for values in cells), **look)
left.axline((0, 0), slope=1, color="black", ls=":", lw=1)
left.set(xlabel="true value, units of the table", ylabel="imputed value, units of the table")
right.plot(errors.keys(), errors.values(), "o-", color=BLUE)
right.set(xlabel="K (0: column means)", ylabel="RMSE, units of the table", ylim=0)
title(new_axes(left), f"K = {best}: {(~missed).sum()} of {len(missed)} in their 95 % intervals")
title(new_axes(right), f"Error of the missing values; K = {best} chosen without them")
legend_below(left)
figure.savefig("impute_metabolites.png", dpi=150)
print("wrote impute_metabolites.png")
