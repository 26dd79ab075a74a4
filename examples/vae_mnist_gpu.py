# %% [markdown]
# # A VAE on MNIST, on a GPU if there is one
# Pixels are binarized once by a fair coin of their grey value, so that a Bernoulli decoder is a
# density. MNIST comes from the folder PPL_VAE_DATA (`MNIST/raw/*.gz`), else from torchvision,
# which downloads it to `data`. `--smoke` runs on a few made-up images, without data.
# %%
import gzip
import os
import sys
from pathlib import Path

import torch
from torchvision.datasets import MNIST

from ppl_vae import VAE, Bernoulli, fit_svi, log_likelihood
from ppl_vae.evaluation.predictive import draw_data, reconstruct
from ppl_vae.report import tile_plots
from ppl_vae.tiles import Tiles

SMOKE = "--smoke" in sys.argv
EPOCHS, NUM_SCORED, DRAWS, REFINE = (2, 20, 100, 5) if SMOKE else (50, 500, 1000, 200)


def grey(part):  # (N, 784), in 0..1
    if SMOKE:
        smooth = torch.nn.functional.interpolate(
            torch.rand(300, 1, 4, 4), (28, 28), mode="bicubic"
        )
        return smooth.clamp(0, 1).flatten(1)
    if "PPL_VAE_DATA" in os.environ:
        name = {"train": "train", "test": "t10k"}[part] + "-images-idx3-ubyte.gz"
        content = gzip.decompress(
            (Path(os.environ["PPL_VAE_DATA"]) / "MNIST/raw" / name).read_bytes()
        )
        return torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8).reshape(-1, 784) / 255
    return MNIST("data", train=part == "train", download=True).data.flatten(1) / 255


torch.manual_seed(0)
x, x_test = (grey(part).bernoulli() for part in ("train", "test"))
x, x_val = x[: -len(x) // 10], x[-len(x) // 10 :]
# %%
vae = VAE.mlp(784, 20, hidden=(400,), likelihood=Bernoulli(), seed=0)
how = {"epochs": EPOCHS, "batch_size": 128, "patience": 10, "device": "auto", "seed": 0}
fit = fit_svi(vae.model, vae.guide, x, x_val=x_val, **how)
device = next(vae.parameters()).device
print(f"{fit}\n{fit.steps / fit.seconds:.0f} steps a second on {device}")
# %%
scored = x_test[torch.randperm(len(x_test))[:NUM_SCORED]]
print(log_likelihood(vae.model, vae.guide, scored, DRAWS, refine=REFINE, seed=0))

# %%
rows = {"held out": scored[:8], "rebuilt": reconstruct(vae.model, vae.guide, scored[:8]).cpu()}
rows["drawn"] = draw_data(vae.model, scored[:8], seed=0).cpu()
tiles = Tiles.of(torch.stack(list(rows.values())), list(rows), "12345678", x[:1000], (28, 28))
picture = tile_plots.reconstructions(tiles)
picture.set(xlabel="number of the image or draw", ylabel="")
picture.figure.savefig("vae_mnist.png", dpi=150)
print("wrote vae_mnist.png")
