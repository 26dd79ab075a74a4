"""Fits to rows that are read in blocks equal those to the same rows in memory, bit for bit."""

import importlib
from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, TensorDataset

import oracles
from ppl_vae import (
    PPCA,
    VAE,
    PerDatumGuide,
    elbo,
    fit_closed_form,
    fit_em,
    fit_svi,
    gaps,
    impute,
    log_likelihood,
)
from ppl_vae.capture.functional_step import FunctionalStep
from ppl_vae.core.errors import CheckpointError
from ppl_vae.core.introspection import modules_of
from ppl_vae.data.sources import (
    array_source,
    block_source,
    dataset_source,
    observed_rows,
    parquet_source,
    row_order,
    row_stream,
)
from ppl_vae.data.sources.row_sources import row_source
from ppl_vae.inference.svi import trainer
from ppl_vae.inference.svi.batches.schedule import Schedule

fit_module = importlib.import_module("ppl_vae.inference.svi.fit")
N, D = 103, 4
NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 15 rows, of 25 rows in parts that are read from their beginning, in groups of 50;
    nothing is loaded."""
    monkeypatch.setattr(observed_rows, "LOADED_NUMBERS", 0)
    monkeypatch.setattr(row_order, "GROUP_NUMBERS", 50 * D)
    for module in (block_source, array_source, dataset_source):
        monkeypatch.setattr(module, "BLOCK_NUMBERS", 15 * D)
    monkeypatch.setattr(block_source, "SEQUENTIAL_NUMBERS", 25 * D)
    for module in (parquet_source, row_stream):
        monkeypatch.setattr(module, "PIECE_NUMBERS", 7 * D)


def table(missing=False):
    x = oracles.simulate_ppca((4.0, 2.0), 0.7, N, D, seed=3).astype(np.float32)
    if missing:
        x[np.random.default_rng(1).random(x.shape) < 0.2] = np.nan
    return x


class Rows(Dataset):
    """A dataset of rows, or of pairs of a row and something else, one at a time."""

    def __init__(self, x, others=None):
        self.x, self.others = x, others

    def __len__(self):
        return len(self.x)

    def __getitem__(self, place):
        row = torch.from_numpy(self.x[place])
        return row if self.others is None else (row, self.others[place])


class Batched(Rows):
    """A dataset that gives several items at once."""

    def __getitems__(self, places):
        return [self[place] for place in places]


class Streamed(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        yield from map(torch.from_numpy, self.x)


class Reiterable:
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        yield from np.array_split(self.x, 7)


def mapped(x, folder):
    path = folder / "x.dat"
    x.tofile(path)
    return np.memmap(path, dtype=x.dtype, mode="r", shape=x.shape)


def parquet(x, folder, name="x.parquet", rows=40):
    path = folder / name
    pa.parquet.write_table(arrow(x), path, row_group_size=rows)
    return path


def arrow(x):
    columns = {n: pa.array(x[:, k], from_pandas=True) for k, n in enumerate(NAMES[: x.shape[1]])}
    return pa.table(columns)


def fortran(x, folder):
    """A memory map whose columns are consecutive."""
    made = np.memmap(folder / "f.dat", dtype=x.dtype, mode="w+", shape=x.shape, order="F")
    made[:] = x
    made.flush()
    return np.memmap(folder / "f.dat", dtype=x.dtype, mode="r", shape=x.shape, order="F")


def other_endian(x, folder):
    swapped = x.astype(x.dtype.newbyteorder())
    swapped.tofile(folder / "swapped.dat")
    return np.memmap(folder / "swapped.dat", dtype=swapped.dtype, mode="r", shape=x.shape)


def part_of_a_map(x, folder):
    """Every second row of a memory map, from the last one on."""
    longer = np.repeat(x[::-1], 2, axis=0)
    return mapped(longer, folder)[::-2]


def folder_with_empty_files(x, folder):
    """Files of different numbers of rows, the first and one other of which have none."""
    for number, part in enumerate(np.split(x, [0, 30, 31, 31, 80])):
        parquet(part, folder, f"part-{number}.parquet", rows=17)
    return folder


def parquet_folder(x, folder):
    for number, part in enumerate(np.split(x, [30, 31, 80])):
        parquet(part, folder, f"part-{number}.parquet", rows=17)
    return folder


SOURCES = {
    "memory map": mapped,
    "parquet file": parquet,
    "name of a parquet file": lambda x, folder: str(parquet(x, folder)),
    "folder": parquet_folder,
    "Fortran memory map": fortran,
    "swapped memory map": other_endian,
    "part of a memory map": part_of_a_map,
    "folder with empty files": folder_with_empty_files,
    "blocks of one row": lambda x, _: list(x[:, None]),
    "blocks of no rows": lambda x, _: np.split(x, [0, 40, 40, len(x)]),
    "concatenated": lambda x, _: ConcatDataset([Rows(x[:1]), Rows(x[1:70]), Rows(x[70:])]),
    "items at once": lambda x, _: Batched(x),
    "pyarrow dataset": lambda x, folder: pa.dataset.dataset(parquet_folder(x, folder)),
    "list": lambda x, _: np.split(x, [10, 11, 60]),
    "list of frames": lambda x, _: [pd.DataFrame(part) for part in np.split(x, [33, 90])],
    "list of memory maps": lambda x, folder: [mapped(x[:70], folder), x[70:]],
    "iterable": lambda x, _: Reiterable(x),
    "tensor dataset": lambda x, _: TensorDataset(torch.from_numpy(x)),
    "dataset": lambda x, _: Rows(x),
    "iterable dataset": lambda x, _: Streamed(x),
    "loader": lambda x, _: DataLoader(Rows(x), batch_size=12, shuffle=True),
    "ordered loader": lambda x, _: DataLoader(TensorDataset(torch.from_numpy(x)), batch_size=12),
    "iterable loader": lambda x, _: DataLoader(Streamed(x), batch_size=12),
}


def mostly_slow(names, *default):
    """Parameters of which only some belong to the default tests."""
    return [n if n in default else pytest.param(n, marks=pytest.mark.slow) for n in names]


MASKED = {
    "memory map": lambda x, m, folder: (mapped(x, folder), m),
    "list": lambda x, m, _: (np.split(x, [50]), np.split(m, [50])),
    "dataset": lambda x, m, _: (Rows(x, m), None),
    "tensor dataset": lambda x, m, _: (TensorDataset(*map(torch.from_numpy, (x, m))), None),
    "loader": lambda x, m, _: (DataLoader(Rows(x, m), batch_size=12, shuffle=True), None),
}


def pair(x=None, seed=0):
    vae = VAE.mlp(D, 2, hidden=(6,), missing="zeros+mask", seed=seed)
    return vae.model, vae.guide


def parameters(programs):
    return [p.detach().clone() for part in modules_of(*programs) for p in part.parameters()]


def fitted(x, make=pair, **options):
    programs = make()
    options = {"batch_size": 12, "epochs": 2, "lr": 0.01, "seed": 5, "capture": False} | options
    result = fit_svi(*programs, x, **options)
    return result, parameters(programs), programs


def in_same_order(monkeypatch, run_streamed, run_in_memory):
    """Both runs, the second of which draws the rows that the first one drew."""
    drawn, own = [], Schedule.batches

    def recorded(self, *args, **kwargs):
        for rows in own(self, *args, **kwargs):
            drawn.append(rows.clone())
            yield rows

    monkeypatch.setattr(Schedule, "batches", recorded)
    streamed = run_streamed()
    monkeypatch.setattr(Schedule, "batches", lambda self, *args, **kwargs: iter(drawn))
    in_memory = run_in_memory()
    monkeypatch.setattr(Schedule, "batches", own)
    return streamed, in_memory, drawn


def check_equal(first, second):
    assert first[0].objective.tolist() == second[0].objective.tolist()
    assert all(map(torch.equal, first[1], second[1]))


@pytest.mark.parametrize("missing", mostly_slow([False, True], True))
@pytest.mark.parametrize("kind", mostly_slow(SOURCES, "memory map", "folder", "iterable loader"))
def test_a_streamed_fit_equals_that_in_memory(kind, missing, monkeypatch, tmp_path, small_blocks):
    x = table(missing)
    source = SOURCES[kind](x, tmp_path)
    first, second, drawn = in_same_order(monkeypatch, lambda: fitted(source), lambda: fitted(x))
    check_equal(first, second)
    assert [len(rows) for rows in drawn] == ([12] * 8 + [7]) * 2
    epochs = torch.cat(drawn).reshape(2, N)
    assert epochs.sort().values.tolist() == [list(range(N))] * 2
    in_order = kind in ("iterable", "iterable dataset", "ordered loader", "iterable loader")
    assert torch.equal(epochs[0], epochs[1]) == in_order
    assert torch.equal(epochs[0], torch.arange(N)) == in_order


@pytest.mark.parametrize("kind", mostly_slow(MASKED, "loader"))
def test_masks_of_rows_are_used(kind, monkeypatch, tmp_path, small_blocks):
    x, mask = table(), np.random.default_rng(2).random((N, D)) < 0.7
    source, given = MASKED[kind](x, mask, tmp_path)
    first, second, _ = in_same_order(
        monkeypatch, lambda: fitted(source, mask=given), lambda: fitted(x, mask=mask)
    )
    check_equal(first, second)
    assert "labels" not in str(first[0].notes)


@pytest.mark.parametrize("kind", mostly_slow(SOURCES, "parquet file"))
def test_a_source_that_fits_into_memory_is_loaded(kind, tmp_path):
    if "order" in kind or "iterable" in kind:
        pytest.skip("its rows keep their order")
    x = table(missing=True)
    check_equal(fitted(SOURCES[kind](x, tmp_path), epochs=1), fitted(x, epochs=1))


def test_the_order_is_shuffled_by_blocks_and_within(small_blocks):
    source = row_source(TensorDataset(torch.from_numpy(table())))
    order = row_order.RowOrder(source)
    groups = list(order.groups(0))
    assert [len(group) for group in groups] == [45, 45, 13] or sum(map(len, groups)) == N
    for group in groups:
        assert len(group) <= 50
        blocks = {row // 15 for row in group.rows.tolist()}
        assert sorted(group.rows.tolist()) == [
            r for b in sorted(blocks) for r in range(15 * b, min(15 * b + 15, N))
        ]
        assert group.rows.tolist() != sorted(group.rows.tolist())
    rows = [torch.cat([g.rows for g in order.groups(seed)]).tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    from_place = list(order.batches(0, [20, 20], place=33))
    assert torch.cat(from_place).tolist() == rows[0][33:73]


@pytest.mark.parametrize(
    "kind", mostly_slow(["parquet file", "iterable loader", "memory map"], "parquet file")
)
@pytest.mark.parametrize("last", mostly_slow([3, 9, 13], 13))
def test_an_interrupted_fit_resumes_at_its_row(kind, last, monkeypatch, tmp_path, small_blocks):
    monkeypatch.setattr(trainer, "CHECKPOINT_INTERVAL", 1)
    source, file = SOURCES[kind](table(missing=True), tmp_path), tmp_path / "fit.ckpt"
    whole = fitted(source)
    write = trainer.Trainer._write_checkpoint

    def interrupted(self, target, step, **options):
        write(self, target, step, **options)
        if step == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "_write_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted(source, checkpoint=file)
    monkeypatch.setattr(trainer.Trainer, "_write_checkpoint", write)
    resumed = fitted(source, checkpoint=file)
    assert f"resumed from {file} after {last} steps" in resumed[0].notes
    check_equal(resumed, whole)


def test_a_checkpoint_is_of_the_same_rows_in_the_same_order(tmp_path, small_blocks):
    x, file = table(), tmp_path / "fit.ckpt"
    fitted(TensorDataset(torch.from_numpy(x)), checkpoint=file)
    other = x.copy()
    other[100, 0] += 1
    with pytest.raises(CheckpointError, match="its x is 103 x 4, float32"):
        fitted(TensorDataset(torch.from_numpy(other)), checkpoint=file)
    with pytest.raises(CheckpointError, match="its order is shuffled"):
        fitted(np.split(x, [50]), checkpoint=file)


@pytest.mark.parametrize("size", mostly_slow([17, 34], 17))  # both leave one row
@pytest.mark.parametrize("drop_last", [False, True])
def test_remainders(size, drop_last, monkeypatch, tmp_path, small_blocks):
    x = table()
    options = {"batch_size": size, "drop_last": drop_last}
    first, second, drawn = in_same_order(
        monkeypatch,
        lambda: fitted(mapped(x, tmp_path), **options),
        lambda: fitted(x, **options),
    )
    check_equal(first, second)
    sizes = [len(rows) for rows in drawn]
    assert sizes == ([size] * (N // size - 1) + [size + (not drop_last)]) * 2
    if drop_last:
        never = set(range(N)) - set(torch.cat(drawn).tolist())
        assert f"{len(never)} were in no batch at all" in str(first[0].notes)


@pytest.mark.parametrize("steps", [5, 12, 20])
def test_rows_never_drawn_are_counted(steps, small_blocks):
    order = row_order.RowOrder(row_source(Rows(table())))
    schedule = Schedule.of(N, 30, None, steps, drop_last=True, order=order)
    drawn = torch.cat(list(schedule.batches(7)))
    assert schedule.num_never_drawn(7) == N - len(set(drawn.tolist()))


def test_per_datum_parameters_keep_their_rows(monkeypatch, tmp_path, small_blocks):
    x = table()

    def make():
        ppca = PPCA(D, 2, seed=0) if "seed" in PPCA.__init__.__annotations__ else PPCA.like(x, 2)
        return ppca.model, PerDatumGuide(N, 2)

    first, second, _ = in_same_order(
        monkeypatch,
        lambda: fitted(parquet(x, tmp_path), make),
        lambda: fitted(x, make),
    )
    check_equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("missing", mostly_slow([False, True], True))
def test_captured_steps_are_recorded_once(missing, monkeypatch, tmp_path, small_blocks):
    captured, recorded = fit_module.CapturedSteps, []
    capture = FunctionalStep.capture

    def counted(self, state, inputs):
        recorded.append([[list(t.shape) for t in step.per_step] for step in inputs.steps])
        return capture(self, state, inputs)

    monkeypatch.setattr(FunctionalStep, "capture", counted)
    monkeypatch.setattr(fit_module, "CapturedSteps", partial(captured, compiled=False))
    x = table(missing)
    first, second, _ = in_same_order(
        monkeypatch,
        lambda: fitted(mapped(x, tmp_path), capture=True),
        lambda: fitted(x, capture=True),
    )
    check_equal(first, second)
    assert first[0].execution.startswith("compiled")
    batches = [[12], [12, D], [12, D]]
    unroll = len(recorded[0])
    assert recorded == [[batches[: 2 + missing]] * unroll, [[[12]]] * unroll]


@pytest.mark.parametrize("kind", mostly_slow(SOURCES, "folder"))
def test_bounds_of_sources(kind, tmp_path, small_blocks):
    x = table(missing=True)
    source, programs = SOURCES[kind](x, tmp_path), pair()
    in_memory = elbo(*programs, x, seed=1, batch_size=30)
    assert torch.equal(elbo(*programs, source, seed=1, batch_size=30), in_memory)
    found, expected = (log_likelihood(*programs, data, 30, seed=2) for data in (source, x))
    assert torch.equal(found.value, expected.value)
    assert torch.equal(found.num_entries, expected.num_entries)


@pytest.mark.parametrize("kind", mostly_slow(SOURCES, "folder"))
def test_gaps_and_imputations_of_sources(kind, tmp_path, small_blocks):
    x = table(missing=True)
    x = x[np.isfinite(x).any(1)][:40]
    source, programs = SOURCES[kind](x, tmp_path), pair()
    options = {"steps": 2, "num_samples": 20, "tolerance": None, "seed": 1}
    found, expected = (gaps(*programs, data, **options) for data in (source, x))
    assert torch.equal(found.elbo, expected.elbo)
    assert torch.equal(found.log_likelihood, expected.log_likelihood)
    found, expected = (impute(*programs, data, 30, draws=2, seed=2) for data in (source, x))
    for name in ("mean", "sd", "draws"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert torch.equal(found.ess.nan_to_num(), expected.ess.nan_to_num())


def test_imputed_tables_keep_their_numbers(tmp_path, small_blocks):
    """Observed values of a table of double precision stay as they are under any model."""
    x = table(missing=True).astype(np.float64) + 1e-10
    source, programs = parquet(x, tmp_path), pair()
    found = impute(*programs, source, 5, seed=0).mean.numpy()
    np.testing.assert_array_equal(found[np.isfinite(x)], x[np.isfinite(x)])


def test_rows_with_nothing_observed(tmp_path, small_blocks):
    x, programs = table(), pair()
    x[[3, 77]] = np.nan
    source = mapped(x, tmp_path)
    found, expected = (log_likelihood(*programs, data, 30, seed=2) for data in (source, x))
    assert torch.equal(found.value, expected.value)
    assert found.notes == expected.notes
    assert "2 rows with nothing observed" in str(fitted(source)[0].notes)
    with pytest.raises(ValueError, match=r"x_val has rows with nothing observed: \[3, 77\]"):
        fitted(table(), x_val=source)


@pytest.mark.parametrize("kind", mostly_slow(["memory map", "parquet file", "loader"], "loader"))
def test_validation_rows_from_a_source(kind, tmp_path, small_blocks):
    x, x_val = table(), table(missing=True)[:50]
    found, expected = (
        fitted(x, x_val=data, patience=3) for data in (SOURCES[kind](x_val, tmp_path), x_val)
    )
    check_equal(found, expected)
    assert found[0].validation.tolist() == expected[0].validation.tolist()


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("kind", mostly_slow(SOURCES, "folder"))
def test_exact_fits_to_sources(kind, missing, tmp_path):
    x = table(missing).astype(np.float64)
    source = SOURCES[kind](x, tmp_path)
    fits = [fit_em] if missing else [fit_em, fit_closed_form]
    for fit in fits:
        first, second = (PPCA.like(x, 2, seed=0) for _ in range(2))
        fit(first, source)
        fit(second, x)
        for found, expected in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        for method in (first.log_likelihood, first.posterior_mean):
            torch.testing.assert_close(method(source), method(x))


TYPES = {
    "float64": (pa.float64(), pa.float64()),
    "floats": (pa.float32(), pa.float64()),
    "float32": (pa.float32(), pa.float32()),
    "an integer": (pa.float32(), pa.int64()),
}


@pytest.mark.parametrize("name", TYPES)
def test_parquet_columns_of_any_type(name, tmp_path):
    """Null and NaN are missing; the dtype is that of a frame of the same columns."""
    values = [1.0, None, 3.0, 2.0], [4.0, 5.0, None, 7.0]
    columns = [pa.array(column, kind) for column, kind in zip(values, TYPES[name], strict=True)]
    table = pa.table(columns, names=["a", "b"])
    pa.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=3)
    source = row_source(tmp_path / "x.parquet")
    found = torch.cat([source.read(0, 3), source.read(3, 4)])
    frame = block_source.as_block(table, 0)
    expected = torch.tensor([[1.0, 4.0], [torch.nan, 5.0], [3.0, torch.nan], [2.0, 7.0]])
    assert found.dtype == frame.dtype
    torch.testing.assert_close(found, expected.to(found), rtol=0, atol=0, equal_nan=True)
