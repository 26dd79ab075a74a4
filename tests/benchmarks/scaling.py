"""Fits by several processes: the messages that they exchange, and their speed on two cores.

Run it as ``python tests/benchmarks/scaling.py`` on a machine that does nothing else; it takes
about three minutes. Two processes fit a few rows while the package counts their messages, whose
sizes depend on the numbers of columns and latent dimensions only; what each of 64 processes sends
follows from these. Then the same work is timed on one process and on two, each with one thread.
"""

import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / name) for name in ("helpers", "distributed")]

import torch
from workers import Workers

from ppl_vae import PPCA, VAE, Bernoulli, fit_closed_form, fit_em, fit_svi
from ppl_vae.core import MessageLog, Processes, record_messages

COLUMNS, LATENT, RANKS = 1000, 50, 64
REPETITIONS = 3
"""Each time is the median of this number of measurements, of one and of two processes in turn."""
PASS_ROWS, PASS_COLUMNS = 200_000, 500
SVI_ROWS, SVI_WIDTHS, SVI_BATCH = 4096, (784, 1000, 20), 1024
FIRST_STEPS, SVI_STEPS = 5, 30


def rows(number, missing):
    generator = torch.Generator().manual_seed(Processes.current().rank)
    x = torch.randn(number // 2, COLUMNS, generator=generator, dtype=torch.float64)
    x[torch.rand(x.shape, generator=generator) < missing] = torch.nan
    return x


def fit(kind, iterations):
    with record_messages() as log:
        if kind == "closed form":
            x = rows(1400, 0.0)  # more than 1,000, so that a scatter matrix is summed
            fit_closed_form(PPCA(COLUMNS, LATENT, seed=0).double(), x)
        elif kind == "EM":
            x = rows(200, 0.05)
            fit_em(PPCA(COLUMNS, LATENT, seed=0).double(), x, max_iterations=iterations)
        else:
            x = torch.randn(256, COLUMNS, generator=torch.Generator().manual_seed(0))
            vae = VAE.like(x, LATENT, hidden=(500,), seed=0)
            steps = {"steps": iterations, "batch_size": 128, "capture": False}
            fit_svi(vae.model, vae.guide, x, seed=0, progress=False, **steps)
    return Counter(log.counts)


def count_messages():
    workers = Workers(2)
    for kind in ("closed form", "EM", "SVI"):
        few = workers.run(fit, kind, 2)[0]
        log = MessageLog(few)
        if kind != "closed form":
            more = workers.run(fit, kind, 4)[0]
            per_two = more - few
            log = MessageLog(Counter({key: n / 2 for key, n in per_two.items()}))
        sent = log.sent_bytes(RANKS) / 1e6
        per = "in all" if kind == "closed form" else "per iteration"
        print(f"{kind}: {sent:.1f} MB sent by each of {RANKS} processes, {per}")
        for (name, size), number in sorted(log.counts.items(), key=lambda item: -item[0][1]):
            print(f"  {name:9} {size / 1e6:12.6f} MB x {number:g}")
    workers.close()


def seconds_of_pass():
    """One pass over X'X by a closed-form fit of complete data, in float32."""
    own = Processes.current().share(PASS_ROWS)
    generator = torch.Generator().manual_seed(own.start)
    x = torch.randn(own.stop - own.start, PASS_COLUMNS, generator=generator)
    ppca = PPCA(PASS_COLUMNS, 10, seed=0)
    start = time.perf_counter()
    fit_closed_form(ppca, x)
    return time.perf_counter() - start


def seconds_of_steps(capture):
    """Steps of SVI after the first ones, which have costs of their own."""
    columns, hidden, latent = SVI_WIDTHS
    x = torch.rand(SVI_ROWS, columns, generator=torch.Generator().manual_seed(0)).round()
    vae = VAE.like(x, latent, hidden=(hidden,), likelihood=Bernoulli(), seed=0)
    found = fit_svi(
        vae.model, vae.guide, x,
        steps=FIRST_STEPS + SVI_STEPS, batch_size=SVI_BATCH, seed=0, capture=capture,
        progress=False,
    )  # fmt: skip
    return float(found.elapsed[-1] - found.elapsed[FIRST_STEPS - 1])


def measure_speed():
    groups = {number: Workers(number) for number in (1, 2)}
    widths = "-".join(map(str, SVI_WIDTHS))
    svi = f"{SVI_STEPS} steps of SVI, a VAE {widths}, batches of {SVI_BATCH:,}"
    measurements = {
        f"pass over X'X, {PASS_ROWS:,} x {PASS_COLUMNS}": (seconds_of_pass,),
        f"{svi}, eager": (seconds_of_steps, False),
        f"{svi}, recorded": (seconds_of_steps, "recorded"),
    }
    for name, (function, *args) in measurements.items():
        times = {number: [] for number in groups}
        for _ in range(REPETITIONS):
            for number, workers in groups.items():
                times[number].append(max(workers.run(function, *args)))
        one, two = (statistics.median(times[number]) for number in groups)
        print(f"{name}: {one:.2f} s on one process, {two:.2f} s on two: {one / two:.2f} times")
    for workers in groups.values():
        workers.close()


def main():
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # of the processes
    count_messages()
    measure_speed()


if __name__ == "__main__":
    main()
