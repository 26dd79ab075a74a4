# %% [markdown]
# # A Gaussian pushed through a network
# Where z ~ N(0, I_2) lands in the plane has a density. With g(z) = z/10 + z/|z|, which is
# invertible, it is p(z) / |det dg/dz| (change of variables); with s = |z| the determinant is
# (1/10 + 1/s)/10. With G(z) = A2 relu(A1 z + b1) + b2, which is not, noise makes a density: the
# integral of N(x; G(z), sigma^2 I) p(z) dz, by quadrature over a grid of z.
# %%
import math
import sys

import matplotlib.pyplot as plt
import torch

from ppl_vae import VAE, Gaussian, log_likelihood
from ppl_vae.plots.drawing import new_axes, title

GRID, DRAWS = (40, 500) if "--smoke" in sys.argv else (120, 50_000)
network = VAE.mlp(2, 2, hidden=(16,), likelihood=Gaussian(0.1), seed=0)
for parameter in network.decoder.parameters():
    parameter.data *= 2.5


def ring_log_p(x):  # NaN, which is zero density, within the unit circle
    s = 10 * (x.norm(dim=1) - 1)
    return -s.square() / 2 - math.log(2 * math.pi / 10) - (1 / 10 + 1 / s).log()


def network_log_p(x):  # a weight for each z of a grid, and the noise around each G(z)
    at = torch.linspace(-5, 5, GRID)
    z = torch.cartesian_prod(at, at)
    weight = -z.square().sum(1) / 2 - math.log(2 * math.pi) + 2 * math.log(10 / (GRID - 1))
    px = network.decode(z)
    return torch.cat([(px.log_prob(row[:, None]) + weight).logsumexp(1) for row in x.split(99)])


# %%
x = network.sample(200, seed=0)
drawn = log_likelihood(network.model, network.guide, x, DRAWS, method="prior", seed=0)
print(f"log p of 200 draws: {network_log_p(x).mean():.3f} nats per datum, by quadrature")
print(f"                    {drawn.mean:.3f}, by {DRAWS} draws of z")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.4), layout="constrained")
for ax, log_p in zip(axes, (network_log_p, ring_log_p), strict=True):
    middle, half = (x.mean(0), 2.6) if ax is axes[0] else (torch.zeros(2), 1.8)
    across, down = (torch.linspace(float(m) - half, float(m) + half, GRID) for m in middle)
    mass = log_p(torch.cartesian_prod(across, down)).exp().nan_to_num().reshape(GRID, GRID)
    share = float(mass.sum()) * (2 * half / (GRID - 1)) ** 2
    print(f"the picture holds {share:.3f} of the mass")
    shade = ax.pcolormesh(*(v.numpy() for v in (across, down, mass.mT)), cmap="Blues")
    figure.colorbar(shade, ax=ax, label="density, 1 / unit of x squared")
    new_axes(ax).set(xlabel="$x_1$, units of x", ylabel="$x_2$, units of x", aspect="equal")
title(axes[0], "A relu network's, with noise of 0.1")
title(axes[1], "The ring's, exactly")
figure.savefig("pushforward.png", dpi=150)
print("wrote pushforward.png")
