"""How cost grows with N, D, K, S and H: fitted slopes on logarithmic axes; asserts nothing.

    python tests/benchmarks/growth.py [--repeats 5] [--out FOLDER]

Each curve varies one size and keeps the others. The CPU seconds of one thread are the least of
the repetitions, and the slope is that of a least-squares line through the logarithms of the upper
half of the sizes, where constant costs matter least: 1 is linear growth. A table is printed, and
written with a picture to --out.
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from contenders import RATE
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from timing import processor

from ppl_vae import PPCA, VAE, fit_closed_form, fit_em, fit_svi, log_likelihood

MISSING, EM_ITERATIONS, SVI_STEPS, BATCH = 0.1, 3, 40, 128


def data(num_data, data_dim, missing=0.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_data, data_dim, generator=generator)
    x[torch.rand(x.shape, generator=generator) < missing] = torch.nan
    return x


def closed_form(N=20_000, D=100, K=10):
    x, ppca = data(N, D), PPCA(D, K, seed=0)
    return lambda: fit_closed_form(ppca, x)


def em(N=2000, D=50, K=10):
    x, ppca = data(N, D, MISSING), PPCA(D, K, seed=0)
    # A tolerance of zero is never met, so that all iterations are made.
    return lambda: fit_em(ppca, x, max_iterations=EM_ITERATIONS, tol=0.0)


def svi(N=1024, D=64, K=10, H=128):
    x, vae = data(N, D), VAE.mlp(D, K, hidden=(H,), seed=0)
    settings = {"batch_size": BATCH, "lr": RATE, "seed": 0, "capture": False}
    return lambda: fit_svi(vae.model, vae.guide, x, steps=SVI_STEPS, progress=False, **settings)


def importance(N=64, S=256, D=64, K=10, H=128):
    x, vae = data(N, D), VAE.mlp(D, K, hidden=(H,), seed=0)
    return lambda: log_likelihood(vae.model, vae.guide, x, num_samples=S, seed=0)


CURVES = (
    ("closed form of PPCA", closed_form, "N", (10_000, 20_000, 40_000, 80_000)),
    ("closed form of PPCA", closed_form, "D", (50, 100, 200, 400)),
    ("EM with missing values", em, "N", (500, 1000, 2000, 4000)),
    ("EM with missing values", em, "D", (25, 50, 100, 200)),
    ("EM with missing values", em, "K", (4, 8, 16, 32)),
    ("steps of SVI", svi, "D", (128, 512, 2048, 4096)),
    ("steps of SVI", svi, "K", (4, 16, 64, 256)),
    ("steps of SVI", svi, "H", (64, 256, 1024, 2048)),
    ("importance sampling", importance, "N", (32, 64, 128, 256)),
    ("importance sampling", importance, "S", (128, 256, 512, 1024)),
)


def cpu_seconds(run, repeats):
    """The least CPU time of a call, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def fitted_slope(sizes, seconds):
    """The slope of the logarithms over the upper half of the sizes."""
    upper = slice(len(sizes) // 2 - 1, None)
    return float(np.polyfit(np.log(sizes[upper]), np.log(seconds[upper]), 1)[0])


def measure(repeats):
    """A row per curve: what, the size that varies, the sizes, the seconds and the slope."""
    rows = []
    for what, make, size, sizes in CURVES:
        seconds = [cpu_seconds(make(**{size: value}), repeats) for value in sizes]
        rows.append((what, size, sizes, seconds, fitted_slope(sizes, seconds)))
        text = ", ".join(f"{1e3 * s:.1f}" for s in seconds)
        name, values = f"{what}, {size}", ", ".join(f"{value:,}" for value in sizes)
        print(f"{name:28s} {values:32s} {text:36s} slope {rows[-1][-1]:.2f}", flush=True)
    return rows


def draw(rows, path):
    """A panel per varied size, with logarithmic axes."""
    names = list(dict.fromkeys(size for _, size, *_ in rows))
    figure = Figure(figsize=(3.2 * len(names), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for what, size, sizes, seconds, slope in rows:
            if size == name:
                panel.plot(sizes, seconds, "o-", label=f"{what}: {slope:.2f}")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel(name)
        panel.legend(fontsize=7, title="slope", title_fontsize=7)
        panel.grid(color="#e6e6e6")
    panels[0].set_ylabel("CPU seconds of one thread")
    figure.savefig(path, dpi=120)


def table(rows):
    """The rows in Markdown."""
    lines = ["| | varied | milliseconds | slope |", "|---|---|---|---|"]
    for what, size, sizes, seconds, slope in rows:
        values = ", ".join(f"{value:,}" for value in sizes)
        times = ", ".join(f"{1e3 * s:.1f}" for s in seconds)
        lines.append(f"| {what} | {size} = {values} | {times} | {slope:.2f} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor()}, 1 thread, torch {torch.__version__}; milliseconds of CPU time")
    rows = measure(given.repeats)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "growth.md").write_text(table(rows))
        draw(rows, given.out / "growth.png")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
