# %% [markdown]
# # Three quarters of a digit hidden
# From 4 of 16 patches the others are filled in: by a masked autoencoder, and by PPCA's conditional
# mean given the same 4, which is exact; its K and the moment to stop by validation digits.
# %%
import sys

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import PPCA, Autoencoder, HiddenPatches, digits, fit_closed_form, fit_svi
from ppl_vae.data.image_grid import ImageGrid
from ppl_vae.plots import images as tile_plots

EPOCHS, DRAWS, MOST = (2, 2, 4) if "--smoke" in sys.argv else (300, 10, 61)
order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
x, x_val, x_test = torch.as_tensor(digits()).float()[order].split([1297, 200, 300])
patch_mask = HiddenPatches((1, 8, 8), patch=2, share=0.75)


def error(fill, rows, first_seed):
    """The squared error a hidden cell of each digit, over several draws of what is hidden."""
    masks = [patch_mask.visible(len(rows), seed=first_seed + draw) for draw in range(DRAWS)]
    missed = [(fill(rows, m) - rows)[~m].reshape(len(rows), -1) for m in masks]
    return torch.stack(missed).square().mean((0, 2))


def by_ppca(latent_dim):
    ppca = PPCA.like(x.double(), latent_dim)
    fit_closed_form(ppca, x)
    return lambda rows, seen: ppca.impute(rows, mask=seen).mean


scores = {K: error(by_ppca(K), x_val, 0).mean().item() for K in range(1, MOST)}
best = min(scores, key=scores.get)
# %%
masked = Autoencoder.masked((1, 8, 8), 2, width=32, depth=2, decoder_width=32, seed=0).center(x)
how = {"epochs": EPOCHS, "batch_size": 100, "lr": 2e-3, "scheduler": CosineAnnealingLR, "seed": 0}
print(fit_svi(masked.model, masked.guide, x, x_val=x_val, **how))
# %%
fills = {
    f"PPCA (K = {best})": by_ppca(best),
    "masked": lambda rows, seen: masked.reconstruct(rows, mask=seen),
}
errors = {name: error(fill, x_test, 100) for name, fill in fills.items()}
text = (f"{name} {each.mean():.5f}" for name, each in errors.items())
print("squared error a hidden cell of held-out digits (cells in [0, 1]):", ", ".join(text))
off = errors["masked"] - errors[f"PPCA (K = {best})"]
print(f"masked - PPCA: {off.mean():+.5f} +- {off.std() / len(off) ** 0.5:.5f} (standard error)")
# %%
rows, seen = x_test[:8], patch_mask.visible(8, seed=0)
filled = [torch.where(seen, rows, fill(rows, seen)) for fill in fills.values()]
shown = torch.stack([rows.where(seen, torch.nan), *filled, rows])
down = "not seen", f"by PPCA (K = {best})", "by masked", "true"
image_grid = ImageGrid.of(shown, down, list(map(str, range(8))), x, (8, 8))
ax = tile_plots.reconstructions(
    image_grid, heading="Held-out digits, filled in from 4 of 16 patches"
)
ax.set_ylabel("hidden cells")
ax.figure.savefig("masked_autoencoder.png", dpi=150)
print("wrote masked_autoencoder.png")
