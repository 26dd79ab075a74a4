# %% [markdown]
# # Sparse codes: who finds them, and what that costs
# One dictionary model of the digits, x = W z + b + noise with most z_k zero, learned in six ways:
# from exact codes over a free code per datum to encoders. What each loses in log p(x, z) is its
# dictionary's part and its codes' part. Then the atoms, of the digits or, if PPL_VAE_DATA is set,
# of patches of FashionMNIST.
# %%
import os
import sys

import torch
from torch.nn import functional as F

from ppl_vae import Autoencoder, Gaussian, digits, fit_dictionary, image_set, run_sparse_lineage
from ppl_vae.evaluation.latent_space.atoms import atoms
from ppl_vae.lineage.sparse_stages import SparseSettings
from ppl_vae.plots import dictionary as dictionary_plots

SMOKE = "--smoke" in sys.argv
x, K = (digits()[::10], 70) if SMOKE else (digits(), 100)
settings = SparseSettings(steps=20, iterations=5) if SMOKE else SparseSettings()

# %%
ladder = run_sparse_lineage(
    x, latent_dim=K, penalty=10.0, noise_scale=0.1, settings=settings, seed=0
)
print(ladder)
dictionary_plots.plot_sparse_lineage(ladder).figure.savefig("plot_sparse_lineage.png", dpi=150)


# %%
def patches(num_images: int = 2000, size: int = 8, least: float = 0.15) -> torch.Tensor:
    """One patch at random of each image, less its mean; flat ones are left out."""
    images = image_set("FashionMNIST").shuffled(0).x[:num_images].reshape(-1, 1, 28, 28)
    rows = F.unfold(images, size).transpose(1, 2)
    at = torch.randint(rows.shape[1], (len(rows),), generator=torch.Generator().manual_seed(0))
    rows = rows[torch.arange(len(rows)), at].double()
    rows = rows - rows.mean(1, keepdim=True)
    return rows[rows.std(1) > least]


# %%
autoencoder, shown, name = ladder.pairs["alternating"], torch.as_tensor(x), "digits"
if not SMOKE and "PPL_VAE_DATA" in os.environ:
    shown, name = patches(), "patches of FashionMNIST"
    how = {"columns": "unit", "prior": "laplace", "likelihood": Gaussian(0.1), "seed": 0}
    autoencoder = Autoencoder.linear(64, K, penalty=30.0, **how).double()
    print(fit_dictionary(autoencoder, shown))
used = atoms(autoencoder, shown)
print(used)
heading = f"Atoms of {name}, the most used first"
drawn = dictionary_plots.atoms(used, image_shape=(8, 8), heading=heading)
drawn.figure.savefig("atoms.png", dpi=150)
print("wrote sparse_ladder.png and atoms.png")
