# %% [markdown]
# # beta is the decoder's variance
# A VAE of squared errors (sigma = 1) with a beta before its KL is one of another sigma, no beta:
# objective(sigma = 1, beta = b) = b objective(sigma^2 = b, beta = 1) + constant; for D columns
# constant = D/2 (b log(2 pi b) - log(2 pi)). beta trades rate for distortion; which is best, data
# say, by the ELBO with sigma^2 = beta.
# %%
import math
import sys

import matplotlib.pyplot as plt
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import ELBO, VAE, Gaussian, digits, fit_svi
from ppl_vae.plots.drawing import BLUE, NATS, ORANGE, legend_below, new_axes, title

EPOCHS, D, K = 2 if "--smoke" in sys.argv else 100, 64, 8
x, x_test = torch.as_tensor(digits()).split((1400, 397))
how = {"epochs": EPOCHS, "batch_size": 100, "lr": 3e-3, "seed": 0, "capture": False}


def fitted(likelihood, beta=1.0):
    vae = VAE.mlp(D, K, hidden=(64,), likelihood=likelihood, seed=0).double()
    fit_svi(vae.model, vae.guide, x, objective=ELBO(beta=beta), scheduler=CosineAnnealingLR, **how)
    return vae


def held_out(vae):
    torch.manual_seed(0)
    return [term.mean().item() for term in ELBO(8).terms(vae.model, vae.guide, x_test)]


# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.2), layout="constrained")
print(f"                              held-out ELBO, {NATS}  the identity")
print(" beta    rate  squared error   sigma = 1  sigma^2 = beta        off by")
for beta in (0.005, 0.01, 0.03, 0.1, 0.3, 1.0):
    vae = fitted(Gaussian(1.0), beta)
    parts = {"decoder": vae.decoder, "encoder": vae.guide.encoder, "data_dim": D, "latent_dim": K}
    (fit_1, rate), (fit_b, _) = map(held_out, (vae, VAE(likelihood=Gaussian(beta**0.5), **parts)))
    error, bound = -2 * fit_1 - D * math.log(2 * math.pi), fit_b - rate
    constant = D / 2 * (beta * math.log(2 * math.pi * beta) - math.log(2 * math.pi))
    off = abs(fit_1 - beta * rate - beta * bound - constant)
    print(f"{beta:5g}{rate:8.2f}{error:15.3f}{fit_1 - rate:12.2f}{bound:16.2f}{off:14.0e}")
    for ax, at in ((left, (rate, error)), (right, (beta, bound))):
        new_axes(ax).plot(*at, "o", color=BLUE)
        ax.annotate(f"{beta:g}", at, (6, 4), textcoords="offset points")
vae = fitted(Gaussian("shared", initial=0.5))
variance, (fit, rate) = vae.likelihood.scale.item() ** 2, held_out(vae)
print(f"sigma learned, no beta: sigma^2 = {variance:.4f}, ELBO {fit - rate:.2f} {NATS}")
# %%
left.set(xlabel=f"rate: KL, {NATS}", ylabel="distortion: squared error per datum", ylim=(0, None))
title(left, "What beta (at each point) trades")
right.plot(variance, fit - rate, "*", ms=13, color=ORANGE, label="sigma learned, no beta")
right.set(xlabel="sigma² = beta", ylabel=f"held-out ELBO, {NATS}", xscale="log")
legend_below(right)
title(right, "What data say of it")
figure.savefig("beta_is_decoder_variance.png", dpi=150)
