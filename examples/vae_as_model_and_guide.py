"""
A VAE is a model and a guide
============================

``vae.model`` and ``vae.guide`` are Pyro programs like any other: Pyro's own ``SVI`` and
``Predictive`` take them. The package is needed only for the evaluation at the end.
"""

# %%
import sys

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO

from ppl_vae import VAE, digits, gaps, log_likelihood

EPOCHS = 40 if "--smoke" in sys.argv else 150
pyro.set_rng_seed(0)
x = torch.as_tensor(digits(), dtype=torch.float32)[torch.randperm(1797)]
x_train, x_test = x[:1500], x[1500:]

# %%
vae = VAE.mlp(data_dim=64, latent_dim=8)
svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), TraceMeanField_ELBO())
for epoch in range(EPOCHS):
    loss = 0.0
    for rows in torch.randperm(len(x_train)).split(150):
        loss += svi.step(x_train[rows]) / len(x_train)
    if epoch % 25 == 0 or epoch == EPOCHS - 1:
        print(f"epoch {epoch + 1:3d}: ELBO {-loss:7.2f} nats per datum")

# %%
# The prior predictive runs the model alone. The posterior predictive runs the model on the
# guide's samples of z and draws x again (``observe=False``).
new = Predictive(vae.model, num_samples=1)(num_data=9)["x"][0]
again = Predictive(vae.model, guide=vae.guide, num_samples=100)(x_test[:5], observe=False)["x"]
print(f"\n{tuple(new.shape)} new digits; {tuple(again.shape)} replicates of five test digits")
shown = torch.cat([x_test[:5], again.mean(0), new[:5].detach()])
axes = plt.figure(figsize=(5, 3.2), layout="constrained").subplots(3, 5)
for ax, image in zip(axes.flat, shown, strict=True):
    ax.imshow(image.detach().reshape(8, 8).numpy(), cmap="gray_r")
    ax.set(xticks=[], yticks=[])
for ax, name in zip(axes[:, 0], ("test digit", "replicates,\nmean", "sample"), strict=True):
    ax.set_ylabel(name)
axes[0, 0].figure.savefig("vae_as_model_and_guide.png", dpi=150)
print(f"sigma {vae.likelihood.scale.item():.3f}")

# %%
# The ELBO of held-out digits is a lower bound on their log-likelihood. Importance sampling
# estimates the log-likelihood itself, and the gap between the two is split into its causes.
plain = log_likelihood(vae.model, vae.guide, x_test, 1000, seed=0)
refined = log_likelihood(vae.model, vae.guide, x_test, 1000, refine=150, seed=0)
print(f"\nthe guide as the proposal\n{plain}\n\na proposal refined for each digit\n{refined}\n")
print(gaps(vae.model, vae.guide, x_test, seed=0, steps=150))
