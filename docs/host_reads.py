"""Where the host waits for an accelerator: ``python docs/host_reads.py`` writes ``host_reads.md``.

Each algorithm runs on the pretended accelerator of the tests at two lengths. The difference of the
two counts is what a step, an iteration or a datum adds; the rest occurs once.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGE = DOCS / "host_reads.md"
sys.path.append(str(DOCS.parent / "tests" / "helpers"))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import oracles  # noqa: E402
from ppl_vae import (  # noqa: E402
    PPCA,
    VAE,
    collapse,
    elbo,
    fit_closed_form,
    fit_em,
    fit_svi,
    gaps,
    log_likelihood,
)
from ppl_vae.evaluation import Annealing  # noqa: E402
from pretend_device import count_waits, pretended_device  # noqa: E402

N, D, K = 40, 6, 2
HEAD = """# Reads of values from an accelerator

This page is written by `python docs/host_reads.py`, which counts on the pretended accelerator of
the tests how often the host waits: for a value that it reads, or until numbers of its own are
written. The table has {num_rows} rows and {num_columns} columns. "Per unit" is what one more step,
iteration or row adds, "once" what each call needs apart from that: checks of the arguments, and
results that are returned on the CPU. `fit_svi` reads its objective after each epoch of at least 25
steps, or else after 50 steps. Of a table of several blocks, numbers of a block occur for each.

| algorithm | unit | per unit | once | in this run |
|---|---|--:|--:|--:|
"""


@dataclass(frozen=True)
class Algorithm:
    """What is counted.

    Attributes:
        name: what the page calls it.
        unit: what its length counts.
        lengths: the two lengths of its runs.
        prepare: given a device and a length, makes what it needs, and returns what is counted.
    """

    name: str
    unit: str
    lengths: tuple[int, int]
    prepare: Callable[[torch.device, int], Callable[[], object]]


Counts = Counter[tuple[str, str, str]]
"""Numbers of waits by kind, operation and ``file:line``."""


def data(device: torch.device, missing: float = 0.0) -> Tensor:
    """A table, in which a share of the values may be missing."""
    x = oracles.simulate_ppca((4, 2), 1, N, D, seed=0)
    if missing:
        x = oracles.with_missing_values(x, missing, seed=1)
    return torch.from_numpy(x).to(device)


def vae(device: torch.device) -> VAE:
    """A pair with a nonlinear decoder."""
    return VAE.mlp(D, K, hidden=(8,), seed=0).double().to(device)


def svi(device: torch.device, steps: int) -> Callable[[], object]:
    """Steps of SVI."""
    pair, x = vae(device), data(device)
    return partial(fit_svi, pair.model, pair.guide, x, steps=steps, batch_size=16, seed=0)


def em(device: torch.device, iterations: int, missing: float = 0.0) -> Callable[[], object]:
    """Iterations of EM."""
    x = data(device, missing)
    return partial(fit_em, PPCA.like(x, K, seed=0), x, tol=0.0, max_iterations=iterations)


def best_q(device: torch.device, steps: int) -> Callable[[], object]:
    """Steps towards the best q of each datum."""
    pair, x = vae(device), data(device)[:20]
    return partial(gaps, pair.model, pair.guide, x, steps=steps, tolerance=None, seed=0)


def annealing(device: torch.device, temperatures: int) -> Callable[[], object]:
    """Temperatures of annealed importance sampling."""
    pair, x = vae(device), data(device)[:5]
    options = {"method": "annealed", "annealing": Annealing(num_temperatures=temperatures)}
    return partial(log_likelihood, pair.model, pair.guide, x, 4, seed=0, **options)


def importance(device: torch.device, rows: int) -> Callable[[], object]:
    """Rows whose log p is estimated by importance sampling."""
    pair, x = vae(device), data(device)[:rows]
    return partial(log_likelihood, pair.model, pair.guide, x, 30, seed=0, capture=False)


def of_rows(function: Any) -> Callable[[torch.device, int], Callable[[], object]]:
    """A function of a pair and rows, whose length is the number of rows."""

    def prepare(device: torch.device, rows: int) -> Callable[[], object]:
        pair, x = vae(device), data(device)[:rows]
        return partial(function, pair.model, pair.guide, x, seed=0)

    return prepare


def closed(device: torch.device, rows: int) -> Callable[[], object]:
    """Rows whose PPCA is fitted in closed form."""
    x = data(device)[:rows]
    return partial(fit_closed_form, PPCA.like(x, K, seed=0), x)


def imputed(device: torch.device, rows: int) -> Callable[[], object]:
    """Rows whose missing values PPCA imputes."""
    ppca = PPCA.like(data(device), K, seed=0)
    return partial(ppca.impute, data(device, 0.2)[:rows])


ALGORITHMS = (
    Algorithm("`fit_svi`", "step", (100, 200), svi),
    Algorithm("`fit_em`, complete data", "iteration", (6, 12), em),
    Algorithm("`fit_em`, missing values", "iteration", (6, 12), lambda d, n: em(d, n, 0.2)),
    Algorithm("`fit_closed_form`", "row", (20, 40), closed),
    Algorithm("`gaps`", "step", (10, 20), best_q),
    Algorithm("`log_likelihood`, importance sampling", "row", (20, 40), importance),
    Algorithm("`log_likelihood`, annealed", "temperature", (3, 6), annealing),
    Algorithm("`collapse`", "row", (20, 40), of_rows(collapse)),
    Algorithm("`elbo`", "row", (20, 40), of_rows(elbo)),
    Algorithm("`impute`", "row", (20, 40), imputed),
)


def counted(algorithm: Algorithm) -> tuple[Counts, Counts]:
    """The waits of the package in the shorter and in the longer run."""
    found = []
    for length in algorithm.lengths:
        with pretended_device() as device:
            call = algorithm.prepare(device, length)
            with count_waits() as waits:
                call()
        places = {(w.kind, w.operation, w.place): n for w, n in waits.items()}
        found.append(Counter({k: n for k, n in places.items() if k[2].startswith("ppl_vae/")}))
    return found[0], found[1]


def per_unit(algorithm: Algorithm, short: int, long: int) -> float:
    """What one unit more adds to a count."""
    return (long - short) / (algorithm.lengths[1] - algorithm.lengths[0])


def page() -> Iterator[str]:
    """The lines of the page."""
    yield HEAD.format(num_rows=N, num_columns=D).rstrip("\n")
    sections = []
    for algorithm in ALGORITHMS:
        short, long = counted(algorithm)
        slope = per_unit(algorithm, short.total(), long.total())
        once = short.total() - slope * algorithm.lengths[0]
        length = f"{algorithm.lengths[1]} {algorithm.unit}s: {long.total()}"
        yield f"| {algorithm.name} | {algorithm.unit} | {slope:.3g} | {once:.3g} | {length} |"
        sections.append((algorithm, short, long))
    for algorithm, short, long in sections:
        yield from section(algorithm, short, long)


def section(algorithm: Algorithm, short: Counts, long: Counts) -> Iterator[str]:
    """The places of one algorithm, most frequent first."""
    yield f"\n## {algorithm.name}\n"
    yield f"| line | wait | per {algorithm.unit} | in the longer run |\n|---|---|--:|--:|"
    rows = [(per_unit(algorithm, short[k], long[k]), long[k], *k) for k in long | short]
    for slope, number, kind, operation, place in sorted(rows, key=lambda r: (-r[0], -r[1], r[4])):
        yield f"| `{place}` | {kind}, `{operation}` | {slope:.3g} | {number} |"


def main() -> None:
    """Write the page."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    PAGE.write_text("\n".join(page()) + "\n")


if __name__ == "__main__":
    main()
