"""
Topics of docstrings
====================

A VAE whose decoder is a matrix of topics is fitted to the word counts of the docstrings of
installed packages: each document is a mixture of topics, and its words are multinomial.
Interpolation between two documents changes their proportions gradually.
"""

# %%
import importlib
import inspect
import sys
from functools import partial

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch.optim.lr_scheduler import CosineAnnealingLR

import ppl_vae as pv
from ppl_vae.data import count_words
from ppl_vae.evaluation import encode, interpolate
from ppl_vae.models import top_words, topic_vae
from ppl_vae.plots import plot_topic_interpolation

EPOCHS, K = 30 if "--smoke" in sys.argv else 100, 10
MODULES = "numpy numpy.linalg sklearn.metrics matplotlib.pyplot torch.nn torch.nn.functional"
MODULES += " torch.distributions scipy.stats scipy.signal scipy.optimize scipy.special"
texts = {}
for module in MODULES.split():
    for name, value in sorted(vars(importlib.import_module(module)).items()):
        text = inspect.getdoc(value) if name[0] != "_" and callable(value) else ""
        if text and len(text.split()) >= 40 and text not in texts.values():
            texts[f"{module}.{name}"] = text
counts = count_words(texts, max_words=800)
print(counts)
rows, rows_test = train_test_split(np.arange(len(counts.names)), test_size=0.15, random_state=0)
x, x_test = counts.counts[rows], counts.counts[rows_test]
# %%
vae = topic_vae(x.shape[1], K, seed=0).center(x)
fit = partial(pv.fit_svi, batch_size=100, lr=0.02, scheduler=CosineAnnealingLR, seed=0)
print(fit(vae.model, vae.guide, x, epochs=EPOCHS, warmup=EPOCHS * 5))
print(f"log p, nats per datum, of held-out documents with {K} topics:")
print(pv.log_likelihood(vae.model, vae.guide, x_test, 500, refine=EPOCHS, seed=0))
# %%
frequencies = (x.sum(0) + 0.5) / (x.sum(0) + 0.5).sum()
topics, shares = vae.decoder.topics(), vae.decoder.proportions(encode(vae.model, vae.guide, x))
words = top_words(topics, counts.words, base=frequencies)
for k in shares.mean(0).argsort(descending=True):
    print(f"{shares[:, k].mean():5.0%}  {' '.join(words[k])}")
# %%
names = "matplotlib.pyplot.plot", "torch.nn.Conv2d"
ends = [counts.counts[[counts.names.index(name)]] for name in names]
means = interpolate(vae.model, *ends, guide=vae.guide, num_steps=9)[0]
print(f"\nfrom {names[0]} to {names[1]}:")
print(*(" ".join(line) for line in top_words(means, counts.words, 7, base=frequencies)), sep="\n")
first, last = (encode(vae.model, vae.guide, end) for end in ends)
codes = first + torch.linspace(0, 1, 9)[:, None] * (last - first)
ax = plot_topic_interpolation(vae.decoder.proportions(codes), [line[:4] for line in words], names)
ax.figure.savefig("topics.png", dpi=150)
