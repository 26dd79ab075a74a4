# %% [markdown]
# # Probabilistic PCA, fitted in four ways
# The same model and the same data; only the algorithm differs. The closed form says how far each
# is from the best there is.
# %%
import sys

from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import (
    PPCA,
    AmortizedGuide,
    ExactGuide,
    digits,
    fit_closed_form,
    fit_em,
    fit_svi,
    mlp,
    subspace,
)

STEPS = 200 if "--smoke" in sys.argv else 3000
K = 5
x = digits()
best = PPCA.like(x, K)
fit_closed_form(best, x)

# %% [markdown]
# EM and PX-EM climb in closed-form steps; SVI climbs by gradients, with the exact posterior as its
# guide, or with a linear encoder that has to learn it.
# %%
fits = {}
for name, accelerate in (("EM", False), ("PX-EM", True)):
    model = PPCA.like(x, K, seed=0)
    fits[name] = model, fit_em(model, x, accelerate=accelerate)

svi = {"steps": STEPS, "batch_size": 256, "lr": 1e-2, "scheduler": CosineAnnealingLR, "seed": 0}
model = PPCA.like(x, K, seed=0)
fits["SVI, exact guide"] = model, fit_svi(model.model, ExactGuide(model), x, **svi)

model = PPCA.like(x, K, seed=0)
guide = AmortizedGuide(mlp(x.shape[1], K, seed=0), K, homoscedastic=True)
fits["SVI, linear encoder"] = model, fit_svi(model.model, guide, x, **svi)

# %%
top = best.log_likelihood(x).mean().item()
print(f"closed form: log p {top:.4f} nats per datum, sigma {best.noise_scale.item():.4f}\n")
print(f"{'algorithm':20s} {'below it':>9s} {'angle':>8s} {'steps':>6s} {'seconds':>8s}")
for name, (model, fit) in fits.items():
    below = top - model.log_likelihood(x).mean().item()
    angle = subspace(best, model).largest_angle
    print(f"{name:20s} {below:9.6f} {angle:7.3f}° {fit.steps:6d} {fit.seconds:8.2f}")
