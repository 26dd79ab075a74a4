"""Tables, splits and units."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import oracles
from ppl_vae import PPCA, fit_closed_form
from ppl_vae.data import Split, Units, digits, read_table, split

TABLE = np.array([[1.5, 2.0, -3.0], [4.0, 5e-3, 6.0], [7.0, 8.0, 9.25]])


def test_digits_are_sixteenths():
    assert digits().shape == (1797, 64)
    assert np.array_equal(digits() * 16, load_digits().data)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", " "])
@pytest.mark.parametrize("header", ["", "a b c", '"a" "b" "c"'])
def test_text_tables(tmp_path, delimiter, header):
    path = tmp_path / "table.csv"
    lines = [header.replace(" ", delimiter)] if header else []
    lines += [delimiter.join(map(str, row)) for row in TABLE]
    path.write_text("\n".join(lines) + "\n")
    assert np.array_equal(read_table(path), TABLE)


def test_one_column_and_byte_order_mark(tmp_path):
    path = tmp_path / "one.csv"
    path.write_text("﻿value\n1\n2\n3\n", encoding="utf-8")
    assert np.array_equal(read_table(path), [[1.0], [2.0], [3.0]])


def test_numpy_tables(tmp_path):
    np.save(tmp_path / "x.npy", TABLE)
    assert np.array_equal(read_table(tmp_path / "x.npy"), TABLE)
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        read_table(tmp_path / "object.npy")


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "x.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"must end in \.csv"):
        read_table(tmp_path / "x.xlsx")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_table(tmp_path / "empty.csv")
    (tmp_path / "words.csv").write_text("a,b\n1,red\n2,blue\n")
    with pytest.raises(ValueError, match=r"not numbers: \['b'\]"):
        read_table(tmp_path / "words.csv")
    (tmp_path / "ragged.csv").write_text("1,2\n3,4\n5,6,7\n")
    with pytest.raises(ValueError, match="is no table"):
        read_table(tmp_path / "ragged.csv")


@pytest.mark.data
@pytest.mark.skipif("PPL_VAE_DATA" not in os.environ, reason="PPL_VAE_DATA is not set")
def test_a_real_table():
    path = Path(os.environ["PPL_VAE_DATA"]) / "Tobamovirus" / "tobamovirus.csv"
    x = read_table(path)
    values = oracles.sample_spectrum(x)[0]
    # The two leading principal components hold 68.8 % of the variance.
    assert x.shape == (38, 18)
    assert values[:2].sum() / values.sum() == pytest.approx(0.688, abs=5e-4)


def rows_of(*parts):
    return sorted(tuple(row) for part in parts for row in part.tolist())


def test_splits_are_disjoint_and_complete():
    x = torch.arange(300.0).reshape(100, 3)
    parts = split(x, seed=3)
    assert [len(p) for p in (parts.train, parts.val, parts.test)] == [75, 8, 17]
    assert rows_of(parts.train, parts.val, parts.test) == rows_of(x)
    again, other = split(x, seed=3), split(x, seed=4)
    assert torch.equal(parts.train, again.train) and not torch.equal(parts.train, other.train)


def test_given_test_rows_are_used_as_they_are():
    x, x_test = torch.arange(300.0).reshape(100, 3), -torch.ones(7, 3)
    parts = split(x, x_test)
    assert isinstance(parts, Split)
    assert torch.equal(parts.test, x_test)
    assert rows_of(parts.train, parts.val) == rows_of(x)
    with pytest.raises(ValueError, match="x_test has 2 columns, x 3"):
        split(x, x_test[:, :2])
    with pytest.raises(ValueError, match="too few"):
        split(x[:4])


def test_units_move_log_p_by_their_jacobian():
    x = torch.from_numpy(oracles.simulate_ppca((16, 8, 4), 1, 60, 7, seed=0)) * 1e4
    units = Units.of(x)
    inner = units.apply(x)
    assert inner.mean(0).abs().max() < 1e-10
    assert inner.var(0, correction=0).mean().item() == pytest.approx(1)
    models = PPCA.like(x, 3, seed=0), PPCA.like(inner, 3, seed=0)
    for model, rows in zip(models, (x, inner), strict=True):
        fit_closed_form(model, rows)
    ours, theirs = models[0].log_likelihood(x), models[1].log_likelihood(inner)
    assert (ours - theirs - units.log_jacobian).abs().max() < 1e-8
    assert units.log_jacobian == pytest.approx(-7 * math.log(float(units.scale)))
    with pytest.raises(ValueError, match="does not vary"):
        Units.of(torch.ones(4, 2))
