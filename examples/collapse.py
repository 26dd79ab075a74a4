r"""
Posterior collapse as predicted by PPCA
=======================================

In PPCA with noise variance :math:`\sigma^2` the optimal loading of a principal axis is zero if
the eigenvalue of the axis is at most :math:`\sigma^2`. The largest eigenvalue of the digits
(scaled to [0, 1]) is 0.699. With sigma = 1, which a plain squared error assumes, every latent
dimension should collapse, and those of a VAE do. With sigma learned, they are used.
"""

# %%
import sys

import matplotlib.pyplot as plt
import torch

from ppl_vae import VAE, Gaussian, collapse, digits, fit_svi, plots, spectrum

EPOCHS = 40 if "--smoke" in sys.argv else 150
LATENT_DIM = 8
x = digits()

# %%
kl, noise = {}, {}
for name, likelihood in {
    "sigma = 1": Gaussian(1.0),
    "sigma learned": Gaussian("shared", initial=0.2),
}.items():
    vae = VAE.mlp(64, LATENT_DIM, hidden=(64,), likelihood=likelihood, seed=0)
    fit_svi(vae.model, vae.guide, x, epochs=EPOCHS, batch_size=150, lr=3e-3, seed=0)
    codes = collapse(vae.model, vae.guide, x, seed=0)
    print(f"{name}: {codes}")
    kl[name] = codes.kl_by_dimension
    noise[name] = torch.as_tensor(vae.likelihood.scale).item() ** 2

# %%
eigenvalues = spectrum(x, LATENT_DIM, noise)
print(f"largest eigenvalue of the digits: {eigenvalues.eigenvalues[0]:.3f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.2), layout="constrained")
plots.plot_spectrum(eigenvalues, axes[0])
plots.plot_kl_by_dimension(kl, axes[1])
figure.savefig("collapse.png", dpi=150)
print("wrote collapse.png")
