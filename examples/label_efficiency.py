"""
The value of an encoder trained without labels
==============================================

Autoencoders are trained on the digits without their classes. Then 50 labels are drawn, ten times.
Four classifiers are compared: a network initialised with the encoder and fine-tuned, the same
network from random weights, a linear head on the frozen encoder, and logistic regression.
Differences are paired over the draws of labels.
"""

# %%
import sys

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from ppl_vae import Autoencoder, digits, fit_svi, plots
from ppl_vae.evaluation import label_efficiency
from ppl_vae.interop import FeatureTransformer
from ppl_vae.networks import GaussianNoise

SMOKE = "--smoke" in sys.argv
EPOCHS, SEEDS, STEPS = (30, range(5), 100) if SMOKE else (200, range(10), 300)
order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
x, labels = torch.as_tensor(digits(), dtype=torch.float32)[order], load_digits().target[order]
x, x_val, x_test = x[:1200], x[1200:1297], x[1297:]
y, y_test = labels[:1200], labels[1297:]

# %%
for name, noise in (("autoencoder", None), ("denoising autoencoder", GaussianNoise(0.3))):
    pair = Autoencoder.mlp(64, 32, hidden=(128,), corruption=noise, seed=0).center(x)
    fit = fit_svi(
        pair.model, pair.guide, x, x_val=x_val, epochs=EPOCHS, batch_size=100, lr=2e-3, seed=0
    )
    comparison = label_efficiency(
        pair, x, y, x_test, y_test, num_labels=50, seeds=SEEDS, steps=STEPS
    )
    print(f"{name}: {fit}\n{comparison}\n")
plots.plot_label_efficiency(comparison).savefig("label_efficiency.png", dpi=150)

# %%
# The codes of the same pair in a scikit-learn pipeline, with all labels; the pair is not changed.
pipe = make_pipeline(FeatureTransformer(pair), LogisticRegression(max_iter=5000)).fit(x, y)
pixels = LogisticRegression(max_iter=5000).fit(x, y)
print(f"all {len(y)} labels, logistic regression on 32 codes: {pipe.score(x_test, y_test):.1%};")
print(f"on 64 pixels: {pixels.score(x_test, y_test):.1%}\nwrote label_efficiency.png")
