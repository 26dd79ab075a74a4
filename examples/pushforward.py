r"""
The density of a Gaussian pushed through a network
==================================================

If z ~ N(0, I) in the plane, g(z) has a density. For :math:`g(z) = z/10 + z/|z|`, which is
invertible, it is :math:`p(z) / |\det \partial g / \partial z|`, where the determinant is
:math:`(1/10 + 1/|z|)/10`. A ReLU network is not invertible; with noise added, its density is
:math:`\int N(x; G(z), \sigma^2 I)\, p(z)\, dz`, computed here by quadrature over a grid of z.
"""

# %%
import math
import sys

import matplotlib.pyplot as plt
import torch

from ppl_vae import VAE, Gaussian, log_likelihood

GRID, SAMPLES = (60, 5000) if "--smoke" in sys.argv else (120, 50_000)
network = VAE.mlp(2, 2, hidden=(16,), likelihood=Gaussian(0.1), seed=0)
for parameter in network.decoder.parameters():
    parameter.data *= 2.5


def ring_log_p(x):  # NaN, that is density zero, inside the unit circle
    length = 10 * (x.norm(dim=1) - 1)
    return -length.square() / 2 - math.log(2 * math.pi / 10) - (1 / 10 + 1 / length).log()


def network_log_p(x):  # the sum over a grid of z of p(z) p(x given z)
    at = torch.linspace(-5, 5, GRID)
    z = torch.cartesian_prod(at, at)
    weight = -z.square().sum(1) / 2 - math.log(2 * math.pi) + 2 * math.log(10 / (GRID - 1))
    px = network.decode(z)
    return torch.cat([(px.log_prob(row[:, None]) + weight).logsumexp(1) for row in x.split(99)])


# %%
x = network.sample(200, seed=0)
estimate = log_likelihood(network.model, network.guide, x, SAMPLES, method="prior", seed=0)
exact = network_log_p(x).mean()
print(f"mean log p of 200 samples of x: {exact:.3f} nats per datum by quadrature,")
print(f"{estimate.mean:.3f} from {SAMPLES} samples of z")

# %%
# Both densities on a grid; their sums over the grid should be close to one.
figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.4), layout="constrained")
for ax, log_p in zip(axes, (network_log_p, ring_log_p), strict=True):
    middle, half = (x.mean(0), 2.6) if ax is axes[0] else (torch.zeros(2), 1.8)
    across, up = (torch.linspace(float(m) - half, float(m) + half, GRID) for m in middle)
    density = log_p(torch.cartesian_prod(across, up)).exp().nan_to_num().reshape(GRID, GRID)
    mass = float(density.sum()) * (2 * half / (GRID - 1)) ** 2
    print(f"the figure contains {mass:.3f} of the probability")
    shade = ax.pcolormesh(across.numpy(), up.numpy(), density.mT.numpy(), cmap="Blues")
    figure.colorbar(shade, ax=ax, label="density, 1 / unit of x squared")
    ax.set(xlabel="$x_1$, units of x", ylabel="$x_2$, units of x", aspect="equal")
axes[0].set_title("ReLU network with noise of 0.1")
axes[1].set_title("The ring, exact")
figure.savefig("pushforward.png", dpi=150)
