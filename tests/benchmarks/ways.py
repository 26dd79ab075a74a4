"""Whether ``capture="auto"`` loses time: fits of several lengths by each way; asserts nothing.

    python tests/benchmarks/ways.py [--steps 100 1000 10000 100000] [--seconds 25] [--threads 1]
        [--shape 64 256 10 256]

Fits run eagerly, recorded, compiled (the fit waits for the compiler), and with every choice left
to ``fit_svi``, each in a process of its own with an empty cache of the compiler. A fit is stopped
after some seconds; what was left is then extrapolated from its last steps, which is stated by an
asterisk. The time of "auto" is printed as a multiple of that of the best single way.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings

import torch
from contenders import RATE
from timing import processor

from ppl_vae import VAE, fit_svi

WAYS = {"eager": False, "recorded": "recorded", "compiled": True, "auto": "auto"}
SHAPES = ((64, 256, 10, 256), (784, 64, 20, 128))
NUM_DATA, LAST_STEPS = 4096, 200


class EnoughTimeError(Exception):
    """Ends a fit."""


def ends_of_steps(way, shape, steps, seconds):
    """Pairs of the number of a step and the seconds until its end, of a fit by one way."""
    columns, hidden, latent, batch = shape
    x = torch.rand(NUM_DATA, columns, generator=torch.Generator().manual_seed(0))
    vae = VAE.mlp(columns, latent, hidden=(hidden,), seed=0)
    ends = []

    def note(step, value):
        ends.append((step, time.perf_counter() - start))
        # Compiled fits have a long first call, after which steps are measured, too.
        if ends[-1][1] > seconds and step > LAST_STEPS:
            raise EnoughTimeError

    settings = {"steps": steps, "batch_size": batch, "lr": RATE, "seed": 0}
    start = time.perf_counter()
    try:
        found = fit_svi(vae.model, vae.guide, x, capture=WAYS[way], progress=note, **settings)
        ends.append((steps, time.perf_counter() - start))
        return ends, found.execution
    except EnoughTimeError:
        return ends, ""


def total_of(ends, steps):
    """Seconds of a fit of this number of steps, and whether they are extrapolated."""
    reached = [seconds for step, seconds in ends if step >= steps]
    if reached:
        return reached[0], False
    last, end = ends[-1]
    first, begin = max((e for e in ends if e[0] <= last - LAST_STEPS), default=ends[0])
    return end + (steps - last) * (end - begin) / (last - first), True


def measured(way, shape, steps, given):
    """The ends of steps of a fit in a process of its own."""
    arguments = ["--way", way, "--steps", str(steps), "--seconds", str(given.seconds)]
    shape_arguments = ["--shape", *map(str, shape), "--threads", str(given.threads)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, *arguments, *shape_arguments],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
            capture_output=True,
            text=True,
            check=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


def compare(shape, given):
    """Print the times of all fits of one network."""
    print(f"{'-'.join(map(str, shape[:3]))}, batch {shape[3]}: seconds", flush=True)
    single = {}
    for way in ("eager", "recorded", "compiled"):
        single[way], _ = measured(way, shape, max(given.steps), given)
    for steps in given.steps:
        ends, execution = measured("auto", shape, steps, given)
        totals = {way: total_of(found, steps) for way, found in single.items()}
        totals["auto"] = total_of(ends, steps)
        best = min(total for way, (total, _) in totals.items() if way != "auto")
        cells = "  ".join(f"{w} {t:.1f}{'*' * far}" for w, (t, far) in totals.items())
        ratio = totals["auto"][0] / best
        print(
            f"  {steps:7d} steps: {cells}: {ratio:.2f} times the best  ({execution})", flush=True
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", type=int, nargs=4)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.way:
        print(json.dumps(ends_of_steps(given.way, given.shape, given.steps[0], given.seconds)))
        return
    print(f"{processor()}, {given.threads} threads, torch {torch.__version__}")
    print("* extrapolated from the last measured steps")
    for shape in [tuple(given.shape)] if given.shape else SHAPES:
        compare(shape, given)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
