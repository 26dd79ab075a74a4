"""What is refused of rows that are read in blocks, by name, and what is noted."""

import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from torch.utils import data as torch_data

from ppl_vae import PPCA, VAE, elbo, fit_closed_form, fit_svi, impute
from ppl_vae.data.sources import observed_rows, parquet_source
from ppl_vae.models.storage import load, save

N, D = 60, 3
X = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
TENSOR = torch.from_numpy(X)


def fit(source, **options):
    vae = VAE.mlp(D, 2, hidden=(4,), seed=0)
    options = {"steps": 2, "batch_size": 10, "seed": 0, "capture": False} | options
    return fit_svi(vae.model, vae.guide, source, **options)


class Items(torch_data.Dataset):
    """A dataset of given items, or of those that a function of the place makes."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return N if callable(self.items) else len(self.items)

    def __getitem__(self, place):
        return self.items(place) if callable(self.items) else self.items[place]


class Stream(torch_data.IterableDataset):
    """A stream that ends earlier each time it is read."""

    def __init__(self, numbers):
        self.numbers = iter(numbers)

    def __iter__(self):
        yield from TENSOR[: next(self.numbers)]


class Once:
    """An iterable whose blocks are used up by the first reading."""

    def __init__(self):
        self.blocks = iter([X])

    def __iter__(self):
        return self.blocks


class Unsized(torch_data.Dataset):
    def __getitem__(self, place):
        return TENSOR[place]


class Photograph:
    pass


def changed(place, value):
    x = TENSOR.clone()
    x[place] = value
    return x


BAD = {
    "text": (Items(["a", "b"]), TypeError, r"x must yield rows.* it yields str 'a'"),
    "text in rows": (Items(lambda n: (["a", "b"], 0)), TypeError, "of numbers; it yields list"),
    "objects": (Items(lambda n: Photograph()), TypeError, "it yields Photograph"),
    "dictionaries": (Items(lambda n: {"x": TENSOR[n]}), TypeError, "it yields dict"),
    "dictionaries in batches": (
        torch_data.DataLoader(
            Items(lambda n: {"x": TENSOR[n]}), batch_size=5, collate_fn=lambda b: b[0]
        ),
        TypeError,
        "it yields dict.*collate_fn",
    ),
    "three parts": (
        torch_data.TensorDataset(TENSOR, TENSOR, TENSOR),
        TypeError,
        "it yields 3 parts",
    ),
    "numbers": (torch_data.TensorDataset(TENSOR[:, 0]), ValueError, r"an array of shape \(1,\)"),
    "ragged": (
        Items(lambda n: TENSOR[n, : 2 + (n != 7)]),
        ValueError,
        r"the same shape; row 7 has \(2,\), row 0 has \(3,\)",
    ),
    "changing widths": ([X[:20], X[20:, :2]], ValueError, r"they have \[2, 3\] columns"),
    "no items": (Items([]), ValueError, "without items"),
    "missing values": (
        torch_data.TensorDataset(changed(5, np.nan)),
        ValueError,
        "x has 3 missing entries, but the model takes no keyword 'mask'",
    ),
    "infinite values": (
        torch_data.TensorDataset(changed(5, np.inf)),
        ValueError,
        "x has 3 infinite entries",
    ),
    "another width": (
        torch_data.TensorDataset(TENSOR[:, :2]),
        ValueError,
        r"must have shape \(rows, 3\)",
    ),
    "an iterator": (iter([X]), ValueError, "can be read only once"),
    "a generator": ((part for part in [X]), ValueError, "can be read only once"),
    "weights": (
        torch_data.DataLoader(
            torch_data.TensorDataset(TENSOR),
            10,
            sampler=torch_data.WeightedRandomSampler([1.0] * N, N),
        ),
        ValueError,
        "a WeightedRandomSampler, which does not draw each row once per epoch",
    ),
    "shares of several processes": (
        torch_data.DataLoader(
            torch_data.TensorDataset(TENSOR),
            10,
            sampler=torch_data.DistributedSampler(TENSOR, num_replicas=2, rank=0),
        ),
        ValueError,
        r"a DistributedSampler, .* \(loader.dataset\)",
    ),
    "own batches": (
        torch_data.DataLoader(torch_data.TensorDataset(TENSOR), batch_sampler=[[0, 1], [2, 3]]),
        ValueError,
        r"a list, .* \(loader.dataset\)",
    ),
    "an iterator that begins once": (Once(), ValueError, "can be read only once"),
    "no length": (Unsized(), TypeError, "x is a Dataset without a length"),
    "nothing streamed": (Stream([0] * 9), ValueError, "x is empty"),
    "rows without batches": (
        torch_data.DataLoader(Stream([N] * 9), batch_size=None),
        ValueError,
        r"batches of rows, \(B, D\); it yields an array of shape \(3,\)",
    ),
    "named fields": (np.zeros(9, [("a", "f4"), ("b", "f4")]), TypeError, "x"),
    "replacement": (
        torch_data.DataLoader(
            torch_data.TensorDataset(TENSOR),
            10,
            sampler=torch.utils.data.RandomSampler(TENSOR, replacement=True),
        ),
        ValueError,
        r"a RandomSampler, .* \(loader.dataset\)",
    ),
    "other batches": (
        torch_data.DataLoader(torch_data.TensorDataset(TENSOR), batch_size=20),
        ValueError,
        "batch_size=10 is not the batch_size of the DataLoader, 20",
    ),
    "no file": ("nowhere.parquet", ValueError, "does not exist: 'nowhere.parquet'"),
    "another file": ("x.csv", TypeError, r"ppl_vae.read_table\('x.csv'\)"),
    "a dictionary": ({"a": X}, TypeError, "x is a dictionary with the keys 'a'"),
}


def no_mask(vae):
    def model(x, index=None, num_data=None):
        return vae.model(x, index=index, num_data=num_data)

    return model


@pytest.mark.parametrize("loaded", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_source_of_rows_is_refused(kind, loaded, monkeypatch):
    source, error, match = BAD[kind]
    if not loaded:
        monkeypatch.setattr(observed_rows, "LOADED_NUMBERS", 0)
    vae = VAE.mlp(D, 2, hidden=(4,), seed=0)
    model = no_mask(vae) if kind == "missing values" else vae.model
    with pytest.raises(error, match=match):
        fit_svi(model, vae.guide, source, steps=2, batch_size=10, capture=False)


def test_a_folder_without_parquet_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no Parquet files .*read_table"):
        fit(tmp_path)


def test_arguments_that_need_all_rows_are_refused(monkeypatch):
    monkeypatch.setattr(observed_rows, "LOADED_NUMBERS", 0)
    source = torch_data.TensorDataset(TENSOR)
    with pytest.raises(ValueError, match=r"batch_size is required .* x has 60 rows"):
        fit(source, batch_size=None)
    with pytest.raises(ValueError, match="epoch_transform needs all rows in memory"):
        fit(source, epoch_transform=lambda x, generator: x)
    with pytest.raises(ValueError, match=r"mask requires .* may yield \(rows, mask\)"):
        fit(source, mask=np.ones((N, D), bool))
    with pytest.raises(ValueError, match=r"x_val must have shape \(rows, 3\)"):
        fit(source, x_val=torch_data.TensorDataset(TENSOR[:, :2]))


def test_random_rows_are_new_in_each_epoch_and_not_resumed(tmp_path):
    drawn = []

    def row(place):
        drawn.append(place)
        return TENSOR[place] + torch.randn(D)

    first, second = (fit(Items(row), steps=12).objective.tolist() for _ in range(2))
    assert first == second  # of one seed, and never loaded
    assert drawn.count(3) >= 4
    with pytest.raises(ValueError, match="checkpoint= needs an x that gives the same rows"):
        fit(Items(row), checkpoint=tmp_path / "file")


def test_random_rows_have_no_observed_values_to_keep():
    vae = VAE.mlp(D, 2, hidden=(4,), seed=0)
    rows = Items(lambda place: TENSOR[place] + torch.randn(D))
    with pytest.raises(ValueError, match="x gives other rows each time it is read"):
        impute(vae.model, vae.guide, rows, 5)


def test_streams_must_have_the_same_number_of_rows(monkeypatch):
    monkeypatch.setattr(observed_rows, "LOADED_NUMBERS", 0)
    with pytest.raises(ValueError, match="x ended after 40 rows, but had more"):
        fit(Stream([60, 60, 60, 40]), steps=20)


def test_global_generators_are_left_alone():
    state = torch.get_rng_state()
    fit(torch_data.DataLoader(torch_data.TensorDataset(TENSOR), batch_size=10, shuffle=True))
    fit(Items(lambda n: TENSOR[n] + torch.randn(D)))
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_are_noted_and_not_used():
    labels = torch.arange(N)
    found = fit(
        torch_data.DataLoader(
            torch_data.TensorDataset(TENSOR, labels), batch_size=10, shuffle=True
        )
    )
    assert "labels that came with the rows of x were not used" in found.notes
    assert found.objective.tolist() == fit(TENSOR).objective.tolist()
    assert fit(Items(lambda n: (TENSOR[n], f"name {n}"))).notes == found.notes


def test_images_are_flattened_as_in_the_loop_of_a_tutorial():
    images = TENSOR.reshape(N, 1, 3, 1)
    loader = torch_data.DataLoader(Items(lambda n: (images[n], n)), batch_size=10, shuffle=True)
    assert fit(loader).objective.tolist() == fit(TENSOR).objective.tolist()


def test_lists_and_whole_numbers_are_rows():
    whole = (TENSOR * 10).round()
    found = fit(Items([row.int().tolist() for row in whole]))
    assert found.objective.tolist() == fit(whole).objective.tolist()


def test_subsets_are_data_sets_of_their_own():
    chosen = list(range(5, 45))
    expected = fit(TENSOR[5:45]).objective.tolist()
    assert (
        fit(torch_data.Subset(torch_data.TensorDataset(TENSOR), chosen)).objective.tolist()
        == expected
    )
    sampler = torch_data.SubsetRandomSampler(chosen)
    loader = torch_data.DataLoader(torch_data.TensorDataset(TENSOR), 10, sampler=sampler)
    assert fit(loader).objective.tolist() == expected


def test_batches_of_a_loader():
    loader = torch_data.DataLoader(
        torch_data.TensorDataset(TENSOR), batch_size=25, shuffle=True, drop_last=True
    )
    found = fit(loader, batch_size=None, steps=None, epochs=3)
    assert found.steps == 6
    assert "drop_last left 10 of 60 rows out of each epoch" in str(found.notes)
    by_size = torch_data.DataLoader(torch_data.TensorDataset(TENSOR), batch_size=100, shuffle=True)
    assert (
        fit(by_size, batch_size=None).objective.tolist()
        == fit(TENSOR, batch_size=None).objective.tolist()
    )


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_of_a_batch_sampler(shuffle):
    """A sampler of batches is that of the loader's own arguments."""
    rows = torch_data.TensorDataset(TENSOR)
    order = torch_data.RandomSampler(rows) if shuffle else torch_data.SequentialSampler(rows)
    batches = torch_data.BatchSampler(order, 25, drop_last=True)
    options = {"batch_size": None, "steps": None, "epochs": 3}
    found = fit(torch_data.DataLoader(rows, batch_sampler=batches), **options)
    expected = fit(torch_data.DataLoader(rows, 25, shuffle=shuffle, drop_last=True), **options)
    assert found.objective.tolist() == expected.objective.tolist()


def write(folder, file, **columns):
    path = folder / file
    pa.parquet.write_table(pa.table(columns), path)
    return path


def test_columns_are_matched_by_name(tmp_path):
    a, b, c = X.T
    ppca = PPCA.like(X, 2, seed=0)
    fit_closed_form(ppca, write(tmp_path, "fit.parquet", a=a, b=b, c=c))
    assert ppca.schema.names == ("a", "b", "c")
    save(ppca, tmp_path / "model.pt")
    other = write(tmp_path, "other.parquet", c=c, b=b, more=a, a=a)
    vae = VAE.mlp(D, 2, hidden=(4,), seed=0)
    fit_svi(
        vae.model, vae.guide, tmp_path / "fit.parquet",
        steps=2, batch_size=10, seed=0, capture=False,
    )  # fmt: skip
    expected = elbo(vae.model, vae.guide, X, seed=0)
    with pytest.warns(UserWarning, match="x has columns .* left out: 'more'"):
        found = elbo(vae.model, vae.guide, other, seed=0)
    assert torch.equal(found, expected)
    frame = pd.DataFrame({"c": c, "a": a, "b": b})
    assert torch.equal(
        torch.tensor(elbo(vae.model, vae.guide, frame, seed=0).to_numpy()), expected
    )
    with pytest.raises(ValueError, match=r"x lacks 1 of the 3 columns .* 'b'"):
        elbo(vae.model, vae.guide, write(tmp_path, "less.parquet", a=a, c=c), seed=0)
    assert load(tmp_path / "model.pt").schema == ppca.schema


def test_files_of_a_folder_have_the_same_columns(tmp_path):
    a, b, c = X.T
    write(tmp_path, "1.parquet", a=a, b=b, c=c)
    write(tmp_path, "2.parquet", c=c, a=a, b=b)
    twice = np.concatenate([X, X])
    assert fit(tmp_path).objective.tolist() == fit(twice).objective.tolist()
    write(tmp_path, "3.parquet", a=a, c=c)
    with pytest.raises(ValueError, match=r"3.parquet lacks \['b'\], which .*1.parquet has"):
        fit(tmp_path)


def test_columns_without_numbers_are_named(tmp_path):
    path = write(tmp_path, "x.parquet", a=X[:, 0], name=["text"] * N, b=X[:, 1])
    with pytest.raises(TypeError, match=r"columns that are not numeric: \['name'\]"):
        fit(path)


def test_the_index_of_a_pandas_frame_is_no_column(tmp_path):
    frame = pd.DataFrame(X, columns=["a", "b", "c"], index=np.arange(N) * 2)
    frame.to_parquet(tmp_path / "x.parquet")
    assert fit(tmp_path / "x.parquet").objective.tolist() == fit(X).objective.tolist()


def test_pyarrow_is_needed_for_parquet_alone(tmp_path, monkeypatch):
    path = write(tmp_path, "x.parquet", a=X[:, 0])

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(parquet_source.importlib, "import_module", absent)
    with pytest.raises(ImportError, match=re.escape("not installed: pip install pyarrow")):
        fit(path)
    fit(TENSOR)
