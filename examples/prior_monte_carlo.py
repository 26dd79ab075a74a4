r"""
Why not sample from the prior?
==============================

The marginal likelihood is an expectation over the prior, :math:`p(x) = E_{p(z)} p(x \mid z)`, so
the log of an average over samples of z from the prior estimates it. In PPCA the exact value is
known, and the estimate can be compared with it: it is far too low, and the error grows with the
number of latent and data dimensions, because the samples that matter are too rare to be drawn.
More samples help only slowly. Importance sampling from q(z given x) is far closer with 100 samples
than sampling from the prior is with ten thousand.
"""

# %%
import sys

import matplotlib.pyplot as plt

from ppl_vae import PPCA, AmortizedGuide, fit_svi, log_likelihood, mlp

SMOKE = "--smoke" in sys.argv
SIZES, STEPS = (
    ((10, 100, 1000, 10_000), 800) if SMOKE else ((10, 100, 1000, 10_000, 100_000), 1500)
)
NUM_DATA = 20

# %%
# Data are drawn from PPCA models of growing size, so that nothing but the estimator is at fault.
all_errors = {}
print(f"exact log p minus estimate, nats per datum, with S = {SIZES}")
for data_dim, latent_dim in ((4, 1), (16, 2), (64, 4), (256, 8)):
    ppca = PPCA(data_dim, latent_dim, seed=0).double()
    ppca.noise_scale.data.fill_(0.2)
    x = ppca.sample(NUM_DATA, seed=0)
    exact = ppca.log_likelihood(x).detach()
    estimates = [
        log_likelihood(ppca.model, None, x, number, method="prior", seed=0) for number in SIZES
    ]
    errors = [(exact - estimate.value).mean().item() for estimate in estimates]
    reliable = estimates[-1].share_reliable
    print(f"D = {data_dim:3d}, K = {latent_dim}:", *(f"{error:9.2f}" for error in errors), end="")
    print(f"   reliable at the last S: {reliable:.0%}")
    all_errors[f"D = {data_dim}, K = {latent_dim}"] = errors

# %%
# The same with a linear encoder as the proposal, at the largest of these models.
train = ppca.sample(1000, seed=1)
guide = AmortizedGuide(mlp(data_dim, latent_dim, seed=0), latent_dim, homoscedastic=True).double()
for parameter in ppca.parameters():
    parameter.requires_grad_(False)
fit_svi(ppca.model, guide, train, steps=STEPS, batch_size=100, lr=1e-2, seed=0)
amortized = log_likelihood(ppca.model, guide, x, 100, seed=0)
print(f"with a guide and S = 100: {(exact - amortized.value).mean():.2f}\n{amortized}")

# %%
ax = plt.figure(figsize=(6.4, 4.4), layout="constrained").gca()
for name, errors in all_errors.items():
    ax.plot(SIZES, errors, "o-", label=name)
ax.set(xscale="log", yscale="symlog", xlabel="samples per datum")
ax.set(ylabel="exact log p minus estimate, nats per datum", title="Sampling z from the prior")
ax.legend()
ax.figure.savefig("prior_monte_carlo.png", dpi=150)
print("wrote prior_monte_carlo.png")
