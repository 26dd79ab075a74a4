"""Speed of PPCA and factor analysis compared with other packages, in one run; asserts nothing.

    python tests/benchmarks/ppca.py [--parts complete factors missing values race memory]
    [--repeats 7]
        [--threads 2] [--rows 10000] [--columns 784] [--latent-dim 20] [--out FILE]

``complete``: whole fits of complete data, one product X'X and scikit-learn's PCA.
``factors``: factor analysis and scikit-learn's, to the same value.
``missing values``: seconds per iteration with 20 % of the cells missing, and those of ppca_rs.
``race``: the same data, seconds until 0.01 nats per datum below the best value that either reaches
within --budget seconds; and where each stands then.
``memory``: what a process of its own holds at most while it fits a memory map (only if asked for).

ppca_rs takes part where it is installed (the extra ``bench``). Values are all computed by this
package's exact log-likelihood in float64.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA, FactorAnalysis
from timing import processor, rounds, show

from ppl_vae import PPCA, fit_closed_form, fit_em

try:
    import ppca_rs
except ImportError:
    ppca_rs = None

NOISE, MISSING, WITHIN = 0.1, 0.2, 0.01


def data(given, seed=0):
    """Rows with a spectral gap at K: latent variances of 1 to 4, noise of 0.01."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(given.columns, given.latent_dim)))[0]
    z = rng.normal(size=(given.rows, given.latent_dim)) * np.linspace(2, 1, given.latent_dim)
    x = z @ axes.T * given.columns**0.5 / 10
    return x + NOISE * rng.normal(size=x.shape) + 1.0


def start(given):
    """PPCA from random loadings, no data inspected."""
    return PPCA(given.columns, given.latent_dim, seed=0).double()


def against(medians, reference, **more):
    """A table of seconds and of their ratios to those of one contender."""
    return {
        name: {"seconds": value, "times the reference": value / medians[reference]}
        | {title: column[name] for title, column in more.items()}
        for name, value in medians.items()
    }


def complete(given):
    """Whole fits of complete data, and one product."""
    x, k = data(given), given.latent_dim
    reached, steps = {}, {}

    def ours(name, fit):
        def run():
            ppca = start(given)
            steps[name] = fit(ppca, x).steps
            reached[name] = ppca

        return run

    def sklearn():
        fitted["pca"] = PCA(k, svd_solver="covariance_eigh").fit(x)

    fitted = {}
    runs = {
        "X'X by numpy": lambda: x.T @ x,
        "fit_em, PX-EM": ours("fit_em, PX-EM", fit_em),
        "fit_closed_form": ours("fit_closed_form", fit_closed_form),
        "scikit-learn, PCA(covariance_eigh)": sklearn,
    }
    rounds(runs, 1)
    medians = rounds(runs, given.repeats)
    values = dict.fromkeys(runs, float("nan"))
    values |= {n: float(p.log_likelihood(x).mean().detach()) for n, p in reached.items()}
    pca = fitted["pca"]
    values["scikit-learn, PCA(covariance_eigh)"] = float(as_ppca(pca).log_likelihood(x).mean())
    steps = {name: steps.get(name, 1) for name in runs}
    return against(medians, "X'X by numpy", steps=steps, **{"nats per datum": values})


def as_ppca(pca):
    """scikit-learn's model, with noise over N instead of N - 1."""
    n = pca.n_samples_
    variances, noise = pca.explained_variance_ * (n - 1) / n, pca.noise_variance_ * (n - 1) / n
    loadings = pca.components_.T * np.sqrt(variances - noise)
    loc = torch.from_numpy(pca.mean_)
    return PPCA.from_parameters(torch.from_numpy(loadings), loc, noise**0.5).requires_grad_(False)


def factors(given):
    """Factor analysis from a start of each one's own, until it stops by itself."""
    rng = np.random.default_rng(1)
    x = data(given) + rng.normal(size=(given.rows, given.columns)) * rng.uniform(
        0.05, 1, size=given.columns
    )
    reached = {}

    def ours():
        ppca = PPCA.like(x, given.latent_dim, noise="diagonal", seed=0)
        fit_em(ppca, x, tol=1e-6)
        reached["fit_em, noise='diagonal'"] = ppca

    def theirs(method):
        def run():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                name = f"scikit-learn, {method}"
                options = {"svd_method": method, "tol": 1e-6 * given.rows, "max_iter": 1000}
                fitted = FactorAnalysis(given.latent_dim, random_state=0, **options).fit(x)
            scale = torch.from_numpy(fitted.noise_variance_).sqrt()
            parts = torch.from_numpy(fitted.components_.T), torch.from_numpy(fitted.mean_)
            reached[name] = PPCA.from_parameters(*parts, scale)

        return run

    runs = {"fit_em, noise='diagonal'": ours}
    runs |= {f"scikit-learn, {method}": theirs(method) for method in ("randomized", "lapack")}
    medians = rounds(runs, min(given.repeats, 3))
    values = {n: float(p.log_likelihood(x).mean().detach()) for n, p in reached.items()}
    return against(medians, "fit_em, noise='diagonal'", **{"nats per datum": values})


def incomplete(given):
    """The rows with cells missing at random."""
    x = data(given)
    return np.where(np.random.default_rng(2).random(x.shape) < MISSING, np.nan, x)


def missing(given):
    """Seconds per iteration, from the difference of a longer and a shorter fit."""
    x = incomplete(given)
    runs = {}
    for name, accelerate in (("fit_em, PX-EM", True), ("fit_em, EM", False)):
        for steps in (1, 4):
            options = {"accelerate": accelerate, "max_iterations": steps, "tol": 0.0}
            runs[name, steps] = lambda options=options: fit_em(start(given), x, **options)
    if ppca_rs is not None:
        dataset = ppca_rs.Dataset(x)
        model = ppca_rs.PPCAModel.init(given.latent_dim, dataset)
        runs["ppca_rs", 1] = lambda: model.iterate(dataset)
    medians = rounds(runs, given.repeats)
    seconds = {}
    for name, steps in medians:
        if steps == 1:
            longer = medians.get((name, 4))
            one = medians[name, 1]
            seconds[name] = one if longer is None else (longer - one) / 3
    return against(seconds, "fit_em, PX-EM")


def race(given):
    """When each comes within 0.01 nats of the best value that either reaches in the budget."""
    x = incomplete(given)
    begun = time.perf_counter()
    fit = fit_em(PPCA.like(x, given.latent_dim, seed=0), x, tol=1e-6)
    whole = time.perf_counter() - begun
    late = whole - fit.seconds  # PPCA.like also reads the data, too
    checks = zip((fit.elapsed + late).tolist(), fit.log_likelihood.tolist(), strict=True)
    curves = {"fit_em, PX-EM": list(checks)}
    if ppca_rs is not None:
        curves["ppca_rs"] = theirs_against_time(x, given)
    best = max(value for curve in curves.values() for _, value in curve)
    table = {}
    for name, curve in curves.items():
        near = [seconds for seconds, value in curve if value >= best - WITHIN]
        table[name] = {
            "seconds to 0.01 nats": near[0] if near else None,
            "seconds in all": curve[-1][0],
            "short of the best": best - curve[-1][1],
        }
    return table


def theirs_against_time(x, given):
    """(seconds of iterating, exact log p) of ppca_rs, inspected ever more seldom."""
    begun = time.perf_counter()
    dataset = ppca_rs.Dataset(x)
    model = ppca_rs.PPCAModel.init(given.latent_dim, dataset)
    spent, steps, curve = time.perf_counter() - begun, 0, []
    while spent < given.budget:
        begun = time.perf_counter()
        model = model.iterate(dataset)
        spent, steps = spent + time.perf_counter() - begun, steps + 1
        if steps & (steps - 1) == 0 or spent >= given.budget:
            found = PPCA.from_parameters(
                torch.from_numpy(np.array(model.transform)),
                torch.from_numpy(np.array(model.mean).reshape(-1)),
                float(model.isotropic_noise),
            )
            curve.append((spent, float(found.log_likelihood(x).mean().detach())))
    return curve


def memory(given):
    """MiB that a process holds at most: nothing fitted, and a memory map of this many rows."""
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npy"
        rows, columns = given.memory_rows, 100
        x = np.lib.format.open_memmap(path, "w+", np.float64, (rows, columns))
        rng = np.random.default_rng(0)
        loadings = rng.normal(size=(5, columns))
        for low in range(0, rows, 100_000):
            part = x[low : low + 100_000]
            part[:] = rng.normal(size=(len(part), 5)) @ loadings + rng.normal(size=part.shape)
        x.flush()
        del x, part
        for what in ("nothing", "closed", "em", "part"):
            command = [sys.executable, __file__, "--memory-of", what, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            table[what] = json.loads(done.stdout)
    return table


def memory_of(what, path):
    """Print what this process held at most, the seconds, and the noise it found."""
    x = np.load(path, mmap_mode="r")
    ppca = PPCA(x.shape[1], 5, seed=0).double()
    begun = time.perf_counter()
    if what == "closed":
        fit_closed_form(ppca, x)
    elif what == "em":
        fit_em(ppca, x)
    elif what == "part":
        fit_closed_form(ppca, np.array(x[: len(x) // 20]))
        again = PPCA(x.shape[1], 5, seed=0).double()
        fit_closed_form(again, x[: len(x) // 20])
        assert torch.equal(ppca.covariance(), again.covariance())
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    found = {"peak, MiB": peak, "seconds": time.perf_counter() - begun}
    print(json.dumps(found | {"noise scale": float(ppca.noise_scale.detach())}))


PARTS = {f.__name__: f for f in (complete, factors, missing, race, memory)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS)[:-1])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--columns", type=int, default=784)
    parser.add_argument("--latent-dim", type=int, default=20)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds of the race")
    parser.add_argument("--memory-rows", type=int, default=5_000_000)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory_of:
        memory_of(*given.memory_of)
        return
    shape = f"N = {given.rows}, D = {given.columns}, K = {given.latent_dim}"
    print(f"{processor()}, {given.threads} threads, torch {torch.__version__}; {shape}, float64")
    results = {}
    for name in given.parts:
        results[name] = PARTS[name](given)
        show(PARTS[name].__doc__.rstrip("."), results[name])
    if given.out:
        given.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
