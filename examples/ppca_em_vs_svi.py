"""
Probabilistic PCA by EM, PX-EM and SVI
======================================

One model and one data set; only the algorithm differs. The closed form gives the maximum of the
likelihood, so the distance of each fit from it is known.
"""

# %%
import sys

import matplotlib.pyplot as plt
from torch.optim.lr_scheduler import CosineAnnealingLR

import ppl_vae as pv

STEPS = 1000 if "--smoke" in sys.argv else 3000
K = 5
x = pv.digits()
best = pv.PPCA.like(x, K)
pv.fit_closed_form(best, x)

# %%
# EM and PX-EM have closed-form steps. SVI follows stochastic gradients, either with the exact
# posterior as its guide or with a linear encoder, which is fitted together with the model.


def fit_by_svi(model, guide):
    return pv.fit_svi(
        model.model,
        guide,
        x,
        steps=STEPS,
        batch_size=256,
        lr=1e-2,
        scheduler=CosineAnnealingLR,
        seed=0,
    )


models = {name: pv.PPCA.like(x, K, seed=0) for name in ("EM", "PX-EM", "SVI", "SVI, amortized")}
linear = pv.AmortizedGuide(pv.mlp(x.shape[1], K, seed=0), K, homoscedastic=True)
fits = {
    "EM": pv.fit_em(models["EM"], x, accelerate=False),
    "PX-EM": pv.fit_em(models["PX-EM"], x),
    "SVI": fit_by_svi(models["SVI"], pv.ExactGuide(models["SVI"])),
    "SVI, amortized": fit_by_svi(models["SVI, amortized"], linear),
}

# %%
maximum = best.log_likelihood(x).mean().item()
print(f"closed form: log p {maximum:.4f} nats per datum, sigma {best.noise_scale.item():.4f}\n")
print(f"{'algorithm':20s} {'below it':>9s} {'angle':>8s} {'steps':>6s} {'seconds':>8s}")
ax = plt.figure(figsize=(6.4, 4.2), layout="constrained").gca()
for name, fit in fits.items():
    below = maximum - models[name].log_likelihood(x).mean().item()
    angle = pv.evaluation.subspace(best, models[name]).largest_angle
    print(f"{name:20s} {below:9.6f} {angle:7.3f}° {fit.steps:6d} {fit.seconds:8.2f}")
    ax.plot(range(1, 1 + len(fit.objective)), fit.objective, lw=1, label=name)
ax.axhline(maximum, color="black", ls=":", lw=1, label="maximum")
ax.set(xscale="log", xlabel="E- and M-steps, or steps of SVI", ylim=(maximum - 40, maximum + 5))
ax.set_ylabel("objective, nats per datum")
ax.legend()
ax.figure.savefig("ppca_em_vs_svi.png", dpi=150)
