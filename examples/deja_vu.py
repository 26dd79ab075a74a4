# %% [markdown]
# # VAE limit: an autoencoder is a VAE whose q is a point
# With q = N(f(x), I) the KL of a VAE is |f(x)|^2 / 2: its loss is that of an autoencoder which is
# penalised for long codes, with noise put on the code. As sigma_q goes to zero the noise goes.
# One pair of networks from one start, trained as an autoencoder and as VAEs of fixed widths.
# %%
import sys

import matplotlib.pyplot as plt
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import Autoencoder, Gaussian, digits, fit_svi, log_likelihood, vae_limit
from ppl_vae.data.image_grid import ImageGrid
from ppl_vae.plots import images as tile_plots
from ppl_vae.plots.vae_limit import vae_limit as draw_deja_vu

STEPS, DRAWS, REFINE = (30, 50, 5) if "--smoke" in sys.argv else (3000, 1000, 150)
x, x_test = torch.as_tensor(digits()[:1500]).float(), digits()[1500:]
how = {"hidden": (128,), "activation": "gelu", "likelihood": Gaussian(0.2), "prior": "normal"}
start = Autoencoder.mlp(64, 10, **how, seed=0).center(x)
pairs = {"point": start} | {f"{width:g}": start.as_vae(width) for width in (0.01, 0.1, 0.3, 1.0)}
# %% Trained side by side. H[q] is left out of the losses: no parameter stands in it.
told = {"steps": STEPS, "batch_size": 200, "lr": 3e-3, "scheduler": CosineAnnealingLR, "seed": 0}
print("sigma_q  loss at last  squared error  |f(x)|  held-out log p, nats per datum")
for name, pair in pairs.items():
    fit = fit_svi(pair.model, pair.guide, x, **told)
    width = 0.0 if name == "point" else float(name)
    entropy = 0.0 if not width else 10 * (1.41894 + torch.tensor(width).log().item())
    error = (pair.reconstruct(x_test) - torch.as_tensor(x_test)).square().sum(1).mean()
    length = pair.features(x_test).norm(dim=1).mean()
    given = "    none: a point has no density"
    if width:
        est = log_likelihood(pair.model, pair.guide, x_test, DRAWS, refine=REFINE, seed=0)
        given = f"{est.mean:8.2f} ± {est.mean_error:.2f}, {est.share_reliable:.0%} reliable"
    loss = -fit.objective[-100:].mean() + entropy
    print(f"{name:7s}{loss:14.2f}{error:15.3f}{length:8.2f}  {given}")
# %% The autoencoder's own networks, seen as VAEs.
widths = (1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
seen = vae_limit(pairs["point"].double(), x, scales=widths, seed=0)
print(seen)
draw_deja_vu(seen).figure.savefig("vae_limit.png", dpi=150)
# %% What each makes of draws from the prior: an autoencoder has not learned to generate.
z = torch.randn(10, 10, generator=torch.Generator().manual_seed(1))
drawn = torch.stack([pair.decode(z).mean for pair in pairs.values()])
image_grid = ImageGrid.of(drawn, list(pairs), [str(k + 1) for k in range(10)], x, (8, 8))
ax = tile_plots.samples(image_grid)
ax.set(ylabel="sigma_q", xlabel="draw of z from N(0, I)", title="")
ax.set_title("Decoded means of draws from the prior", loc="left", fontsize=11)
ax.figure.savefig("deja_vu_draws.png", dpi=150)
plt.close("all")
print("wrote deja_vu.png and deja_vu_draws.png")
