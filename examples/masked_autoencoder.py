"""
A masked autoencoder fills in digits
====================================

Given 4 of 16 patches of a held-out digit, a masked autoencoder predicts the other 12. It is
compared with the conditional mean of PPCA given the same 4 patches, which is exact. K and the
stopping time are chosen on validation digits. The network is better than PPCA after 300 epochs,
the default, and worse after the 20 of a run with ``--smoke``.
"""

# %%
import sys
from functools import partial

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import PPCA, Autoencoder, digits, fit_closed_form, fit_svi, plots
from ppl_vae.data import ImageGrid
from ppl_vae.networks import HiddenPatches

EPOCHS, DRAWS, LARGEST = (20, 2, 31) if "--smoke" in sys.argv else (300, 10, 61)
order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
x, x_val, x_test = torch.as_tensor(digits()).float()[order].split([1297, 200, 300])
patches = HiddenPatches((1, 8, 8), patch=2, share=0.75)


def squared_error(fill, rows, first_seed):
    """The squared error per hidden pixel of each digit, over several draws of the mask."""
    masks = [patches.visible(len(rows), seed=first_seed + draw) for draw in range(DRAWS)]
    errors = [(fill(rows, mask) - rows)[~mask].reshape(len(rows), -1) for mask in masks]
    return torch.stack(errors).square().mean((0, 2))


def fill_by_ppca(latent_dim):
    ppca = PPCA.like(x.double(), latent_dim)
    fit_closed_form(ppca, x)
    return lambda rows, mask: ppca.impute(rows, mask=mask).mean


scores = {K: squared_error(fill_by_ppca(K), x_val, 0).mean().item() for K in range(1, LARGEST)}
best = min(scores, key=scores.get)
# %%
masked = Autoencoder.masked((1, 8, 8), 2, width=32, depth=2, decoder_width=32, seed=0).center(x)
fit = partial(fit_svi, batch_size=100, lr=2e-3, scheduler=CosineAnnealingLR, seed=0)
print(fit(masked.model, masked.guide, x, x_val=x_val, epochs=EPOCHS))
# %%
by_ppca = fill_by_ppca(best)
errors = squared_error(by_ppca, x_test, 100)
difference = squared_error(lambda rows, m: masked.reconstruct(rows, mask=m), x_test, 100) - errors
standard_error = difference.std() / len(difference) ** 0.5
print(f"squared error per hidden pixel, PPCA with K = {best}: {errors.mean():.5f}")
print(f"masked autoencoder minus PPCA: {difference.mean():+.5f} ± {standard_error:.5f}")
# %%
rows, mask = x_test[:8], patches.visible(8, seed=0)
fills = [by_ppca(rows, mask), masked.reconstruct(rows, mask=mask)]
shown = torch.stack([rows.where(mask, torch.nan), *(rows.where(mask, f) for f in fills), rows])
names = "observed", f"PPCA (K = {best})", "masked", "original"
grid = ImageGrid.of(shown, names, list("12345678"), x, (8, 8))
ax = plots.plot_reconstructions(grid, heading="Held-out digits from 4 of 16 patches")
ax.figure.savefig("masked_autoencoder.png", dpi=150)
