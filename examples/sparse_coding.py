"""
Sparse coding: free codes and encoders
======================================

One dictionary model of the digits, x = W z + b + noise with most entries of z equal to zero, is
fitted in six ways, from exact codes to a free code per datum to encoders. The loss of each in log
p(x, z) is split into the part of its dictionary and the part of its codes. Then the atoms are
shown: those of the digits or, if PPL_VAE_DATA is set, of patches of FashionMNIST.
"""

# %%
import os
import sys

import torch
from torch.nn import functional as F

from ppl_vae import Autoencoder, Gaussian, digits, plots
from ppl_vae.data import image_set
from ppl_vae.evaluation import atoms
from ppl_vae.inference import fit_dictionary
from ppl_vae.lineage import run_sparse_lineage
from ppl_vae.lineage.sparse_stages import SparseSettings

SMOKE = "--smoke" in sys.argv
x, K = (digits()[::10], 70) if SMOKE else (digits(), 100)
settings = SparseSettings(steps=150, iterations=10) if SMOKE else SparseSettings()

# %%
lineage = run_sparse_lineage(
    x, latent_dim=K, penalty=10.0, noise_scale=0.1, settings=settings, seed=0
)
print(lineage)
plots.plot_sparse_lineage(lineage).figure.savefig("sparse_lineage.png", dpi=150)


# %%
def patches(num_images=2000, size=8, smallest_sd=0.15):
    """One random patch of each image, centred; patches that are nearly constant are left out."""
    images = image_set("FashionMNIST").shuffled(0).x[:num_images].reshape(-1, 1, 28, 28)
    rows = F.unfold(images, size).transpose(1, 2)
    at = torch.randint(rows.shape[1], (len(rows),), generator=torch.Generator().manual_seed(0))
    rows = rows[torch.arange(len(rows)), at].double()
    rows = rows - rows.mean(1, keepdim=True)
    return rows[rows.std(1) > smallest_sd]


autoencoder, shown, name = lineage.pairs["alternating"], torch.as_tensor(x), "digits"
if not SMOKE and "PPL_VAE_DATA" in os.environ:
    shown, name = patches(), "patches of FashionMNIST"
    autoencoder = Autoencoder.linear(
        64, K, columns="unit", prior="laplace", penalty=30.0, likelihood=Gaussian(0.1), seed=0
    ).double()
    print(fit_dictionary(autoencoder, shown))
dictionary = atoms(autoencoder, shown)
print(dictionary)
heading = f"Atoms of {name}, in decreasing order of use"
ax = plots.plot_atoms(dictionary, image_shape=(8, 8), heading=heading)
ax.figure.savefig("atoms.png", dpi=150)
