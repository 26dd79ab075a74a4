"""
Recovery of simulated topics
============================

Documents are simulated from latent Dirichlet allocation, and a VAE with a topic decoder is fitted
to their word counts. Each fitted topic is matched to a true one by the cosine of the two.
"""

# %%
import sys
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize

from ppl_vae import fit_svi
from ppl_vae.models import topic_vae

EPOCHS = 60 if "--smoke" in sys.argv else 100
N, D, K = 500, 100, 5
rng = np.random.default_rng(0)
topics = rng.dirichlet(np.full(D, 0.1), K)
proportions = rng.dirichlet(np.full(K, 0.3), N)
counts = rng.multinomial(1 + rng.poisson(99, N), proportions @ topics)
x = torch.as_tensor(counts, dtype=torch.float32)

# %%
vae = topic_vae(D, K, seed=0).center(x)
fit = partial(fit_svi, batch_size=100, lr=0.03, warmup=EPOCHS * 5 // 2, seed=0)
result = fit(vae.model, vae.guide, x, epochs=EPOCHS)
print(f"objective of the last step: {result.objective[-1]:.2f} nats per datum")

# %%
cosines = normalize(torch.as_tensor(topics)) @ normalize(vae.decoder.topics().double()).mT
true, fitted = linear_sum_assignment(-cosines.numpy())
print("cosine of each true topic with its match:", cosines[true, fitted].numpy().round(3))

# %%
ax = plt.figure(figsize=(5, 4), layout="constrained").gca()
image = ax.imshow(cosines[:, fitted].numpy(), vmin=0, vmax=1, cmap="Blues")
ax.set(xlabel="fitted topic, matched", ylabel="true topic", title="Cosines of topics")
ax.figure.colorbar(image, ax=ax, label="cosine")
ax.figure.savefig("topic_recovery.png", dpi=150)
