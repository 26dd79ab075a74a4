# %% [markdown]
# # Topics of docstrings
# A VAE whose decoder is a matrix of topics, fitted to the docstrings of installed packages: each
# document is a mixture of topics, and its word counts are multinomial. Interpolation between two
# documents changes topics gradually.
# %%
import importlib
import inspect
import sys

import numpy as np
from sklearn.model_selection import train_test_split
from torch.optim.lr_scheduler import CosineAnnealingLR

import ppl_vae as pv
from ppl_vae.evaluation.latent_space.traversal import interpolate, interpolate_codes
from ppl_vae.evaluation.prediction.predictive import encode
from ppl_vae.plots.topics import gradation

EPOCHS = 2 if "--smoke" in sys.argv else 100
K = 10
MODULES = "numpy numpy.linalg sklearn.metrics matplotlib.pyplot torch.nn torch.nn.functional"
MODULES += " torch.distributions scipy.stats scipy.signal scipy.optimize scipy.special"


def docstrings(modules, min_words=40):
    """Docstrings of the public functions and classes of modules, by name; repeated ones once."""
    found = {}
    for module in modules:
        for name, value in sorted(vars(importlib.import_module(module)).items()):
            text = inspect.getdoc(value) or "" if callable(value) and name[0] != "_" else ""
            if len(text.split()) >= min_words and text not in found.values():
                found[f"{module}.{name}"] = text
    return found


found = pv.count_words(docstrings(MODULES.split()), max_words=800)
print(found)
rows, rows_test = train_test_split(np.arange(len(found.names)), test_size=0.15, random_state=0)
x, x_test = found.counts[rows], found.counts[rows_test]

# %%
vae = pv.topic_vae(x.shape[1], K, seed=0).center(x)
fit = pv.fit_svi(
    vae.model,
    vae.guide,
    x,
    epochs=EPOCHS,
    batch_size=100,
    lr=0.02,
    scheduler=CosineAnnealingLR,
    warmup=EPOCHS * 5,
    seed=0,
)
print(fit)
base = (x.sum(0) + 0.5) / (x.sum(0) + 0.5).sum()
alone = pv.Multinomial()(base.log().expand(len(x_test), -1), x_test).log_prob(x_test)
print(f"held out, one topic for all: {alone.mean():.2f} nats per datum; {K} topics:")
print(pv.log_likelihood(vae.model, vae.guide, x_test, 500, refine=EPOCHS, seed=0))

# %%
shares = vae.decoder.proportions(encode(vae.model, vae.guide, x)).mean(0)
topics = vae.decoder.topics()
print("\nshare  topic")
for k in shares.argsort(descending=True):
    print(
        f"{shares[k]:5.0%}  {' '.join(pv.top_words(topics[k : k + 1], found.words, base=base)[0])}"
    )

# %%
names = "matplotlib.pyplot.plot", "torch.nn.Conv2d"
ends = [found.counts[[found.names.index(name)]] for name in names]
expected_counts = interpolate(vae.model, *ends, guide=vae.guide, num_steps=9)[0]
lines = pv.top_words(expected_counts, found.words, 7, base=base)
codes = interpolate_codes(*(encode(vae.model, vae.guide, x) for x in ends), 9)[0]
shares = vae.decoder.proportions(codes)
print(f"\nfrom {names[0]} to {names[1]}: shares of their main topics, and words")
for share, line in zip(shares[:, shares[[0, -1]].argmax(1)], lines, strict=True):
    print(f"{share[0]:5.0%}{share[1]:5.0%}  {' '.join(line)}")
words = pv.top_words(topics, found.words, 4, base=base)
gradation(shares, words, names).figure.savefig("topics.png", dpi=150)
print("wrote topics.png")
