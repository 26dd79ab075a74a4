"""What only a real accelerator can show, in one table and under eight minutes; asserts nothing.

    python tests/benchmarks/gpu.py [--device cuda] [--seconds 450] [--size full] [--out FILE]

Each part runs in a process of its own with a limit of time, so that one that fails or hangs leaves
the others alone: the tests marked ``cuda``; compiled steps beside stock Pyro and NumPyro;
importance sampling at S = 5,000; PPCA of 5 million rows; a VAE on MNIST. The table says of each
measurement what it gave, or what failed and why.
"""

import argparse
import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contenders
import importance
import numpyro_contenders
import torch
from timing import rounds

from ppl_vae import PPCA, VAE, elbo, fit_closed_form, fit_em, fit_svi
from ppl_vae.core.devices.accelerators import current_accelerator, synchronize
from ppl_vae.likelihoods import Bernoulli

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Size:
    """How much each part does.

    Attributes:
        shapes: (H, batch) of the steps of a 784-H-20 VAE.
        steps: steps of one repetition; a multiple of the steps per call.
        unroll: steps per call of compiled code.
        repeats: repetitions, which take turns.
        sampling: data, draws and H of importance sampling.
        ppca: rows, columns and K.
        mnist: rows, H and epochs.
    """

    shapes: tuple[tuple[int, int], ...] = ((400, 128), (400, 1024), (1000, 8192))
    steps: int = 64
    unroll: int = 8
    repeats: int = 5
    sampling: tuple[int, int, int] = (10_000, 5_000, 400)
    ppca: tuple[int, int, int] = (5_000_000, 100, 20)
    mnist: tuple[int, int, int] = (60_000, 400, 20)


TINY = Size(((8, 16),), 2, 1, 1, (4, 64, 8), (200, 6, 2), (64, 8, 1))
SIZES = {
    "full": Size(),
    "cpu": Size(((400, 128),), 16, 8, 2, (40, 5_000, 400), (300_000, 100, 20), (10_000, 400, 1)),
    "tiny": TINY,
}
"""For an accelerator; what a CPU does in four minutes; and what tries the script."""
COMPILED = ("by hand, torch.compile", "log weights, compiled")
"""Ways that need a compiler, which a pretended accelerator has not."""
Row = dict[str, str]


def row(part: str, what: str, value: str) -> Row:
    """One line of the table."""
    return {"part": part, "measured": what, "value": value}


def reason(error: BaseException) -> str:
    """The type of an error and the first line of its message, as the table has it."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"failed: {type(error).__name__}: {first[:160]}"


def cuda_tests(size: Size, device: torch.device) -> list[Row]:
    """The tests marked ``cuda``, with the names of those that fail."""
    if device.type != "cuda":
        return [row("tests", "pytest -m cuda", f"not run: the device is a {device.type}")]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-n0", "-q", "--tb=line", "-rf"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    failed = [
        row("tests", line.split(" - ")[0], line.split(" - ")[-1])
        for line in lines
        if line.startswith("FAILED")
    ]
    return [row("tests", "pytest -m cuda", lines[-1] if lines else done.stderr[-160:]), *failed]


def step_makers(size: Size, device: torch.device) -> dict[str, Callable[..., Any]]:
    """Ways to make the same steps; NumPyro is one where it is installed."""
    compiled = device.type == "cuda"  # a pretended accelerator has no compiler
    makers = {
        contenders.REFERENCE: contenders.TRAINING[contenders.REFERENCE],
        "fit_svi, eager": contenders.ours(0),
        "fit_svi, compiled": contenders.ours(size.unroll, compiled=compiled),
    }
    return makers | (numpyro_contenders.TRAINING if compiled else {})


def steps(size: Size, device: torch.device) -> list[Row]:
    """Milliseconds of a training step, and how many times as fast as stock Pyro."""
    found = []
    for hidden, batch in size.shapes:
        part = f"784-{hidden}-20, batch {batch}"
        x = torch.rand(2 * batch, 784, device=device)
        rows = [torch.randperm(len(x), device=device)[:batch] for _ in range(size.steps)]
        runs = {}
        for name, make in step_makers(size, device).items():
            try:
                runs[name] = make(x, rows, hidden)
                runs[name]()
            except Exception as error:
                runs.pop(name, None)
                found.append(row(part, name, reason(error)))
        medians = rounds(runs, size.repeats)
        stock = medians.get(contenders.REFERENCE, math.nan)
        for name, seconds in medians.items():
            value = f"{1e3 * seconds / size.steps:.3f} ms per step, {stock / seconds:.2f} times"
            found.append(row(part, name, value))
    return found


def measured(part: str, name: str, run: Callable[[], Any], show: Callable[..., str]) -> Row:
    """One line: what ``show`` makes of the seconds and the result of a run, or why it failed."""
    begun = time.perf_counter()
    try:
        result = run()
        synchronize()
        return row(part, name, show(time.perf_counter() - begun, result))
    except Exception as error:
        return row(part, name, reason(error))


def sampling(size: Size, device: torch.device) -> list[Row]:
    """Seconds of importance sampling of log p, and the rows per second."""
    data, draws, hidden = size.sampling
    part, found = f"importance sampling, S = {draws}", []
    x = torch.rand(data, 784, device=device)

    def show(seconds: float, result: Any) -> str:
        return f"{seconds:.3f} s, {data / seconds:.0f} data per second"

    for name, make in importance.IMPORTANCE.items():
        if device.type != "cuda" and name in COMPILED:
            continue
        run = make(x, draws, hidden)
        found.append(measured(part, f"{name}, first call", run, show))
        found.append(measured(part, name, run, show))
    return found


def ppca(size: Size, device: torch.device) -> list[Row]:
    """Seconds of fits of PPCA to a matrix on the device."""
    rows, columns, k = size.ppca
    generator = torch.Generator(device).manual_seed(0)
    axes = torch.randn(k, columns, device=device, generator=generator)
    x = torch.randn(rows, k, device=device, generator=generator) @ axes
    x += 0.3 * torch.randn(rows, columns, device=device, generator=generator)

    def show(seconds: float, result: Any) -> str:
        return f"{seconds:.2f} s, {float(result.objective[-1]):.4f} nats per datum"

    return [
        measured(
            f"PPCA, {rows} x {columns}, K = {k}",
            name,
            lambda fit=fit: fit(PPCA.like(x, k, seed=0), x),
            show,
        )
        for name, fit in (("closed form", fit_closed_form), ("PX-EM", fit_em))
    ]


def mnist(size: Size, device: torch.device) -> list[Row]:
    """Seconds of an epoch of a VAE on MNIST, and the ELBO of held-out digits."""
    rows, hidden, epochs = size.mnist
    try:
        from ppl_vae.data.images import image_set

        x = image_set("BinarizedMNIST", "train").x[:rows]
        kind = "MNIST"
    except Exception as error:
        x = (torch.rand(rows, 784) < 0.1).float()
        kind = f"random pixels, since MNIST is not here ({type(error).__name__})"
    x = x.float().to(device)
    train, test = x[: -len(x) // 6], x[-len(x) // 6 :]
    vae = VAE.mlp(784, 20, hidden=(hidden,), likelihood=Bernoulli(), seed=0).to(device)
    fit = fit_svi(
        *(vae.model, vae.guide, train),
        epochs=epochs,
        batch_size=min(256, len(train)),
        seed=0,
        device=device,
    )
    held_out = float(elbo(vae.model, vae.guide, test, num_samples=10, seed=0).mean())
    part = f"VAE 784-{hidden}-20 on {kind}"
    return [
        row(part, f"{epochs} epochs", f"{fit.seconds:.1f} s, {fit.execution}"),
        row(part, "ELBO of held-out rows", f"{held_out:.2f} nats per datum"),
    ]


PARTS = {
    "tests": (cuda_tests, 0.3),
    "steps": (steps, 0.35),
    "sampling": (sampling, 0.12),
    "ppca": (ppca, 0.08),
    "mnist": (mnist, 0.15),
}
"""The parts, and the share of the time that each may take."""


def run_part(name: str, size: Size, device: torch.device) -> list[Row]:
    """The rows of one part; a part that fails has one row with the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PARTS[name][0](size, device)
    except Exception as error:
        return [row(name, "the whole part", reason(error))]


def run_apart(name: str, limit: float, options: list[str]) -> list[Row]:
    """:func:`run_part` in a process of its own, which is ended at the limit, in seconds."""
    command = [sys.executable, __file__, "--part", name, *options]
    begun = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return [row(name, "the whole part", f"failed: not done within {limit:.0f} s")]
    print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return [row(name, "the whole part", f"failed: exit {done.returncode}: {last[:160]}")]
    return json.loads(lines[-1])


def table(rows: list[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| part | measured | value |", "|---|---|---|"]
    lines += [f"| {r['part']} | {r['measured']} | {r['value']} |" for r in rows]
    return "\n".join(lines)


def about(device: torch.device) -> str:
    """The device and the versions, for the heading."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}"


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", help="by default torch's current accelerator")
    parser.add_argument("--seconds", type=float, default=450.0)
    parser.add_argument("--size", choices=SIZES, default="full", help="how much each part does")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run all parts, or one."""
    given = arguments()
    device = torch.device(given.device) if given.device else current_accelerator()
    if device is None:
        raise SystemExit(
            "no accelerator here; --device cpu --size cpu tries the script without one"
        )
    if given.part:
        print(json.dumps(run_part(given.part, SIZES[given.size], device)))
        return
    options = ["--device", str(device), "--size", given.size]
    rows = [
        r
        for name, (_, share) in PARTS.items()
        for r in run_apart(name, share * given.seconds, options)
    ]
    text = f"{about(device)}\n\n{table(rows)}\n"
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
