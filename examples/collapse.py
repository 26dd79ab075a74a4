# %% [markdown]
# # Posterior collapse that theory predicts
# PPCA with noise variance s2 has no use for an axis whose eigenvalue is at most s2. The largest
# eigenvalue of the digits (in 0..1) is 0.699: with sigma = 1, as a bare squared error assumes,
# every axis should collapse, and a VAE obeys. With sigma learned, they come back.
# %%
import sys

import matplotlib.pyplot as plt
import torch

from ppl_vae import VAE, Gaussian, collapse, digits, fit_svi, spectrum
from ppl_vae.plots import lineage as plots

EPOCHS = 3 if "--smoke" in sys.argv else 150
LATENT_DIM = 8
x = digits()

# %%
kl, noise = {}, {}
for name, likelihood in {"sigma = 1": Gaussian(1.0), "sigma learned": Gaussian("shared")}.items():
    shape = {"hidden": (64,), "likelihood": likelihood, "seed": 0}
    vae = VAE.mlp(data_dim=64, latent_dim=LATENT_DIM, **shape)
    fit_svi(vae.model, vae.guide, x, epochs=EPOCHS, batch_size=150, lr=3e-3, seed=0)
    codes = collapse(vae.model, vae.guide, x, seed=0)
    print(f"{name}: {codes}")
    kl[name] = codes.kl_by_dimension
    with torch.no_grad():
        noise[name] = float(vae.likelihood.scale) ** 2

# %%
found = spectrum(x, LATENT_DIM, noise)
print(f"largest eigenvalue of the digits: {found.eigenvalues[0]:.3f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.2), layout="constrained")
plots.spectrum(found, axes[0])
plots.kl_by_dimension(kl, axes[1])
figure.savefig("collapse.png", dpi=150)
print("wrote collapse.png")
