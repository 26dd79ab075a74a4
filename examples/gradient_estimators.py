"""
Estimators of the ELBO's gradient
=================================

Estimators of one gradient have the same mean and different variances: that of the score function
is much larger than that of the reparameterization trick. With more samples the
importance-weighted bound is tighter, but its gradient for the encoder has a lower signal-to-noise
ratio, unless it is doubly reparameterized (DReG).
"""

# %%
import sys
from functools import partial

import matplotlib.pyplot as plt
import torch

from ppl_vae import ELBO, IWAE, VAE, digits, elbo, fit_svi

STEPS, REPEATS = (200, 40) if "--smoke" in sys.argv else (600, 200)
SAMPLES, x = (1, 4, 16, 64), torch.as_tensor(digits())
fit = partial(fit_svi, batch_size=100, lr=3e-3, seed=0, capture=False)


def trained(steps, objective=None):
    vae = VAE.mlp(data_dim=64, latent_dim=5, hidden=(64,), seed=0).double()
    return vae, fit(vae.model, vae.guide, x, steps=steps, objective=objective)


def gradient_moments(vae, objective):  # of the encoder's gradient, on the same rows each time
    weights, gradients = list(vae.guide.parameters()), []
    for _ in range(REPEATS):
        value, _ = objective.mean_value(vae.model, vae.guide, x[:50])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)]))
    mean, variance = torch.stack(gradients).mean(0), torch.stack(gradients).var(0).sum()
    return mean, variance, (mean.square().sum() - variance / REPEATS).clamp(min=0)


# %%
torch.manual_seed(0)
vae, _ = trained(STEPS // 20)
figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.6), layout="constrained")
print(f"4 samples        variance  bias / standard error  ELBO, nats per datum, at step {STEPS}")
for name in ("reparameterized", "stl", "score-loo", "score"):
    mean, variance, _ = gradient_moments(vae, objective := ELBO(4, kl="sampled", gradient=name))
    reference = (mean, variance) if name == "reparameterized" else reference
    off = (mean - reference[0]).norm() / ((variance + reference[1]) / REPEATS).sqrt()
    end, result = trained(STEPS, objective)
    bound = elbo(end.model, end.guide, x, num_samples=4, seed=0).mean()
    print(f"{name:15s}{variance:11.3g}{off:23.2f}{bound:23.2f}")
    left.plot(result.objective, lw=0.8, label=name)
for name in ("reparameterized", "dreg"):
    moments = [gradient_moments(vae, IWAE(number, name)) for number in SAMPLES]
    ratios = [(signal / variance).sqrt().item() for _, variance, signal in moments]
    print(f"IWAE, {name}, {SAMPLES} samples: signal to noise", *(f"{r:.3f}" for r in ratios))
    right.loglog(SAMPLES, ratios, "o-", label=name)
left.set(xlabel="steps", ylabel="ELBO, nats per datum", title="Training with each estimator")
right.set(xlabel="samples per datum", ylabel="IWAE: |mean| / sd of the encoder's gradient")
_ = left.legend(), right.legend()
figure.savefig("gradient_estimators.png", dpi=150)
