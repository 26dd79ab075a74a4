"""Speed of training steps and of importance sampling, side by side in one run; asserts nothing.

    python tests/benchmarks/run.py [--hidden 64 400 1000] [--batch 64 128 1024 8192]
        [--repeats 7] [--threads 2] [--device cpu] [--out FOLDER]

Every contender trains the same network (784-H-20-H-784) on the same rows. Repetitions are
interleaved; medians, ratios, the share of the machine's matrix-product rate, the seconds of the
first call and the steps that earn them back are printed, and written with a picture to --out.
NumPyro takes part where it is installed (the extra ``bench``).
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import contenders
import importance
import numpyro_contenders
import precision
import torch
from picture import draw
from timing import processor, rounds, show

TRAINING = contenders.TRAINING | numpyro_contenders.TRAINING
SECONDS = 0.25
"""The approximate duration of one repetition of one contender."""


def first_calls(makers, *args):
    """The runs, and the seconds until each has run once."""
    runs, seconds = {}, {}
    for name, make in makers.items():
        begun = time.perf_counter()
        runs[name] = make(*args)
        runs[name]()
        seconds[name] = time.perf_counter() - begun
    return runs, seconds


def product_rate(device):
    """Floating-point operations a second of a large matrix product, by the faster library."""
    size = 4096 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device)
    ways = [lambda: torch.mm(a, a)]
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, a.t(), None, "none", [], ""))

    def timed(way):
        def run():
            way()
            contenders.wait(device)

        run()
        return rounds({"": run}, 7)[""]

    return 2 * size**3 / min(timed(way) for way in ways)


def operations(hidden, batch):
    """The operations of the matrix products of one step: three per layer, two in the first."""
    weights = 2 * 784 * hidden + 3 * contenders.LATENT * hidden
    return 6 * batch * weights - 2 * batch * 784 * hidden


def training(hidden, batch, given):
    """A table of all contenders at one shape."""
    device = torch.device(given.device)
    generator = torch.Generator().manual_seed(0)
    num_data = max(4096, 2 * batch)
    x = torch.rand(num_data, 784, generator=generator).to(device)
    guess = operations(hidden, batch) / given.rate + 2e-3
    steps = 8 * max(1, min(5, round(SECONDS / guess / 8)))
    order = [torch.randperm(num_data, generator=generator)[:batch] for _ in range(steps)]
    rows = [some.to(device) for some in order]
    picked = {
        n: c for n, c in TRAINING.items() if not given.only or any(o in n for o in given.only)
    }
    runs, first = first_calls(picked, x, rows, hidden)
    rounds(runs, 1)
    medians = {name: s / steps for name, s in rounds(runs, given.repeats).items()}
    reference = medians.get(contenders.REFERENCE, float("nan"))
    table = {}
    for name, seconds in medians.items():
        gained = reference - seconds
        table[name] = {
            "milliseconds per step": 1e3 * seconds,
            "times as fast": reference / seconds,
            "share of product rate": operations(hidden, batch) / seconds / given.rate,
            "first call, s": first[name],
            "earned back after steps": first[name] / gained if gained > 0 else None,
        }
    return table


def sampling(given):
    """Importance sampling by several ways: seconds, ratios to the loop by hand."""
    device = torch.device(given.device)
    data, draws, hidden = (10_000, 5_000, 400) if device.type == "cuda" else (256, 512, 400)
    x = torch.rand(data, 784, generator=torch.Generator().manual_seed(0)).to(device)
    runs, first = first_calls(importance.IMPORTANCE, x, draws, hidden)
    medians = rounds(runs, given.repeats)
    work = 2 * data * draws * (784 * hidden + contenders.LATENT * hidden)
    table = {}
    for name, seconds in medians.items():
        table[name] = {
            "seconds": seconds,
            "times as fast": medians[importance.REFERENCE] / seconds,
            "share of product rate": work / seconds / given.rate,
            "first call, s": first[name],
        }
    return f"importance sampling, {data} data, {draws} draws, 784-{hidden}-20", table


def peak_memory(given):
    """MiB that a process of each contender's own held at most, in 64 steps of 784-400-20."""
    table = {}
    for name in TRAINING:
        command = [sys.executable, __file__, "--memory-of", name, "--threads", str(given.threads)]
        done = subprocess.run(
            [*command, "--device", given.device], capture_output=True, text=True, check=True
        )
        table[name] = {"peak memory, MiB": float(done.stdout.split()[-1])}
    return table


def memory_of(name, device):
    """Print what this process held at most, on the device if that is a GPU."""
    x = torch.rand(4096, 784).to(device)
    rows = [torch.arange(k, k + 128, device=device) for k in range(64)]
    TRAINING[name](x, rows, 400)()
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def arguments():
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 400, 1000])
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 128, 1024, 8192])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", help="contenders whose name holds one of these")
    parser.add_argument("--parts", nargs="+", default=["steps", "sampling", "memory", "nats"])
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main():
    given = arguments()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    if given.memory_of:
        memory_of(given.memory_of, device)
        return
    given.rate = product_rate(device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    about = f"{machine}, {given.threads} threads, torch {torch.__version__}"
    print(f"{about}; matrix products at {given.rate / 1e9:.0f} GFLOP/s")
    results = {"about": about, "product rate": given.rate, "steps": {}}
    if "steps" in given.parts:
        for hidden in given.hidden:
            for batch in given.batch:
                title = f"784-{hidden}-20, batch {batch}"
                results["steps"][title] = training(hidden, batch, given)
                show(title, results["steps"][title])
    if "sampling" in given.parts:
        title, results["sampling"] = sampling(given)
        show(title, results["sampling"])
    if "memory" in given.parts:
        results["memory"] = peak_memory(given)
        show("a process of its own, 784-400-20, batch 128", results["memory"])
    if "nats" in given.parts:
        results["nats"] = precision.nats(device, 1500)
        table = {name: {"held-out log p, nats": v} for name, v in results["nats"].items()}
        show("digits, 64-128-8, 1500 steps", table)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "speed.json").write_text(json.dumps(results, indent=1))
        if results["steps"]:
            draw(results, given.out / "speed.png")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
