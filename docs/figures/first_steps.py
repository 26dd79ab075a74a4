"""Draw the figure of *First steps*: ``python docs/figures/first_steps.py``."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from ppl_vae import PPCA, VAE, digits, fit_em, fit_svi

STATIC = Path(__file__).parents[1] / "_static"
x, x_val, x_test = digits()[:1400], digits()[1400:1500], digits()[1500:]
ppca = PPCA.like(x, latent_dim=5, seed=0)
fit_em(ppca, x)
vae = VAE.mlp(data_dim=64, latent_dim=5, seed=0)
fit_svi(vae.model, vae.guide, x, x_val=x_val, epochs=60, batch_size=100, lr=3e-3, seed=0)

shown = torch.as_tensor(x_test[:12])
z = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
rows = {
    "held out": shown,
    "PPCA": ppca.reconstruct(shown).detach(),
    "VAE": vae.reconstruct(shown),
    "PPCA, sampled": (z.double() @ ppca.loadings.mT + ppca.loc).detach(),
    "VAE, sampled": vae.decode(z).mean.detach(),
}
figure, axes = plt.subplots(len(rows), 12, figsize=(9, 4), layout="constrained")
for line, (name, images) in zip(axes, rows.items(), strict=True):
    for ax, image in zip(line, images, strict=True):
        ax.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
    line[0].set_ylabel(name, rotation=0, ha="right", va="center")
figure.savefig(STATIC / "first_steps.png", dpi=130)
