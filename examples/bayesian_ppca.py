"""
The posterior of PPCA's parameters
==================================

Maximum likelihood gives one value of each loading. With priors on the parameters, draws of their
posterior give intervals. Loadings are determined up to a rotation, so that the intervals are of
the canonical loadings, on principal axes. The density of new data averages over the draws; with
few rows it exceeds that at the maximum of the likelihood.
"""

# %%
import sys

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_iris

from ppl_vae import PPCA, BayesianPPCA, fit_em, fit_vb, sample_posterior

NUM_SAMPLES = 1000 if "--smoke" in sys.argv else 2000
iris = load_iris()
x = iris.data[np.random.default_rng(0).permutation(150)]
x, x_test = x[:30], x[30:]

# %%
ppca = PPCA.like(x, 2)
fit_em(ppca, x)
model = BayesianPPCA.like(x, 2)
print(model)
bayes = fit_vb(model, x, seed=0)
print(bayes)
samples = sample_posterior(model, x, num_samples=NUM_SAMPLES, warmup=200, seed=0)
print(samples)

# %%
# Held-out log p: at the maximum of the likelihood, and averaged over the posterior.
at_maximum = ppca.log_likelihood(x_test).detach()
average = samples.log_predictive(x_test).value
gain = average - at_maximum
error = gain.std() / len(gain) ** 0.5
print(f"held out: {at_maximum.mean():.2f} at the maximum, {average.mean():.2f} averaged;")
print(f"the difference is {gain.mean():.3f} ± {error:.3f} nats per datum")

# %%
canonical = samples.invariants()["canonical_loadings"].flatten(0, 1)
low, median, high = canonical.quantile(torch.tensor([0.025, 0.5, 0.975]).double(), dim=0)
figure, ax = plt.subplots(figsize=(5.2, 3.9), layout="constrained")
for axis in range(canonical.shape[-1]):
    at = np.arange(4) + 0.2 * axis - 0.1
    error = torch.stack([median - low, high - median])[..., axis]
    ax.errorbar(at, median[:, axis], error, fmt="o", capsize=3, label=f"axis {axis + 1}")
ax.axhline(0, color="black", lw=0.8)
ax.set_xticks(range(4), [name.removesuffix(" (cm)") for name in iris.feature_names], rotation=15)
ax.set_ylabel("canonical loading, cm per sd of z")
ax.set_title("Loadings: posterior median and 95 % interval, 30 rows", loc="left", fontsize=11)
ax.legend(frameon=False)
figure.savefig("bayesian_ppca.png", dpi=150)
print("wrote bayesian_ppca.png")
