"""Entries of arrays and frames: what is a number, what is missing, and what is refused by name."""

import datetime
import decimal
import types

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
import xarray as xr

from ppl_vae.core import validation
from ppl_vae.core.arrays.entries import DENSE_BYTES
from ppl_vae.core.arrays.frame_labels import PandasLabels
from ppl_vae.core.arrays.schema import RowLabels, TableSchema
from ppl_vae.core.validation import as_matrix, as_vector

X = np.array([[1.5, 2.0, 3.0], [4.0, np.nan, 6.0]])
FRAME = pd.DataFrame(X, columns=["a", "b", "c"], index=["r", "s"])
DAY = datetime.date(2020, 1, 1)


def same(found, expected):
    torch.testing.assert_close(
        found.double(), torch.as_tensor(expected).double(), equal_nan=True, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (X + 1j, "x has complex entries; it must have real ones"),
        (np.ma.array(X + 1j, mask=X == 2), "must hold numbers; its entries are of type complex"),
        (torch.tensor(X + 1j), "x has complex entries"),
        (np.nan_to_num(X).astype("m8[s]"), "must hold numbers.*timedelta64"),
        (np.nan_to_num(X).astype("M8[s]"), "must hold numbers.*datetime64"),
        (np.array([["1", "2"]]), "must hold numbers.*<U1"),
        (np.array([[1, "2"], [3, 4]], dtype=object), r"not numeric: \[1\].*'2', which is of type"),
        ([[10**400, 1.0]], r"not numeric: \[0\].*whole numbers too large for float64"),
        ((row for row in X), "must hold numbers; it is of type generator"),
        (None, "must hold numbers; it is of type NoneType"),
        (FRAME.assign(a=[1j, 2j]), r"not numeric: \['a'\].*complex128"),
        (FRAME.assign(b=pd.to_timedelta([1, 2])), r"not numeric: \['b'\].*timedelta64"),
        (FRAME.assign(c=pd.Timestamp("2020-01-01")), r"not numeric: \['c'\].*datetime64"),
        (FRAME.assign(c=pd.Timestamp("2020-01-01", tz="UTC")), r"not numeric: \['c'\].*UTC"),
        (FRAME.assign(d=pd.Categorical([1, 2])), r"not numeric: \['d'\].*category"),
        (FRAME.assign(d=pd.Categorical([True, False])), r"not numeric: \['d'\].*category"),
        (FRAME.assign(d=[DAY, DAY]), r"not numeric: \['d'\].*of type date"),
        (FRAME.assign(d=["1", "2"], e=["x", "y"]), r"not numeric: \['d', 'e'\] \(they hold str"),
        (xr.Dataset({"t": ("row", np.array([1], "m8[s]"))}), r"not numeric: \['t'\].*timedelta"),
        (types.SimpleNamespace(values=X), "it is of type SimpleNamespace"),
    ],
)
def test_what_is_no_real_number_is_refused_by_name(x, match):
    with pytest.raises(TypeError, match=match):
        as_matrix(x)


def test_frames_of_other_libraries_are_refused_by_name():
    polars = pytest.importorskip("polars")
    wrong = polars.DataFrame({"a": [1.0], "t": [DAY], "s": ["x"], "c": [True]})
    with pytest.raises(TypeError, match=r"not numeric: \['t', 's'\] \(they hold Date"):
        as_matrix(wrong)
    with pytest.raises(TypeError, match=r"x is a lazy frame.*pass x\.collect\(\)"):
        as_matrix(wrong.lazy())


def test_numbers_of_any_type_are_converted_exactly():
    numbers = np.array([[1, 2.5, decimal.Decimal("0.5")], [True, None, np.float32(2)]], object)
    same(as_matrix(numbers), [[1, 2.5, 0.5], [1, np.nan, 2]])
    assert as_matrix(FRAME.astype("float32")).dtype == torch.float32
    assert as_matrix(FRAME.astype("Float32")).dtype == torch.float32
    assert as_matrix(FRAME[["a"]].astype(int)).dtype == torch.get_default_dtype()
    ids = [[123_456_789, 1], [987_654_321, 2]]
    for kind in (np.array(ids), pd.DataFrame(ids), torch.tensor(ids), ids):
        assert as_matrix(kind).dtype == torch.float64
        same(as_matrix(kind), ids)


def test_digits_that_float64_does_not_hold_are_warned_of():
    finer = np.array([[1.0]], dtype=np.longdouble) / 3
    if finer.dtype.itemsize == 8:
        pytest.skip("this platform has no finer numbers than float64")
    with pytest.warns(UserWarning, match="more digits than float64"):
        as_matrix(finer)


@pytest.mark.parametrize("convert", [lambda x: x.astype("f2"), lambda x: torch.tensor(x).half()])
def test_half_precision_is_converted_with_a_warning(convert):
    with pytest.warns(UserWarning, match="float16.*converted to float32"):
        found = as_matrix(convert(X))
    assert found.dtype == torch.float32
    same(found, X)
    with pytest.warns(UserWarning, match="float16.*converted to float32"):
        as_matrix(FRAME.astype("float16"))


@pytest.mark.parametrize("kind", [np.array, torch.tensor, pd.DataFrame, np.ndarray.tolist])
def test_masked_entries_are_missing_whatever_they_are(kind):
    x, mask = np.where(np.isnan(X), np.inf, X), ~np.isnan(X)
    for given in (
        mask,
        torch.tensor(mask),
        mask.tolist(),
        pd.DataFrame(mask),
        [mask[:1], mask[1:]],
    ):
        same(as_matrix(kind(x), mask=given), X)
    same(as_matrix(np.ma.array(x, mask=~mask)), X)
    with pytest.raises(ValueError, match="x has 1 infinite entries"):
        as_matrix(kind(x))


def test_a_mask_is_boolean_and_matched_by_name():
    mask = pd.DataFrame(~np.isnan(X), columns=list("abc"))[["c", "a", "b"]]
    same(as_matrix(FRAME.fillna(9), mask=mask), X)
    with pytest.raises(ValueError, match=r"mask must be boolean.*float64"):
        as_matrix(X, mask=np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"mask must be boolean.*\(2, 2\)"):
        as_matrix(X, mask=np.ones((2, 2), bool))
    with pytest.raises(ValueError, match="mask has masked entries itself"):
        as_matrix(X, mask=np.ma.array(np.ones((2, 3), bool), mask=np.isnan(X)))


def test_sparse_matrices_are_converted_with_a_warning_or_refused_with_their_size(monkeypatch):
    x = np.nan_to_num(X)
    coo = torch.tensor(x).to_sparse()
    for sparse in (scipy.sparse.csr_matrix(x), scipy.sparse.coo_array(x), coo):
        with pytest.warns(UserWarning, match=r"converted to a dense one of shape \(2, 3\)"):
            same(as_matrix(sparse), x)
    size = int((DENSE_BYTES / 8) ** 0.5) + 1
    with pytest.raises(ValueError, match=r"sparse matrix of shape.*which would take 2 GiB"):
        as_matrix(scipy.sparse.csr_matrix((size, size)))


def test_blocks_are_concatenated_and_their_columns_matched():
    same(as_matrix([FRAME[:1], FRAME[1:][["c", "b", "a"]]]), X)
    same(as_matrix((torch.tensor(X[:1]), X[1:])), X)
    with pytest.raises(ValueError, match=r"must have the same width; they have \[2, 3\] columns"):
        as_matrix([X, X[:, :2]])
    with pytest.raises(ValueError, match=r"block 1 of x lacks 1 of the 3 columns.*'c'"):
        as_matrix([FRAME, FRAME[["a", "b"]]])


def test_columns_are_matched_by_name_and_positions():
    schema = TableSchema.of(FRAME)
    same(as_matrix(FRAME[["c", "a", "b"]], schema=schema), X)
    with pytest.warns(UserWarning, match=r"was not fitted to, which are left out: 'note'"):
        same(as_matrix(FRAME.assign(note="text"), schema=schema), X)
    mask = np.c_[np.ones((2, 1), bool), np.isnan(X)]
    wider = pd.concat([pd.Series(1.0, FRAME.index, name="extra"), FRAME.fillna(0)], axis=1)
    with pytest.warns(UserWarning, match="'extra'"):
        same(as_matrix(wider, mask=mask, schema=schema).isnan(), ~np.isnan(X))
    same(as_matrix(X[:, ::-1].copy(), schema=schema), X[:, ::-1].copy())
    same(as_matrix(pd.DataFrame(X), schema=schema), X)
    with pytest.raises(ValueError, match=r"x lacks 2 of the 3 columns.*: 'b', 'c'"):
        as_matrix(FRAME[["a"]], schema=schema)
    with pytest.raises(ValueError, match=r"several columns of one name, 'a'"):
        as_matrix(FRAME[["a", "b", "c", "a"]], schema=schema)


def test_numbered_columns_are_matched_by_number():
    numbered = pd.DataFrame(X)
    schema = TableSchema.of(numbered)
    same(as_matrix(numbered[[2, 0, 1]], schema=schema), X)
    same(as_matrix(FRAME, schema=schema), X)


def test_a_schema_is_restored_from_json():
    schema = TableSchema.of(FRAME.rename(columns={"a": 3, "b": ("x", 1)}))
    assert schema.names == (3, "('x', 1)", "c")
    assert TableSchema.from_json(schema.to_json()) == schema
    assert TableSchema.of(X) is None
    assert TableSchema.of([FRAME, FRAME]) == TableSchema.of(FRAME)
    for wrong in ({}, {"names": "abc", "library": "pandas"}, {"names": [1.5], "library": "p"}):
        with pytest.raises(ValueError, match="no schema of a table"):
            TableSchema.from_json(wrong)


def test_results_of_a_pandas_frame_keep_its_index_and_columns():
    columns = pd.MultiIndex.from_tuples([("x", 1), ("x", 2), ("y", 1)], names=["site", "run"])
    index = pd.date_range("2020-01-01", periods=2, name="day")
    given = pd.DataFrame(X, index=index, columns=columns)
    labels = RowLabels.of(given)
    pd.testing.assert_frame_equal(labels.data(torch.tensor(X)), given)
    codes = labels.codes(torch.tensor(X[:, :2]))
    assert codes.index.equals(index) and list(codes.columns) == ["z1", "z2"]
    row = labels.rows(torch.tensor(X[:, 0]), "log_likelihood")
    assert row.index.equals(index) and row.name == "log_likelihood"
    taken = labels.take(torch.tensor([1])).rows(torch.tensor(X[1:, 0]), "p")
    assert taken.index.equals(index[1:])
    assert isinstance(labels.frame_labels, PandasLabels)


def test_results_of_an_xarray_are_xarrays():
    given = xr.DataArray(X, dims=("t", "v"), coords={"t": [5, 6], "v": list("abc")})
    labels = RowLabels.of(given)
    xr.testing.assert_identical(labels.data(torch.tensor(X)), given)
    assert labels.codes(torch.tensor(X[:, :2])).indexes["code"].tolist() == ["z1", "z2"]
    assert labels.rows(torch.tensor(X[:, 0]), "p").indexes["t"].tolist() == [5, 6]
    assert labels.take(torch.tensor([1])).rows(torch.tensor(X[1:, 0]), "p")["t"] == 6
    data_set = given.to_dataset("v")
    labels = RowLabels.of(data_set)
    xr.testing.assert_equal(labels.data(torch.tensor(X)), data_set)
    with pytest.raises(ValueError, match=r"x must be 2-d.*x\.stack"):
        as_matrix(xr.DataArray(np.zeros((2, 2, 2))))
    with pytest.raises(ValueError, match="1-d variables with one common dimension"):
        as_matrix(xr.Dataset({"a": ("t", [1.0]), "b": ("u", [1.0])}))


@pytest.mark.parametrize("library", ["polars", "pyarrow"])
def test_results_of_other_frames_are_of_their_library(library):
    module = pytest.importorskip(library)
    columns = {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    given = module.DataFrame(columns) if library == "polars" else module.table(columns)
    labels, values = RowLabels.of(given), torch.tensor([[1.0, 3.0], [2.0, 4.0]])
    assert type(labels.data(values)) is type(given)
    same(as_matrix(labels.data(values)), values)
    same(as_vector(labels.rows(values[:, 0], "p")), values[:, 0])
    assert TableSchema.of(given) == TableSchema(("a", "b"), library)
    drawn = TableSchema.of(given).frame(values)
    assert type(drawn) is type(given)


def test_results_of_arrays_are_tensors():
    labels, values = RowLabels.of(X), torch.tensor(X)
    assert labels.data(values) is values and labels.codes(values) is values
    assert labels.rows(values[:, 0], "p").shape == (2,)
    with pytest.raises(ValueError, match="no labels"):
        labels.named({})


def test_a_vector_is_one_number_per_row():
    for values in ([1, 2], np.array([1.0, 2.0]), pd.Series([1.0, 2.0], ["r", "s"])):
        same(as_vector(values), [1.0, 2.0])
    with pytest.raises(ValueError, match=r"log_p must be 1-d, one number per row.*\(2, 3\)"):
        as_vector(X, name="log_p")
    assert validation.HALF_DTYPES
