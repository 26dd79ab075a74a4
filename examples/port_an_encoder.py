"""
Porting a VAE from plain PyTorch
================================

A VAE is written and trained in plain PyTorch, and its weights are copied into a pair. The two
heads of the encoder, means and log-variances, become one layer that has the rows of both.
"""

# %%
import math
import sys

import matplotlib.pyplot as plt
import torch
from torch import nn

from ppl_vae import VAE, Gaussian, digits, log_likelihood

EPOCHS, SAMPLES, REFINE = (60, 100, 50) if "--smoke" in sys.argv else (150, 1000, 150)
D, K, HIDDEN, SIGMA = 64, 8, 128, 0.15
torch.manual_seed(0)
x_train, x_test = torch.as_tensor(digits()).float()[torch.randperm(1797)].split([1500, 297])
body = nn.Sequential(nn.Linear(D, HIDDEN), nn.ReLU())
mean_head, log_variance_head = nn.Linear(HIDDEN, K), nn.Linear(HIDDEN, K)
decoder = nn.Sequential(nn.Linear(K, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, D))
networks = nn.ModuleList([body, mean_head, log_variance_head, decoder])


def elbo(x, noise):  # per datum, with the KL in closed form
    hidden = body(x)
    mean, log_variance = mean_head(hidden), log_variance_head(hidden)
    error = (x - decoder(mean + (log_variance / 2).exp() * noise)) / SIGMA
    log_p = -(error.square() / 2 + math.log(SIGMA) + math.log(2 * math.pi) / 2).sum(-1)
    return log_p - (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1) / 2


adam = torch.optim.Adam(networks.parameters(), lr=2e-3)
for _ in range(EPOCHS):
    for rows in torch.randperm(len(x_train)).split(150):
        adam.zero_grad()
        (-elbo(x_train[rows], torch.randn(len(rows), K)).mean()).backward()
        adam.step()
# %%
vae = VAE.mlp(D, K, hidden=(HIDDEN,), likelihood=Gaussian(SIGMA))
first, second = mean_head.state_dict(), log_variance_head.state_dict()
last = {part: torch.cat([first[part], second[part]]) for part in first}
vae.decoder.load_state_dict(decoder.state_dict())
vae.guide.encoder[0].load_state_dict(body[0].state_dict())
vae.guide.encoder[2].load_state_dict(last)
# %%
# For the same noise both have the same ELBO for each datum, compared here in double precision.
vae, x_test, _ = vae.double(), x_test.double(), networks.double()
with torch.no_grad():
    noise, q, prior = torch.randn_like(x_test[:, :K]), vae.guide.distribution(x_test), vae.prior()
    kl = torch.distributions.kl_divergence(q, prior.expand([len(x_test)]))
    ported = vae.likelihood(vae.decoder(q.mean + q.stddev * noise)).log_prob(x_test) - kl
    by_hand = elbo(x_test, noise)
print(f"ELBO {by_hand.mean():.4f} in plain PyTorch, {ported.mean():.4f} nats per datum ported")
print(f"largest difference over the data: {(ported - by_hand).abs().max():.1e} nats")
ax = plt.figure(figsize=(4.4, 4), layout="constrained").gca()
ax.plot(by_hand, ported, ".")
ax.set(xlabel="ELBO in plain PyTorch, nats", ylabel="ELBO ported, nats", title="Each held-out row")
print(log_likelihood(vae.model, vae.guide, x_test, SAMPLES, refine=REFINE, seed=0))
