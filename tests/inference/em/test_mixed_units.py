"""A fit with isotropic noise to columns of mixed units has one note on them, however x comes."""

import numpy as np
import pandas as pd
import pytest
import torch

from ppl_vae import PPCA, fit_closed_form, fit_em, read_table, variational_em
from ppl_vae.data.column_scales import MIXED_COLUMNS

UNITS = np.array([1.0, 1.0, 0.02, 300.0])


def rows(*, missing=False):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 1)) @ rng.normal(size=(1, 4)) + rng.normal(size=(60, 4))
    x = x / x.std(0) * UNITS
    if missing:
        x[::7, 1] = np.nan
    return x


KINDS = {
    "array": np.asarray,
    "tensor": torch.from_numpy,
    "frame": lambda x: pd.DataFrame(x, columns=list("abcd")),
    "blocks": lambda x: [x[:25], x[25:]],
    "iterable of blocks": lambda x: Blocks([x[:25], x[25:]]),
}


class Blocks:
    def __init__(self, blocks):
        self.blocks = blocks

    def __iter__(self):
        return iter(self.blocks)


def mixed(fit):
    return [note for note in fit.notes if note.startswith(MIXED_COLUMNS)]


@pytest.mark.parametrize("kind", KINDS)
def test_one_note_names_the_range_and_the_remedies(kind):
    x = KINDS[kind](rows())
    for function in (fit_closed_form, fit_em, variational_em):
        (note,) = mixed(function(PPCA.like(x, 1, seed=0), x))
        assert note.startswith(f"{MIXED_COLUMNS} 0.02 to 300: isotropic noise has one variance")
        assert "standardise them" in note and "noise='diagonal'" in note
        assert str(function(PPCA.like(x, 1, seed=0), x)).count(MIXED_COLUMNS) == 1
    incomplete = KINDS[kind](rows(missing=True))
    assert len(mixed(fit_em(PPCA.like(incomplete, 1, seed=0), incomplete, starts=2))) == 1


def test_no_note_where_units_do_not_matter():
    x = rows()
    standardized = x / UNITS
    assert not mixed(fit_em(PPCA.like(x, 1, noise="diagonal", seed=0), x))
    for same in (standardized, 1e5 * standardized, 1e-70 * standardized):
        assert not mixed(fit_em(PPCA.like(same, 1, seed=0), same))
    grey = torch.from_numpy(np.random.default_rng(0).random((50, 6)))
    grey[:, 0] *= 0.01  # an edge of an image
    assert not mixed(fit_closed_form(PPCA.like(grey, 1, seed=0), grey))
    extreme = 1e-70 * x  # is rescaled
    (note,) = mixed(fit_em(PPCA.like(extreme, 1, seed=0), extreme))
    assert "2e-72 to 3e-68" in note


def test_constant_columns_are_no_unit():
    x = np.column_stack([rows()[:, :2], np.full(60, 1e6), rows()[:, 0] + rows()[:, 1]])
    fit = fit_closed_form(PPCA.like(x, 1, seed=0), x)
    assert not mixed(fit) and "constant columns: 2" in str(fit)


def test_a_table_is_taken_as_its_frame(tmp_path):
    frame = pd.DataFrame(rows(missing=True), columns=list("abcd"))
    frame.insert(0, "name", [f"row {n}" for n in range(len(frame))])
    frame.to_csv(tmp_path / "t.csv", index=False)
    table = read_table(tmp_path / "t.csv")
    assert table.row_names is not None
    ppca = PPCA.like(table, 1, seed=0)
    fit_em(ppca, table)
    assert ppca.schema is not None and ppca.schema.names == ("a", "b", "c", "d")
    other = PPCA.like(table.values, 1, seed=0)
    fit_em(other, table.values)
    torch.testing.assert_close(ppca.loadings, other.loadings, rtol=0, atol=0)
    filled = ppca.impute(table).to_frame()
    assert list(filled.columns) == list("abcd") and filled.index[3] == "row 3"
