# %% [markdown]
# # One bound, many gradients
# Estimators of one gradient: their means agree, their variances do not. The score function needs
# nothing of q but its density, and pays; draws that are functions of noise and parameters (the
# reparameterization trick) let SGD fit a VAE. With more draws the importance-weighted bound is
# tighter, its encoder's gradient *noisier*, unless it is doubly reparameterized (DReG).
# %%
import sys

import matplotlib.pyplot as plt
import torch

from ppl_vae import ELBO, IWAE, VAE, digits, elbo, fit_svi
from ppl_vae.plots.drawing import NATS, PALETTE, legend_below, new_axes, title

STEPS, REPEATS = (20, 10) if "--smoke" in sys.argv else (600, 200)
DRAWS, x = (1, 4, 16, 64), torch.as_tensor(digits())


def trained(steps, objective=None):
    vae = VAE.mlp(data_dim=64, latent_dim=5, hidden=(64,), seed=0).double()
    how = {"batch_size": 100, "lr": 3e-3, "seed": 0, "capture": False, "objective": objective}
    return vae, fit_svi(vae.model, vae.guide, x, steps=steps, **how)


def gradients(vae, objective):  # of the encoder, on the same rows again and again
    weights, found = list(vae.guide.parameters()), []
    for _ in range(REPEATS):
        value, _ = objective.mean_value(vae.model, vae.guide, x[:50])
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)]))
    mean, variance = torch.stack(found).mean(0), torch.stack(found).var(0).sum()
    return mean, variance, (mean.square().sum() - variance / REPEATS).clamp(min=0)


# %%
torch.manual_seed(0)
vae, _ = trained(STEPS // 20)
figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.6), layout="constrained")
print(f"4 draws           variance  mean's distance, in errors  after {STEPS} steps: ELBO, {NATS}")
for place, way in enumerate(("reparameterized", "stl", "score-loo", "score")):
    mean, variance, _ = gradients(vae, objective := ELBO(4, kl="sampled", gradient=way))
    plain = plain if place else (mean, variance)
    off = (mean - plain[0]).norm() / ((variance + plain[1]) / REPEATS).sqrt()
    end, fit = trained(STEPS, objective)
    bound = elbo(end.model, end.guide, x, num_samples=4, seed=0).mean()
    print(f"{way:15s}{variance:11.3g}{off:28.2f}{bound:37.2f}")
    new_axes(left).plot(fit.objective, color=PALETTE[place], lw=0.8, label=way)
for place, way in enumerate(("reparameterized", "dreg")):
    ratios = [(s / v).sqrt() for _, v, s in (gradients(vae, IWAE(n, way)) for n in DRAWS)]
    print(f"IWAE, {way:15s} signal to noise with {DRAWS} draws:", *(f"{r:.3f}" for r in ratios))
    new_axes(right).loglog(DRAWS, ratios, "o-", color=PALETTE[place], label=way)
# %%
left.set(xlabel="steps", ylabel=f"objective, {NATS}")
right.set(xlabel="draws per datum", ylabel="|mean| / sd of the encoder's gradient")
right.set_xticks(DRAWS, DRAWS)
for ax, text in ((left, "ELBO by each gradient"), (right, "Importance-weighted bound")):
    title(ax, text)
    legend_below(ax, 4)
figure.savefig("gradient_estimators.png", dpi=150)
