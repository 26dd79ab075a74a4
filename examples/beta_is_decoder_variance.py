r"""
Beta is the decoder's variance
==============================

A beta-VAE with squared error (sigma = 1) is a VAE with another sigma and no beta:

.. math:: L(\sigma = 1, \beta = b) = b \, L(\sigma^2 = b, \beta = 1)
          + \tfrac{D}{2} \left(b \log 2 \pi b - \log 2 \pi\right).

So the data can choose beta: by the held-out ELBO under :math:`\sigma^2 = \beta`, or by a learned
sigma without a search.
"""

# %%
import math
import sys
from functools import partial

import matplotlib.pyplot as plt
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import ELBO, VAE, Gaussian, digits, fit_svi

EPOCHS, D, K = 20 if "--smoke" in sys.argv else 100, 64, 8
x, x_test = torch.as_tensor(digits()).split((1400, 397))
vae_like = partial(VAE, data_dim=D, latent_dim=K)
fit = partial(fit_svi, epochs=EPOCHS, batch_size=100, lr=3e-3, seed=0, capture=False)


def fit_vae(likelihood, beta=1.0):
    vae = VAE.mlp(D, K, hidden=(64,), likelihood=likelihood, seed=0).double()
    fit(vae.model, vae.guide, x, objective=ELBO(beta=beta), scheduler=CosineAnnealingLR)
    return vae


def held_out(vae):  # E_q log p(x given z), and KL
    torch.manual_seed(0)
    return [term.mean().item() for term in ELBO(8).terms(vae.model, vae.guide, x_test)]


# %%
# The last column of the table is the difference between the two sides of the identity.
ax = plt.figure(figsize=(6.4, 4.4), layout="constrained").gca()
print("held-out ELBO, nats per datum\n beta    rate   sigma = 1  sigma^2 = beta   difference")
for beta in (0.005, 0.01, 0.03, 0.1, 0.3, 1.0):
    vae = fit_vae(Gaussian(1.0), beta)
    same = vae_like(likelihood=Gaussian(beta**0.5), decoder=vae.decoder, encoder=vae.guide.encoder)
    (fit_1, rate), (fit_b, _) = held_out(vae), held_out(same)
    constant = D / 2 * (beta * math.log(2 * math.pi * beta) - math.log(2 * math.pi))
    off = abs(fit_1 - beta * rate - beta * (fit_b - rate) - constant)
    print(f"{beta:5g}{rate:8.2f}{fit_1 - rate:12.2f}{fit_b - rate:16.2f}{off:13.0e}")
    ax.plot(beta, fit_b - rate, "o", color="tab:blue")
vae = fit_vae(Gaussian("shared", initial=0.2))
variance, (fit_s, rate) = vae.likelihood.scale.item() ** 2, held_out(vae)
print(f"sigma learned, no beta: sigma^2 = {variance:.4f}, ELBO {fit_s - rate:.2f}")
ax.plot(variance, fit_s - rate, "*", ms=13, color="tab:orange", label="sigma learned, no beta")
ax.set(xlabel="sigma² = beta", ylabel="held-out ELBO, nats per datum", xscale="log")
ax.legend()
ax.figure.savefig("beta_is_decoder_variance.png", dpi=150)
