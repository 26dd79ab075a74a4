"""
Imputation of metabolite data, with intervals
=============================================

154 metabolites in 52 samples of Arabidopsis (Scholz and others, 2005), with 419 values removed at
random, of which the truth is known. K is chosen without it: in five folds of the observed
entries, the log density of the entries left out decides. ``--smoke`` uses simulated data.
"""

# %%
import os
import sys

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import norm

from ppl_vae import PPCA, fit_em, read_table

rng = np.random.default_rng(0)
if "--smoke" in sys.argv:
    truth = PPCA(12, 3, seed=0).double().sample(40, seed=0).numpy()
    x = np.where(rng.random(truth.shape) < 0.05, np.nan, truth)
else:
    folder = os.environ.get("PPL_VAE_DATA") or sys.exit("set PPL_VAE_DATA to the data's folder")
    files = (f"{folder}/pcaMethods/metaboliteData{which}.csv" for which in ("", "Complete"))
    x, truth = (read_table(file).values.T for file in files)
missing = np.isnan(x)
fold = np.where(missing, 5, rng.integers(5, size=x.shape))
# %%
# Fold 5 holds the missing values, which are predicted from all observed ones.
scores, imputed = {}, {}
errors = {0: np.sqrt(np.mean((np.nanmean(x, 0) - truth)[missing] ** 2))}  # K = 0: column means
print(" K   log density, nats per entry   RMSE of missing values   / column means   95 % coverage")
for K in range(1, 9):
    mean, sd = np.zeros((2, *x.shape))
    for number in range(6):
        left_out = fold == number
        ppca = PPCA.like(x, K, mask=~left_out, seed=0)
        fit, filled = fit_em(ppca, x, mask=~left_out), ppca.impute(x, mask=~left_out)
        mean[left_out], sd[left_out] = filled.mean.numpy()[left_out], filled.sd.numpy()[left_out]
    inside = abs(mean - truth)[missing] < 1.96 * sd[missing]
    scores[K] = norm.logpdf(x, mean, sd)[~missing].mean()
    errors[K] = rmse = np.sqrt(np.mean((mean - truth)[missing] ** 2))
    imputed[K] = np.stack([truth[missing], mean[missing], 1.96 * sd[missing]]), inside
    print(f"{K:2d}{scores[K]:30.3f}{rmse:25.4f}{rmse / errors[0]:17.3f}{inside.mean():16.3f}")
best = max(scores, key=scores.get)
(values, inside), name = imputed[best], "95 % interval"
print(f"K = {best} is chosen; the last fit, in nats per datum:\n{fit}")
# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.6), layout="constrained")
for which, shade, label in ((inside, "tab:blue", "inside"), (~inside, "tab:orange", "outside")):
    left.errorbar(*values[:, which], fmt=".", lw=0.6, color=shade, label=f"{label} the {name}")
left.axline((0, 0), slope=1, color="black", ls=":", lw=1)
left.set(xlabel="true value, units of the table", ylabel="imputed value, units of the table")
left.legend()
right.plot(errors.keys(), errors.values(), "o-")
right.set(
    xlabel="K (0: column means)", ylabel="RMSE of missing values, units of the table", ylim=0
)
figure.savefig("impute_metabolites.png", dpi=150)
