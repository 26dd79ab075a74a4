# %% [markdown]
# # What docstrings are about
# Words of the docstrings of installed packages, counted, and a VAE whose decoder is a table of
# topics: z is a point on their simplex, and the words are multinomial given the document's length.
# Between two documents the words change by degrees.
# %%
import sys

import numpy as np
from sklearn.model_selection import train_test_split
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import (
    Multinomial,
    count_words,
    docstrings,
    fit_svi,
    log_likelihood,
    top_words,
    topic_vae,
)
from ppl_vae.evaluation.predictive import encode
from ppl_vae.evaluation.traversal import interpolate

EPOCHS = 2 if "--smoke" in sys.argv else 100
K = 10
MODULES = (
    "torch.nn",
    "torch.nn.functional",
    "torch.distributions",
    "numpy",
    "numpy.linalg",
    "scipy.stats",
    "scipy.signal",
    "scipy.optimize",
    "scipy.special",
    "sklearn.metrics",
    "matplotlib.pyplot",
)
found = count_words(docstrings(*MODULES), max_words=800)
print(found)
rows, rows_test = train_test_split(np.arange(len(found.names)), test_size=0.15, random_state=0)
x, x_test = found.counts[rows], found.counts[rows_test]

# %%
vae = topic_vae(x.shape[1], K, seed=0).center(x)
how = {"batch_size": 100, "lr": 0.02, "scheduler": CosineAnnealingLR, "seed": 0}
print(fit_svi(vae.model, vae.guide, x, epochs=EPOCHS, warmup=EPOCHS * 5, **how))
base = (x.sum(0) + 0.5) / (x.sum(0) + 0.5).sum()
alone = Multinomial()(base.log().expand(len(x_test), -1), x_test).log_prob(x_test)
print(f"held out, one topic for all: {alone.mean():.2f} nats a datum; {K} topics:")
print(log_likelihood(vae.model, vae.guide, x_test, 500, seed=0))

# %%
shares = vae.decoder.proportions(encode(vae.model, vae.guide, x)).mean(0)
topics = vae.decoder.topics()
print("\nshare  topic")
for k in shares.argsort(descending=True):
    print(f"{shares[k]:5.0%}  {' '.join(top_words(topics[k : k + 1], found.words, base=base)[0])}")

# %%
names = "matplotlib.pyplot.plot", "torch.nn.Conv2d"
ends = [found.counts[[found.names.index(name)]] for name in names]
way = interpolate(vae.model, *ends, guide=vae.guide, num_steps=7)[0]
print(f"\nfrom {names[0]}")
for line in top_words(way, found.words, base=base):
    print("   ", " ".join(line))
print(f"to {names[1]}")
