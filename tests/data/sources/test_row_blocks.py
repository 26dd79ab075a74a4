"""Tables larger than memory: row blocks, memory maps and sums over them."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import oracles
from ppl_vae import PPCA, fit_closed_form, fit_em, variational_em
from ppl_vae.data.sources import row_blocks
from ppl_vae.data.sources.row_blocks import RowBlocks
from ppl_vae.models.linear.sufficient_statistics import SampleCovariance, summarize_table

N, D, K = 90, 7, 3


def table(missing=False, N=N, seed=0):
    x = oracles.simulate_ppca((9.0, 4.0, 2.5), 0.8, N, D, seed) + 10 * np.arange(D)
    return oracles.with_missing_values(x, 0.2, seed) if missing else x


class Reiterable:
    """An iterable that makes its blocks each time it is iterated over."""

    def __init__(self, x, sizes):
        self.x, self.sizes, self.times = x, sizes, 0

    def __iter__(self):
        self.times += 1
        yield from np.split(self.x, np.cumsum(self.sizes))


def mapped(x, folder, mode="r"):
    path = folder / "x.dat"
    x.tofile(path)
    return np.memmap(path, dtype=x.dtype, mode=mode, shape=x.shape)


SOURCES = {
    "list": lambda x, _: np.split(x, [10, 11, 60]),
    "tensors": lambda x, _: tuple(torch.from_numpy(x).split(13)),
    "tables": lambda x, _: [pd.DataFrame(part) for part in np.array_split(x, 4)],
    "single rows": lambda x, _: list(x[:, None]),
    "object": lambda x, _: Reiterable(x, [3, 30, 30]),
    "memory map": lambda x, folder: mapped(x, folder),
    "writable map": lambda x, folder: mapped(x, folder, "r+"),
    "copy-on-write map": lambda x, folder: mapped(x, folder, "c"),
}


def parameters(ppca):
    return [p.detach().numpy().copy() for p in (ppca.loc, ppca.loadings, ppca.noise_scale)]


# Each source with and without missing values, and with both kinds of noise; slow, in all
# combinations.
QUICK = {("isotropic", False), ("diagonal", True)}
NOISE_AND_MISSING = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(("isotropic", "diagonal"), (False, True))
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("noise", "missing"), NOISE_AND_MISSING)
def test_em_on_blocks_equals_em_on_the_matrix(source, missing, noise, tmp_path, monkeypatch):
    x = table(missing)
    whole = PPCA.like(x, K, noise=noise, seed=0)
    expected = fit_em(whole, x, max_iterations=5)
    monkeypatch.setattr(row_blocks, "WORKING_FLOATS", 1500)  # memory maps are read in pieces
    rows = SOURCES[source](x, tmp_path)
    parts = PPCA.like(rows, K, noise=noise, seed=0)
    assert parts.loc.dtype == torch.float64
    result = fit_em(parts, rows, max_iterations=5)
    np.testing.assert_allclose(result.objective, expected.objective, rtol=1e-10)
    for a, b in zip(parameters(parts), parameters(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("source", SOURCES)
def test_the_closed_form_of_blocks_equals_that_of_the_matrix(source, tmp_path, monkeypatch):
    x = table()
    monkeypatch.setattr(row_blocks, "WORKING_FLOATS", 1000)
    ppca = PPCA(D, K, seed=0).double()
    fit_closed_form(ppca, SOURCES[source](x, tmp_path))
    loadings, loc, noise = oracles.closed_form_ppca(x, K)
    np.testing.assert_allclose(ppca.loc.detach(), loc, rtol=1e-12)
    assert float(ppca.noise_scale.detach()) ** 2 == pytest.approx(noise, rel=1e-10)
    expected = oracles.ppca_covariance(loadings, noise)
    np.testing.assert_allclose(ppca.covariance().detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("accelerate", [True, False])
def test_blocks_with_missing_values_are_read_in_each_iteration(accelerate):
    rows, options = Reiterable(table(), [20, 20]), {"accelerate": accelerate, "tol": 0.0}
    fit_em(PPCA(D, K, seed=0), rows, max_iterations=10, **options)
    assert rows.times == 1
    fit_closed_form(PPCA(D, K, seed=0), rows)
    variational_em(PPCA(D, K, seed=0), rows)
    assert rows.times == 3
    incomplete = Reiterable(table(missing=True), [20, 20])
    fit_em(PPCA(D, K, seed=0), incomplete, max_iterations=10, **options)
    # Column statistics; pairs observed together, twice; the initial state and ten iterations; the
    # expected covariance, and the bound at the best parameters for it.
    assert incomplete.times == 1 + 2 + 11 + 2


def test_a_generator_can_be_read_only_once():
    x = table()
    fit_closed_form(ppca := PPCA(D, K, seed=0).double(), (part for part in np.split(x, 3)))
    assert float(ppca.noise_scale.detach()) ** 2 == pytest.approx(0.8, rel=1e-10)
    with pytest.raises(ValueError, match=r"x is an iterator.*give a list of blocks"):
        fit_em(ppca, (part for part in np.split(table(missing=True), 3)))


@pytest.mark.parametrize("missing", [False, True])
def test_a_memory_map_with_a_mask(missing, tmp_path):
    x = table(missing)
    mask = np.random.default_rng(0).random(x.shape) < 0.8
    mask[np.isnan(x).any(1)] = True
    mask[:, 0] = True
    expected = fit_em(PPCA.like(x, K, mask=mask, seed=0), x, mask=mask, max_iterations=3)
    rows = mapped(x, tmp_path)
    result = fit_em(PPCA.like(rows, K, mask=mask, seed=0), rows, mask=mask, max_iterations=3)
    np.testing.assert_allclose(result.objective, expected.objective, rtol=1e-12)


def test_changes_to_a_copy_on_write_map_are_kept(tmp_path):
    rows = mapped(table(), tmp_path, "c")
    rows[0] = 77.0
    list(RowBlocks(rows).read())
    assert (rows[0] == 77.0).all()


# Merged statistics


@pytest.mark.parametrize("size", [30, 200, 10**6])
@pytest.mark.parametrize("shape", [(90, 7), (20, 45), (46, 45), (9, 9)])
def test_merged_moments_equal_those_of_the_matrix(size, shape, monkeypatch):
    x = np.random.default_rng(0).normal(size=shape) * 3 + 5
    monkeypatch.setattr(row_blocks, "WORKING_FLOATS", size)
    covariance = SampleCovariance.of(x)
    S = np.cov(x.T, bias=True)
    other = np.random.default_rng(1).normal(size=(shape[1], 2))
    np.testing.assert_allclose(covariance @ torch.from_numpy(other), S @ other, atol=1e-11)
    np.testing.assert_allclose(covariance.diagonal, np.diag(S), rtol=1e-12)
    np.testing.assert_allclose(covariance.mean, x.mean(0), rtol=1e-13)
    values = np.linalg.eigvalsh(S)[::-1][: min(shape)]
    np.testing.assert_allclose(covariance.eigh()[0], values, atol=1e-11)


@pytest.mark.parametrize("size", [30, 100, 10**6])
def test_merged_column_statistics_equal_those_of_the_matrix(size, monkeypatch):
    x = table(missing=True)
    x[:50, 2], x[:, 4] = np.nan, np.where(np.isnan(x[:, 4]), np.nan, -1e6 / 7)
    monkeypatch.setattr(row_blocks, "WORKING_FLOATS", size)
    columns, covariance = summarize_table(RowBlocks(x))
    assert covariance is None
    np.testing.assert_array_equal(columns.count, (~np.isnan(x)).sum(0))
    np.testing.assert_allclose(columns.mean, np.nanmean(x, 0), rtol=1e-13)
    np.testing.assert_allclose(columns.variance, np.nanvar(x, 0), rtol=1e-11, atol=1e-12)
    assert columns.constant_columns() == [4]
    assert columns.num_missing == np.isnan(x).sum()


@pytest.mark.parametrize("sizes", [[40, 3, 3, 30, 2, 12], [3, 3, 41, 20, 3, 20]])
def test_blocks_of_different_sizes_that_are_converted_equal_the_matrix(sizes):
    x = table().astype(np.float32)
    blocks = np.split(x, np.cumsum(sizes)[:-1])
    columns, covariance = summarize_table(RowBlocks(blocks))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(columns.mean, exact.mean(0), rtol=1e-13)
    np.testing.assert_array_equal(columns.low, exact.min(0).clip(max=0))
    np.testing.assert_array_equal(columns.high, exact.max(0).clip(min=0))
    factor = covariance.factor
    np.testing.assert_allclose(factor.mT @ factor, np.cov(exact.T, bias=True), rtol=1e-11)


def test_a_column_constant_in_each_block_is_not_constant():
    x = table()
    x[:, 1] = np.repeat([1.0, 2.0, 3.0], N // 3)
    assert summarize_table(RowBlocks(np.split(x, 3)))[0].constant_columns() == []
    x[:, 1] = 1 / 3
    assert summarize_table(RowBlocks(np.split(x, 3)))[0].constant_columns() == [1]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("pieces", [1, 9])
def test_a_large_mean_does_not_reduce_accuracy(missing, pieces):
    x = table(missing)
    far = x + 0.0
    far[:, 3] += 1e8
    expected, found = PPCA.like(x, K, seed=0), PPCA.like(far, K, seed=0)
    fit_em(expected, x)
    fit_em(found, far if pieces == 1 else np.split(far, pieces))
    scales = [float(ppca.noise_scale.detach()) for ppca in (expected, found)]
    assert scales[1] ** 2 == pytest.approx(scales[0] ** 2, rel=1e-6)


def test_drifting_block_means_do_not_reduce_accuracy():
    x = table()
    x[:, 0] += 1e6 * np.arange(N)
    covariance = SampleCovariance.of(np.split(x, 9))
    np.testing.assert_allclose(covariance.diagonal, np.var(x, 0), rtol=1e-12)


@pytest.mark.parametrize("missing", [False, True])
def test_single_precision_warns_if_too_coarse(missing):
    x = table(missing)
    x[:, 3] = 1e8 + 10 * x[:, 3]
    message = (
        "column 3 has mean 1e.08 and standard deviation .* apart; give x and model in float64"
    )
    with pytest.warns(UserWarning, match=message):
        fit_em(PPCA(D, K, seed=0).double(), x.astype("f4"))
    with pytest.warns(UserWarning, match=message):
        fit_em(PPCA(D, K, seed=0), x)
    with pytest.warns(UserWarning, match=message):
        PPCA.like(x.astype("f4"), K)


# Errors


@pytest.mark.parametrize(
    ("x", "match"),
    [
        ([], "x must be 2-d"),
        (iter([]), "x has no blocks of rows"),
        ([np.zeros((2, 3)), np.zeros((2, 4))], "block 1 of x has 4 columns, those before it 3"),
        ([np.zeros((2, 3)), np.full((2, 3), np.inf)], "block 1 of x has 6 infinite entries"),
        ([np.zeros((2, 3)), np.zeros((0, 3))], "block 1 of x is empty"),
        ([np.full((2, 3), np.nan)], "x has no observed value in any of its 2 rows"),
        ((np.zeros(3) for _ in range(2)), "block 0 of x must be 2-d"),
    ],
)
def test_malformed_tables_raise(x, match):
    with pytest.raises(ValueError, match=match):
        fit_closed_form(PPCA(3, 1), x)


def test_malformed_memory_maps_raise(tmp_path):
    (tmp_path / "x.dat").write_bytes(bytes(800))
    flat = np.memmap(tmp_path / "x.dat", dtype=float, mode="r")
    with pytest.raises(ValueError, match=r"x must be 2-d.*\(100,\)"):
        fit_closed_form(PPCA(3, 1), flat)
    rows = np.memmap(tmp_path / "x.dat", dtype=float, mode="r", shape=(20, 5))
    with pytest.raises(ValueError, match=r"mask must be boolean with the shape of x, \(20, 5\)"):
        fit_em(PPCA(5, 1), rows, mask=np.ones((19, 5), dtype=bool))
    whole = np.memmap(tmp_path / "x.dat", dtype=np.int64, mode="r+", shape=(20, 5))
    whole[:] = np.random.default_rng(0).integers(9, size=(20, 5))
    assert float(fit_closed_form(PPCA(5, 2).double(), whole).objective) == pytest.approx(
        oracles.closed_form_log_likelihood(oracles.sample_spectrum(whole)[0], 2), rel=1e-9
    )


def test_a_mask_of_an_iterable_raises():
    with pytest.raises(ValueError, match="blocks of an iterable mark missing values by NaN"):
        fit_em(PPCA(D, K), iter(np.split(table(), 3)), mask=np.ones((N, D), dtype=bool))


def test_blocks_that_change_between_iterations_raise():
    rows = Reiterable(table(missing=True), [20])

    class Shrinking:
        def __iter__(self):
            return iter(list(rows)[: 1 if rows.times > 1 else 2])

    with pytest.raises(ValueError, match="x had 90 rows when it was first read, and 20 now"):
        fit_em(PPCA(D, K, seed=0), Shrinking())


# Memory

SCRIPT = """
import sys
import numpy as np, torch
torch.set_num_threads(1)
from ppl_vae import PPCA, fit_closed_form, fit_em
from ppl_vae.data.sources import row_blocks

def peak():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) / 1024

def memory_growth(fit, x):
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    before, ppca = peak(), PPCA.like(x, 3, seed=0)
    fit(ppca, x)
    return peak() - before, float(ppca.noise_scale.detach())

path, rows = sys.argv[1], int(sys.argv[2])
row_blocks.WORKING_FLOATS = 2**20
x = np.memmap(path, dtype="f8", mode="r+", shape=(rows, 100))
few = lambda ppca, x: fit_em(ppca, x, max_iterations=3)
memory_growth(fit_closed_form, np.array(x[:5000]))  # one-time allocations
incomplete = np.array(x[:5000])
incomplete[::2, 3] = np.nan
memory_growth(few, incomplete)
print(*memory_growth(fit_closed_form, x))
for low in range(0, rows, 10_000):
    part = x[low : low + 10_000]
    part[np.random.default_rng(low).random(part.shape) < 0.1] = np.nan
    x._mmap.madvise(4)
print(*memory_growth(few, x))
"""


# glibc caches a number of freed arrays that varies from run to run (peaks of 21 to 31 MiB), so
# these settings return them at once, and the peak is that of the arrays in use.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def memory_growth(tmp_path, rows):
    """Peak memory in MiB of fits to a memory map of this many rows: complete, and with missing
    values."""
    rng, folder = np.random.default_rng(0), tmp_path / "x.dat"
    loadings = rng.normal(size=(3, 100))
    with folder.open("wb") as file:
        for _ in range(rows // 10_000):
            z, noise = rng.normal(size=(10_000, 3)), rng.normal(size=(10_000, 100))
            (z @ loadings + noise).tofile(file)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), str(rows)],
        capture_output=True,
        text=True,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        | RETURN_FREED_MEMORY,
    )
    assert run.returncode == 0, run.stderr
    found = [tuple(map(float, line.split())) for line in run.stdout.splitlines()]
    size = rows * 800 / 2**20
    print(
        f"table {size:.0f} MiB: complete +{found[0][0]:.0f} MiB, missing values "
        f"+{found[1][0]:.0f} MiB"
    )
    assert all(abs(sigma - 1) < 0.02 for _, sigma in found)
    return [growth for growth, _ in found]


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")


@pytest.mark.slow
@linux
def test_memory_does_not_hold_the_table(tmp_path):
    assert max(memory_growth(tmp_path, 50_000)) < 25  # the table has 38 MiB


@linux
@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    assert max(memory_growth(tmp_path, 1_000_000)) < 25
