"""
Reconstruction against KL
=========================

The ELBO is a reconstruction term minus a KL term, and beta weighs the second. With a small beta
the codes are far from the prior, so that samples from the prior decode to nothing in particular;
below some beta the KL still grows while reconstructions hardly improve. With a large beta every
q(z given x) is the prior and carries no information. The mixture of all q(z given x) should match
the prior, whose 95 % circle is drawn.
"""

# %%
import sys
from functools import partial

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import ELBO, VAE, Gaussian, digits, fit_svi

EPOCHS = 20 if "--smoke" in sys.argv else 150
x, labels = torch.as_tensor(digits(), dtype=torch.float32), load_digits().target
fit = partial(fit_svi, epochs=EPOCHS, batch_size=100, lr=3e-3, seed=0, capture=False)
SHOWN = (0.0001, 0.02, 1.0)

# %%
# The decoder's sigma is 1, so that the loss is half the squared error plus beta times the KL.
figure, axes = plt.subplots(2, 2, figsize=(9, 8.4), layout="constrained")
curve, panels = axes[0, 0], dict(zip(SHOWN, axes.flat[1:], strict=True))
print("   beta   squared error   KL, nats per datum")
for beta in (0.0001, 0.001, 0.005, 0.02, 0.1, 0.3, 1.0):
    vae = VAE.mlp(64, 2, hidden=(128, 64), likelihood=Gaussian(1.0), seed=0)
    fit(vae.model, vae.guide, x, objective=ELBO(beta=beta), scheduler=CosineAnnealingLR)
    error = (vae.reconstruct(x) - x).square().sum(1).mean().item()
    kl = ELBO().terms(vae.model, vae.guide, x)[1].mean().item()
    print(f"{beta:7g}{error:16.3f}{kl:21.2f}")
    curve.plot(kl, error, "o", color="tab:blue")
    curve.annotate(f"{beta:g}", (kl, error), (6, 4), textcoords="offset points")
    if beta in panels:
        torch.manual_seed(0)
        codes = vae.guide.distribution(x).sample()  # one sample of z per datum
        ax = panels[beta]
        points = ax.scatter(*codes.T, c=labels, s=5, cmap="tab10")
        ax.add_patch(plt.Circle((0, 0), 2.4477, fill=False, ls=":"))
        ax.set(xlabel="$z_1$", ylabel="$z_2$", title=f"q(z given x) at beta = {beta:g}")
        ax.set_aspect("equal", "datalim")
curve.set(xlabel="KL, nats per datum", ylabel="squared error per datum", ylim=0)
curve.set_title("The trade-off; beta at each point")
figure.colorbar(points, ax=axes[:, 1], label="digit", ticks=range(10))
figure.savefig("rate_and_distortion.png", dpi=150)
print("wrote rate_and_distortion.png")
