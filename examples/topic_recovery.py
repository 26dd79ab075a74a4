# %% [markdown]
# # Recovering known topics
# Documents are simulated from latent Dirichlet allocation, and a VAE with a topic decoder is
# fitted to their word counts. Each fitted topic is matched to a true one by the cosine of the two.
# %%
import sys

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize

import ppl_vae as pv

EPOCHS = 2 if "--smoke" in sys.argv else 100
N, D, K = 500, 100, 5
rng = np.random.default_rng(0)
topics = rng.dirichlet(np.full(D, 0.1), K)
proportions = rng.dirichlet(np.full(K, 0.3), N)
counts = rng.multinomial(1 + rng.poisson(99, N), proportions @ topics)
x = torch.as_tensor(counts, dtype=torch.float32)

# %%
vae = pv.topic_vae(D, K, seed=0).center(x)
fit = pv.fit_svi(
    vae.model, vae.guide, x, epochs=EPOCHS, batch_size=100, lr=0.03, warmup=EPOCHS * 5 // 2, seed=0
)
print(f"objective of the last step: {fit.objective[-1]:.2f} nats per datum")

# %%
cosines = normalize(torch.as_tensor(topics)) @ normalize(vae.decoder.topics().double()).mT
true, fitted = linear_sum_assignment(-cosines.numpy())
print("cosine of each true topic with its match:", cosines[true, fitted].numpy().round(3))
