r"""
Rank-k reconstructions
======================

PCA keeps k axes of the data, and each image becomes the mean plus a sum of k terms. The fraction
of the variance that is kept grows quickly with k. The posterior mean of PPCA uses the same axes
and shrinks the coordinates by the factor :math:`1 - \sigma^2 / \lambda_i`, because a code is not
known exactly; as a density, each k has a log-likelihood, which can be compared on held-out data.
"""

# %%
import sys

import torch

from ppl_vae import PPCA, digits, fit_closed_form, plots
from ppl_vae.data import ImageGrid

RANKS = (1, 2, 5, 10, 20) if "--smoke" in sys.argv else (1, 2, 5, 10, 20, 40, 55)
order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
x, x_test = torch.as_tensor(digits())[order].split([1500, 297])
total = (x_test - x.mean(0)).square().sum(1).mean()

# %%
print(" k   variance kept   held-out log p, nats per datum")
projections, means = {}, {}
for rank in RANKS:
    ppca = PPCA.like(x, latent_dim=rank)
    fit_closed_form(ppca, x)
    projections[rank] = ppca.reconstruct(x_test, shrink=False).detach()
    means[rank] = ppca.reconstruct(x_test).detach()
    kept = 1 - (projections[rank] - x_test).square().sum(1).mean() / total
    print(f"{rank:2d}{kept:15.1%}{ppca.log_likelihood(x_test).mean():26.2f}")

# %%
# Each column is one held-out digit.
rows = {f"k = {rank}": values[:10] for rank, values in projections.items()}
rows["original"] = x_test[:10]
columns = [str(k) for k in range(10)]
grid = ImageGrid.of(torch.stack(list(rows.values())), list(rows), columns, x, (8, 8))
ax = plots.plot_reconstructions(grid, heading="Rank-k reconstructions of held-out digits")
ax.set_ylabel("rank")
ax.figure.savefig("rank_k_reconstructions.png", dpi=150)

# %%
# The projection of PCA and the posterior mean of PPCA for the smallest rank.
rank = RANKS[0]
difference = (projections[rank] - means[rank]).square().sum(1).mean()
print(f"k = {rank}: projection and posterior mean differ by {difference:.2g} (squared, per datum)")
print("wrote rank_k_reconstructions.png")
