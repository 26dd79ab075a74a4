"""Undetermined covariances: they are found, reported, and have no standard deviations."""

import itertools
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_wine
from typer.testing import CliRunner

import oracles
from ppl_vae import PPCA, fit_closed_form, fit_em, load, save, variational_em
from ppl_vae.cli.main import app
from ppl_vae.data.files.tables import Table
from ppl_vae.data.sources.row_blocks import RowBlocks
from ppl_vae.evaluation.prediction.masked_cv import select_by_masked_cv
from ppl_vae.fitted.filled_table import FilledTable
from ppl_vae.interop.sklearn import PPCATransformer
from ppl_vae.models.linear.identifiability import (
    describe_undetermined,
    undetermined_entries,
    undetermined_pairs,
)


def groups(*columns, rows=40, width=None):
    """A mask in which ``rows`` rows observe each of these groups of columns."""
    width = width or 1 + max(itertools.chain(*columns))
    mask = np.zeros((rows * len(columns), width), dtype=bool)
    for place, group in enumerate(columns):
        mask[place * rows : (place + 1) * rows, list(group)] = True
    return mask


def with_complete(mask, rows):
    return np.vstack([mask, np.ones((rows, mask.shape[1]), dtype=bool)])


def pairs_of(mask, latent_dim):
    x = np.where(mask, np.random.default_rng(0).normal(size=mask.shape), np.nan)
    found = undetermined_pairs(RowBlocks(x), latent_dim)
    return set() if found is None else {tuple(pair) for pair in found.tolist()}


def slow_pairs(mask, latent_dim):
    """Pairs found by trying every separating set of fewer than K columns."""
    num_rows, width = mask.shape
    found = set()
    for first, second in itertools.combinations(range(width), 2):
        others = [d for d in range(width) if d not in (first, second)]
        for c in range(latent_dim):
            for columns in itertools.combinations(others, c):
                left = [d for d in range(width) if d not in columns]
                for rows in itertools.combinations(range(num_rows), latent_dim - c):
                    kept = [n for n in range(num_rows) if n not in rows]
                    if not connected(mask[kept][:, left], left.index(first), left.index(second)):
                        found.add((first, second))
    return found


def connected(mask, first, second):
    reached = {first}
    while True:
        rows = mask[:, sorted(reached)].any(1)
        more = reached | set(np.flatnonzero(mask[rows].any(0)).tolist())
        if second in more or more == reached:
            return second in more
        reached = more


ACROSS = {(0, 2), (0, 3), (1, 2), (1, 3)}


@pytest.mark.parametrize(
    ("mask", "latent_dim", "stated"),
    [
        (groups((0, 1), (2, 3)), 1, ACROSS),
        (groups((0, 1), (2, 3)), 3, ACROSS),
        (groups((0, 1, 4), (2, 3, 4)), 1, set()),
        (groups((0, 1, 4), (2, 3, 4)), 2, ACROSS),
        (groups((0, 1, 4, 5), (2, 3, 4, 5)), 2, set()),
        (groups((0, 1, 4, 5), (2, 3, 4, 5)), 3, ACROSS),
        (with_complete(groups((0, 1), (2, 3)), 1), 1, ACROSS),
        (with_complete(groups((0, 1), (2, 3)), 2), 1, set()),
        (with_complete(groups((0, 1), (2, 3)), 2), 2, ACROSS),
        (with_complete(groups((0, 1), (2, 3)), 3), 2, set()),
        (with_complete(groups((0, 1, 4), (2, 3, 4)), 1), 2, ACROSS),
        (with_complete(groups((0, 1, 4), (2, 3, 4)), 2), 2, set()),
        (groups((0, 1), (2, 3), (4, 5)), 1, ACROSS | {(i, j) for i in range(4) for j in (4, 5)}),
        # Each column in common allows a reflection, and no two of them agree on the third.
        (groups((0, 1, 2), (2, 3, 4), (4, 5, 0)), 2, set()),
    ],
)  # fmt: skip
def test_insufficiently_connected_pairs_are_found(mask, latent_dim, stated):
    assert pairs_of(mask, latent_dim) == stated


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_pairs_agree_with_enumerating_every_separating_set(latent_dim, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((8, 6)) < 0.45
    mask[np.arange(8), rng.integers(6, size=8)] = True
    mask[rng.integers(8, size=6), np.arange(6)] = True
    assert pairs_of(mask, latent_dim) == slow_pairs(mask, latent_dim)


@pytest.mark.parametrize("num_groups", [2, 3])
def test_undetermined_covariances_can_change_without_changing_the_likelihood(num_groups):
    """Half of the loadings are rotated by a rotation that fixes those of the common columns."""
    mask = (
        groups((0, 1, 2, 6), (3, 4, 5, 6))
        if num_groups == 2
        else groups((0, 1, 6), (2, 3, 6), (4, 5, 6))
    )
    rng = np.random.default_rng(0)
    loadings = rng.normal(size=(7, 2))
    x = rng.normal(size=(len(mask), 2)) @ loadings.T + 0.4 * rng.normal(size=mask.shape)
    x = np.where(mask, x, np.nan)
    ppca = PPCA.like(x, 2, seed=0)
    fit_em(ppca, x)
    before = ppca.log_likelihood(x).sum().item()
    C = ppca.covariance().detach().numpy()
    common = ppca.loadings.detach().numpy()[6]
    common = common / np.linalg.norm(common)
    mirror = torch.from_numpy(2 * np.outer(common, common) - np.eye(2))
    turned = ppca.loadings.detach().clone()
    first = [d for d in np.flatnonzero(mask[0]) if d != 6]
    turned[first] = turned[first] @ mirror
    ppca.assign(loadings=turned)
    assert ppca.log_likelihood(x).sum().item() == pytest.approx(before, rel=1e-12)
    moved = np.argwhere(np.abs(np.triu(ppca.covariance().detach().numpy() - C)) > 1e-3)
    assert len(moved) and {tuple(p) for p in moved.tolist()} <= pairs_of(mask, 2)


# Tables without undetermined covariances


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_ordinary_tables_are_determined(share):
    for shape, sizes in (((178, 13), (1, 3, 8, 12)), ((20, 12), (1, 3, 8)), ((38, 18), (1, 3, 8))):
        for seed in range(5):
            mask = ~np.isnan(oracles.with_missing_values(np.zeros(shape), share, seed))
            for latent_dim in sizes:
                assert pairs_of(mask, latent_dim) == set(), (shape, seed, latent_dim)


def test_sparse_tables_are_connected_through_other_columns():
    rng = np.random.default_rng(0)
    mask = rng.random((200, 30)) < 0.2
    mask[~mask.any(1), 0] = True
    counts = mask.T.astype(int) @ mask.astype(int)
    assert counts.min() <= 5 and pairs_of(mask, 5) == set()


@pytest.mark.data
@pytest.mark.skipif("PPL_VAE_DATA" not in os.environ, reason="needs PPL_VAE_DATA")
def test_metabolites_are_determined():
    path = Path(os.environ["PPL_VAE_DATA"]) / "pcaMethods" / "metaboliteData.csv"
    mask = pd.read_csv(path, index_col=0).notna().to_numpy()
    assert all(pairs_of(mask, latent_dim) == set() for latent_dim in (1, 3, 8, 16))


def test_wine_is_determined_where_it_is_used():
    x = oracles.with_missing_values(load_wine().data, 0.3, 0)
    transformer = PPCATransformer(n_components=3).fit(x)
    assert transformer.model_.undetermined is None
    transformer.impute(x[:2])  # warnings are errors


# Reports


@pytest.fixture
def halves():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 1)) @ rng.normal(size=(1, 4)) + 0.3 * rng.normal(size=(200, 4))
    return np.where(groups((0, 1), (2, 3), rows=100), x, np.nan)


def correlation(ppca):
    C = ppca.covariance().detach().numpy()
    return C[0, 2] / np.sqrt(C[0, 0] * C[2, 2])


def test_the_sign_depends_on_the_seed_and_no_standard_deviation_is_given(halves):
    signs = set()
    for seed in range(6):
        ppca = PPCA.like(halves, 1, seed=seed)
        fitted = fit_em(ppca, halves, tol=1e-6)
        signs.add(np.sign(correlation(ppca)))
        (note,) = (note for note in fitted.notes if "not determined" in note)
        assert "of columns (0, 1) with (2, 3)" in note and "latent_dim=1" in note
        found = ppca.impute(halves, draws=2, seed=0)
        missing = torch.from_numpy(np.isnan(halves))
        assert torch.equal(found.sd.isnan(), missing) and found.mean.isfinite().all()
        assert torch.equal(found.draws.isnan(), missing.expand(2, -1, -1))
        assert "the standard deviation of 400 of these is not known" in repr(found)
        assert found.notes == (note,) and f"note: {note}" in repr(found)
    assert signs == {-1, 1}


def test_entries_that_depend_on_determined_covariances_keep_their_standard_deviation(halves):
    halves[:20, 1] = np.nan  # given column 0 alone
    ppca = PPCA.like(halves, 1, seed=0)
    fit_em(ppca, halves)
    found = ppca.impute(halves)
    assert (found.sd[:20, 1] > 0).all() and found.sd[:100, 2:].isnan().all()
    # A row's entries depend on its own observed columns only.
    assert (ppca.impute(halves[:1]).sd[0, 1] > 0) and ppca.impute(halves[:1]).sd[
        0, 2:
    ].isnan().all()
    observed = torch.from_numpy(~np.isnan(halves))
    unknown = undetermined_entries(observed, ppca.undetermined)
    assert torch.equal(found.sd.isnan(), unknown) and not (unknown & observed).any()


@pytest.mark.parametrize("fit", [fit_em, variational_em])
def test_a_fit_to_other_data_replaces_the_undetermined_pairs(fit, halves):
    ppca = PPCA.like(halves, 1, seed=0)
    assert any("not determined" in note for note in fit(ppca, halves).notes)
    assert ppca.undetermined is not None and ppca.canonical().undetermined is not None
    whole = np.random.default_rng(0).normal(size=(50, 4))
    fit_closed_form(ppca, whole)
    assert ppca.undetermined is None
    fit(ppca, halves)
    assert ppca.undetermined is not None
    fit(ppca, whole)
    assert ppca.undetermined is None


def test_a_loaded_model_keeps_the_undetermined_pairs(halves, tmp_path):
    ppca = PPCA.like(halves, 1, seed=0)
    fit_em(ppca, halves)
    save(ppca, tmp_path / "halves")
    for model in (load(tmp_path / "halves"), load(tmp_path / "halves", into=PPCA(4, 1).double())):
        assert torch.equal(model.undetermined, ppca.undetermined)
        assert model.impute(halves).sd.isnan().any()
    save(PPCA(4, 1, seed=0).double(), tmp_path / "other")
    assert load(tmp_path / "other", into=ppca).undetermined is None


def test_masked_cross_validation_reports_undetermined_entries(halves):
    found = select_by_masked_cv(halves, latent_dims=[1], seed=0)
    assert found.log_density.isfinite().all()
    assert "400 of the missing values, in 4 columns, depend on" in str(found)
    assert "standard deviations take the fitted parameters as known" in str(found)
    whole = np.random.default_rng(0).normal(size=(50, 4))
    assert not select_by_masked_cv(whole, latent_dims=[1], seed=0).notes


def test_the_transformer_warns(halves):
    transformer = PPCATransformer(n_components=1).fit(halves)
    assert any("not determined" in note for note in transformer.notes_)
    with pytest.warns(
        UserWarning, match=r"4 of the imputed values are arbitrary: .*\(0, 1\) with"
    ):
        transformer.impute(halves[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transformer.transform(halves)


def test_the_command_names_the_columns_and_leaves_standard_deviations_empty(halves, tmp_path):
    path, out = tmp_path / "halves.csv", tmp_path / "filled.csv"
    pd.DataFrame(halves, columns=["wool", "silk", "flax", "hemp"]).to_csv(path, index=False)
    arguments = ["impute", path, "--out", out, "--latent-dim", 1, "--noise", "isotropic"]
    shown = CliRunner().invoke(app, [str(word) for word in arguments])
    assert shown.exit_code == 0, shown.output
    assert "the standard deviation of 400 imputed values is unknown and left empty" in shown.output
    assert "in columns 'wool' (100), 'silk' (100), 'flax' (100), 'hemp' (100)" in shown.output
    assert "covariances of columns (wool, silk) with (flax, hemp)" in shown.output
    assert "(0, 1)" not in shown.output
    after = pd.read_csv(out)
    assert not after[["wool", "hemp"]].isna().any().any()
    assert after[["wool sd", "hemp sd"]].isna().all().all()


def test_an_imputation_reports_what_its_intervals_assume():
    x = oracles.with_missing_values(np.random.default_rng(0).normal(size=(30, 5)), 0.2, 0)
    table = Table("t", x, tuple("abcde"))
    filled = FilledTable.of(table, 1, "isotropic", parameter_uncertainty=False)
    text = " ".join(filled.sentences())
    assert "take the fitted parameters as known" in text and "80 % at 20 rows" in text
    assert "not known" not in text and filled.notes() == filled.fit.notes


def test_many_groups_are_abbreviated():
    mask = groups(*(range(8 * g, 8 * g + 8) for g in range(5)), rows=6)
    x = np.where(mask, 1.0, np.nan)
    (note,) = describe_undetermined(undetermined_pairs(RowBlocks(x), 2), 2)
    assert "(0, 1, 2, 3, 4, 5, ... (8 in all))" in note and "more groups" in note
    assert len(note) < 700 and describe_undetermined(None, 2) == ()
