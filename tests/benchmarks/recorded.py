"""How soon a fit is faster than ``pyro.infer.SVI``: the first seconds of it; asserts nothing.

    python tests/benchmarks/recorded.py [--repeats 3] [--threads 2] [--seconds 3]

``fit_svi`` fits a network for this long after its start, with every choice left to it, and then
``pyro.infer.SVI`` (validation off) makes steps of the same network; the two take turns. The
milliseconds of a step at the end of the fit and their ratio to those of Pyro are printed.
"""

import argparse
import statistics
import time
import warnings

import pyro
import torch
from contenders import RATE, wait
from pyro.infer import SVI, Trace_ELBO
from timing import processor

from ppl_vae import VAE, fit_svi
from ppl_vae.core.state import validation

SHAPES = ((64, 256, 10, 256), (784, 64, 20, 128))
"""Columns, hidden units, latent dimensions and rows per step."""
NUM_DATA, PYRO_STEPS = 4096, 60
LAST_STEPS = 100
"""Steps at the end of a fit by which its speed is measured."""


class EnoughTimeError(Exception):
    """Ends a fit."""


def fitted_step(x, sizes, seconds):
    """Seconds per step at the end of the first seconds of a fit, and the steps it has made."""
    columns, hidden, latent, batch = sizes
    vae = VAE.mlp(columns, latent, hidden=(hidden,), seed=0)
    ends = []

    def stop_later(step, value):
        ends.append((step, time.perf_counter()))
        if ends[-1][1] - start > seconds:
            raise EnoughTimeError

    start = time.perf_counter()
    try:
        settings = {"steps": 10**6, "batch_size": batch, "lr": RATE, "seed": 0}
        fit_svi(vae.model, vae.guide, x, progress=stop_later, **settings)
    except EnoughTimeError:
        pass
    last, end = ends[-1]
    first, begin = max((e for e in ends if e[0] <= last - LAST_STEPS), default=ends[0])
    return (end - begin) / (last - first), last


def pyro_step(x, sizes):
    """Seconds per step of ``pyro.infer.SVI`` with the same network."""
    columns, hidden, latent, batch = sizes
    vae = VAE.mlp(columns, latent, hidden=(hidden,), seed=0)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": RATE}), Trace_ELBO())
    rows = [torch.randperm(len(x))[:batch] for _ in range(PYRO_STEPS)]
    with validation(False):
        svi.step(x[rows[0]])
        start = time.perf_counter()
        for some in rows:
            svi.step(x[some])
        wait(x.device)
    pyro.clear_param_store()
    return (time.perf_counter() - start) / len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{processor()}, {given.threads} threads, torch {torch.__version__}")
    for sizes in SHAPES:
        x = torch.rand(NUM_DATA, sizes[0], generator=torch.Generator().manual_seed(0))
        fitted_step(x, sizes, 4 * given.seconds)  # imports what the first fit of a process needs
        fitted, others, made = [], [], []
        for _ in range(given.repeats):
            seconds, steps = fitted_step(x, sizes, given.seconds)
            fitted.append(seconds)
            made.append(steps)
            others.append(pyro_step(x, sizes))
        here, there = statistics.median(fitted), statistics.median(others)
        print(
            f"{'-'.join(map(str, sizes[:3]))}, batch {sizes[3]}: {1e3 * here:.2f} ms per step "
            f"after {given.seconds:g} s ({statistics.median(made):g} steps), pyro.infer.SVI "
            f"{1e3 * there:.2f}: {there / here:.2f} times as fast",
            flush=True,
        )


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
