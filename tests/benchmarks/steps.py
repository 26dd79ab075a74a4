"""Time of a training step of a VAE by several ways, side by side in one run; asserts nothing.

    python tests/benchmarks/steps.py [--hidden 64 400] [--batch 128] [--repeats 9] [--out FILE]

Every contender trains the same network (784-H-20-H-784, Gaussian with a shared scale, Adam) on the
same rows. Repetitions are interleaved; medians and their ratios to ``pyro.infer.SVI`` are printed.
"""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from ppl_vae import ELBO, VAE
from ppl_vae.inference.capture import Captured
from ppl_vae.inference.parameters import find_parameters
from ppl_vae.inference.steps import Batch, Update, WeightedObjective
from ppl_vae.program import modules_of
from ppl_vae.state import isolated_store, validation

STEPS = 40
NUM_DATA = 4096
REFERENCE = "pyro.infer.SVI, TraceMeanField_ELBO"


def vae_of(hidden):
    return VAE.mlp(784, 20, hidden=(hidden,), seed=0)


def stock(loss, checked):
    """``pyro.infer.SVI``, with its argument checks or without."""

    def make(x, rows, hidden):
        vae = vae_of(hidden)
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss())

        def run():
            with validation(checked):
                for some in rows:
                    svi.step(x[some])

        return run

    return make


def ours(unroll):
    """The step of ``fit_svi``: eager (0), or captured with so many steps a call."""

    def make(x, rows, hidden):
        vae = vae_of(hidden)
        batch = Batch(vae.model, vae.guide, WeightedObjective(ELBO(), None), x, None)
        named = find_parameters(vae.model, vae.guide, lambda: batch.value(rows[0], 1))
        modules = modules_of(vae.model, vae.guide)
        update = Update(named, modules, 1e-3, torch.optim.Adam, None)
        fast = Captured(batch, update, named, unroll) if unroll else None

        def run():
            with isolated_store(), validation(False):
                for start in range(0, len(rows), max(unroll, 1)):
                    if fast is None:
                        update.apply(batch.value(rows[start], 1), rows[start])
                    else:
                        fast.leap(rows[start : start + unroll], start)

        return run

    return make


CONTENDERS = {
    REFERENCE: stock(TraceMeanField_ELBO, False),
    "pyro.infer.SVI, TraceMeanField_ELBO, validating": stock(TraceMeanField_ELBO, True),
    "pyro.infer.SVI, Trace_ELBO": stock(Trace_ELBO, False),
    "fit_svi, eager": ours(0),
    "fit_svi, captured, 1 step a call": ours(1),
    "fit_svi, captured, 8 steps a call": ours(8),
}


def measured(hidden, batch_size, repeats):
    """Milliseconds a step, and seconds that the first call took, by contender."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(NUM_DATA, 784, generator=generator)
    rows = [torch.randperm(NUM_DATA, generator=generator)[:batch_size] for _ in range(STEPS)]
    runs, first, times = {}, {}, {name: [] for name in CONTENDERS}
    for name, make in CONTENDERS.items():
        begun = time.perf_counter()
        runs[name] = make(x, rows, hidden)
        runs[name]()
        first[name] = time.perf_counter() - begun
    for _ in range(repeats):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begun) / STEPS)
    return {name: statistics.median(values) for name, values in times.items()}, first


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 400])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results = {}
    for hidden in given.hidden:
        medians, first = measured(hidden, given.batch, given.repeats)
        results[f"784-{hidden}-20"] = {"milliseconds": medians, "first call, s": first}
        print(f"\n784-{hidden}-20, batch {given.batch}, {given.threads} threads")
        print(f"{'':50s}{'ms a step':>10s}{'times as fast':>15s}{'first call, s':>15s}")
        for name, median in medians.items():
            ratio = medians[REFERENCE] / median
            print(f"{name:50s}{median:10.2f}{ratio:15.2f}{first[name]:15.1f}")
    if given.out:
        given.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
