"""
An autoencoder is the limit of a VAE
====================================

With :math:`q = N(f(x), s^2 I)` the KL of a VAE is :math:`|f(x)|^2 / 2` plus a constant: its loss
is that of an autoencoder with an L2 penalty on the code and with noise added to the code. As s
goes to zero, the noise vanishes. One pair of networks is trained from one start as an autoencoder
and as VAEs of fixed widths s.
"""

# %%
import sys
from functools import partial

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import Autoencoder, Gaussian, digits, fit_svi, log_likelihood, plots
from ppl_vae.data import ImageGrid
from ppl_vae.evaluation import vae_limit

STEPS, DRAWS, REFINE = (500, 200, 20) if "--smoke" in sys.argv else (3000, 1000, 150)
x, x_test = torch.as_tensor(digits()[:1500]).float(), torch.as_tensor(digits()[1500:])
network = partial(Autoencoder.mlp, 64, 10, hidden=(128,), activation="gelu")
start = network(likelihood=Gaussian(0.2), prior="normal", seed=0).center(x)
pairs = {"point": start} | {f"{width:g}": start.as_vae(width) for width in (0.01, 0.1, 0.3, 1.0)}
# %%
# The entropy of q is left out of the losses, since no parameter enters it.
fit = partial(fit_svi, steps=STEPS, batch_size=200, lr=3e-3, scheduler=CosineAnnealingLR, seed=0)
print("      s  final loss  squared error  |f(x)|  held-out log p, nats per datum")
for name, pair in pairs.items():
    trained = fit(pair.model, pair.guide, x)
    entropy, held_out = 0.0, "    none: a point mass has no density"
    if name != "point":
        entropy = 10 * (1.41894 + torch.tensor(float(name)).log().item())
        est = log_likelihood(pair.model, pair.guide, x_test, DRAWS, refine=REFINE, seed=0)
        held_out = f"{est.mean:8.2f} ± {est.mean_error:.2f}, {est.share_reliable:.0%} reliable"
    error = (pair.reconstruct(x_test) - x_test).square().sum(1).mean()
    length = pair.features(x_test).norm(dim=1).mean()
    loss = -trained.objective[-100:].mean() + entropy
    print(f"{name:>7s}{loss:12.2f}{error:15.3f}{length:8.2f}  {held_out}")
# %%
# The loss of the autoencoder's own networks, read as VAEs of decreasing width.
widths = (1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
limit = vae_limit(pairs["point"].double(), x, scales=widths, seed=0)
print(limit)
plots.plot_vae_limit(limit).figure.savefig("vae_limit.png", dpi=150)
# %%
# Decoded samples from the prior: an autoencoder has not learned to generate.
z = torch.randn(10, 10, generator=torch.Generator().manual_seed(1))
means = torch.stack([pair.decode(z).mean for pair in pairs.values()])
grid = ImageGrid.of(means, list(pairs), [str(k + 1) for k in range(10)], x, (8, 8))
ax = plots.plot_samples(grid)
ax.set(ylabel="s", xlabel="sample of z from N(0, I)")
ax.set_title("Decoded samples from the prior", loc="left", fontsize=11)
ax.figure.savefig("vae_limit_samples.png", dpi=150)
print("wrote vae_limit.png and vae_limit_samples.png")
