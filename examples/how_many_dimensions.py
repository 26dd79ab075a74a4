"""
The posterior probability of K
==============================

With priors on the parameters, each number of latent dimensions K has an evidence log p(x | K), and
the data have a posterior p(K | x) instead of one chosen K. Bridge sampling computes the evidence
from draws of the posterior. Beside it stand the bound of variational Bayes, Laplace's and Minka's
approximations, BIC, and held-out log p. The density of new data averages over K.
"""

# %%
import sys

import numpy as np

from ppl_vae import BayesianPPCA, fit_vb
from ppl_vae.evaluation import compare_latent_dims
from ppl_vae.plots import plot_latent_dims

NUM_SAMPLES, DIMS = (1000, (1, 2, 3)) if "--smoke" in sys.argv else (2000, (1, 2, 3, 4, 5))

# %%
# 60 rows of eight columns with two latent dimensions, one of them weaker.
random = np.random.default_rng(1)
loadings = random.normal(size=(8, 2)) * (1.5, 0.8)
z = random.normal(size=(160, 2))
x = z @ loadings.T + random.normal(size=(160, 8))
x, x_test = x[:60], x[60:]

# %%
found = compare_latent_dims(x, DIMS, num_samples=NUM_SAMPLES, warmup=200, seed=0)
print(found)
figure = plot_latent_dims(found).figure
figure.savefig("how_many_dimensions.png", dpi=150)

# %%
# New data: each K alone, and the average over K.
for k, samples in zip(found.dims, found.samples, strict=True):
    print(f"K = {k}: {samples.log_predictive(x_test).value.mean():.3f} nats per datum")
print(f"average over K: {found.log_predictive(x_test).mean():.3f} nats per datum")

# %%
# One model with five columns, of which a prior on relevances (ARD) switches some off.
ard = fit_vb(BayesianPPCA.like(x, 5, prior="ard"), x, seed=0)
print(ard)
print("wrote how_many_dimensions.png")
