"""Columns of mixed units in the lineage: standardisation, notes, and the Jacobian of log p."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.linalg import solve_triangular
from sklearn.datasets import load_digits, load_wine
from typer.testing import CliRunner

import lineages
import oracles
from ppl_vae import PPCA, VAE, fit_closed_form, fit_em, run_lineage
from ppl_vae.cli.main import app
from ppl_vae.data.sources.row_blocks import RowBlocks
from ppl_vae.data.units import Units, choose_scaling
from ppl_vae.interop.arviz import lineage_to_arviz
from ppl_vae.lineage.report_data import report_data
from ppl_vae.lineage.table import legend
from ppl_vae.models.linear.sufficient_statistics import summarize_table
from ppl_vae.report.archive import read_results

SCALES = np.array([0.02, 0.2, 1.0, 30.0, 654.0, 2000.0])


def table(missing=0.0):
    x = lineages.table() * SCALES + 5 * SCALES
    return oracles.with_missing_values(x, missing, seed=3) if missing else x


def columns_of(x):
    return summarize_table(RowBlocks(x))[0]


def density_of_observed(model, units, x):
    """log N of the observed entries of each row, from the D x D covariance in the units of x."""
    scale, loc = (np.asarray(v, dtype=float) for v in (units.scale, units.loc))
    loadings = scale[:, None] * model.loadings.detach().numpy()
    noise = np.square(scale * model.noise_scale.detach().numpy())
    mean = scale * model.loc.detach().numpy() + loc
    covariance = oracles.ppca_covariance(loadings, noise)
    found = []
    for row in np.asarray(x):
        kept = ~np.isnan(row)
        # Rounding errors of Cholesky do not depend on the units of rows and columns.
        lower = np.linalg.cholesky(covariance[np.ix_(kept, kept)])
        off = solve_triangular(lower, (row - mean)[kept], lower=True)
        half_log_det = np.log(np.diag(lower)).sum()
        found.append(-off @ off / 2 - half_log_det - kept.sum() * math.log(2 * math.pi) / 2)
    return np.array(found)


def best_log_p(x):
    """The closed form's mean log p with two latent dimensions."""
    return oracles.closed_form_log_likelihood(oracles.sample_spectrum(x)[0], 2)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_log_p_of_standardised_columns_is_the_density_of_the_data(missing):
    x = torch.from_numpy(table(missing))
    units = Units.standardized(columns_of(x))
    assert units.per_column and units.common_scale == 1
    inner = units.apply(x)
    np.testing.assert_allclose(np.nanmean(inner, 0), 0, atol=1e-9)
    np.testing.assert_allclose(np.nanstd(inner, 0), 1, rtol=1e-9)
    torch.testing.assert_close(units.undo(inner), x, equal_nan=True)
    model = PPCA.like(inner, 2, seed=0)
    (fit_em if missing else fit_closed_form)(model, inner)
    found = model.log_likelihood(inner).detach() + units.log_jacobian(x)
    np.testing.assert_allclose(found, density_of_observed(model, units, x), rtol=0, atol=1e-8)


def test_the_jacobian_counts_observed_entries_only():
    units = Units(torch.zeros(3).double(), torch.tensor([2.0, 3.0, 5.0]).double())
    x = torch.tensor([[1.0, 1.0, 1.0], [1.0, torch.nan, 1.0], [torch.nan, 1.0, torch.nan]])
    expected = [-math.log(30), -math.log(10), -math.log(3)]
    np.testing.assert_allclose(units.log_jacobian(x.double()), expected, rtol=1e-14)
    alone = Units(units.loc, torch.tensor(2.0).double()).log_jacobian(x.double())
    np.testing.assert_allclose(alone, -math.log(2) * np.array([3, 2, 1]), rtol=1e-14)


def scaling_of(x, scale="auto", **options):
    x = torch.as_tensor(x, dtype=torch.float64)
    return choose_scaling(x, columns_of(x), scale, **options)


def test_auto_standardises_if_scales_differ_by_more_than_a_factor_of_ten():
    x = lineages.table()
    x = x / x.std(0)
    close, far = np.geomspace(1, 9.9, 6), np.geomspace(1, 10.1, 6)
    assert scaling_of(x * close).applied == "none" and scaling_of(x * close).note == ""
    found = scaling_of(x * far)
    assert found.applied == "standardize" and "range from 1 to 10.1" in found.note
    assert "another model" in found.note and "Log p is in the units of the data" in found.note
    assert scaling_of(x * far, image_shape=(2, 3)).applied == "none"
    assert scaling_of(x * far, "none").applied == "none"
    assert scaling_of(x * close, "standardize").applied == "standardize"
    torch.testing.assert_close(scaling_of(1e6 * x * close).units.scale.dim(), 0)
    with pytest.raises(ValueError, match="scale must be one of 'auto', 'none', 'standardize'"):
        scaling_of(x, "standardise")


def test_grey_values_are_not_standardised_and_a_note_reports_it():
    x = load_digits().data / 16
    found = scaling_of(x)
    assert found.applied == "none" and "all values lie in 0..1" in found.note
    assert scaling_of(x, image_shape=(8, 8)).note == ""
    assert scaling_of(16 * x).applied == "standardize"
    shares = np.random.default_rng(0).uniform(size=(200, 4)) * [1, 0.3, 0.02, 0.01]
    assert scaling_of(shares).applied == "standardize"  # too few columns reach one half


def test_a_constant_column_keeps_its_scale():
    x = table()
    x[:, 3] = 0.1
    found = scaling_of(x)
    assert found.units.scale[3] == 1 and "1 constant column(s) keep their scale" in found.note
    assert bool((found.units.apply(torch.from_numpy(x))[:, 3] == 0).all())  # no rounding


NAMES = ["closed-form", "px-em", "vae"]


def lineage_of(x, **options):
    options = {"latent_dim": 2, "stages": NAMES, "settings": lineages.SHORT, "seed": 1} | options
    return run_lineage(x, **options)


@pytest.fixture(scope="module")
def mixed():
    return lineage_of(table())


@pytest.mark.slow
def test_a_lineage_of_mixed_units_is_in_the_units_of_the_data(mixed):
    assert mixed.about["scale"] == "standardize" and mixed.about["scale_requested"] == "auto"
    assert any("the columns are standardised for every fit" in note for note in mixed.notes())
    train, test = mixed.data.train.numpy(), mixed.data.test.numpy()
    np.testing.assert_allclose(mixed.about["column_scales"], train.std(0))
    best = best_log_p(train / train.std(0)) - np.log(train.std(0)).sum()
    row = mixed.row("closed-form")
    assert row.log_p.value == pytest.approx(best, abs=1e-8)
    assert mixed.optimum == pytest.approx(best, abs=1e-8)
    model = mixed.pairs["closed-form"][0].__self__
    held_out = density_of_observed(model, mixed.units, test).mean()
    assert row.test_log_p.value == pytest.approx(held_out, abs=1e-8)
    assert row.noise_scale == pytest.approx(model.noise_scale.item(), abs=1e-12)
    assert "standard deviations of the columns" in legend(mixed.about)
    assert "standard deviations of" not in legend(lineages.single_stage_lineage().about)


def test_columns_in_other_units_move_every_log_p_by_the_jacobian(mixed):
    factors = np.array([1e4, 1.0, 1e-3, 7.0, 1e-6, 2.0])
    other = lineage_of(table() * factors)
    shift = np.log(factors).sum()
    for ours, theirs in zip(mixed.rows, other.rows, strict=True):
        tolerance = 1e-8 if ours.stage != "vae" else 1e-4  # steps add rounding up
        for name in ("log_p", "test_log_p"):
            moved = getattr(theirs, name).value + shift
            assert getattr(ours, name).value == pytest.approx(moved, abs=tolerance), ours.stage
        assert ours.elbo == pytest.approx(theirs.elbo + shift, abs=tolerance)
        assert ours.noise_scale == pytest.approx(theirs.noise_scale, abs=tolerance)


def test_a_lineage_of_mixed_units_with_missing_values():
    x = table(0.1)
    found = lineage_of(x, stages=["px-em"])
    model = found.pairs["px-em"][0].__self__
    train = density_of_observed(model, found.units, found.data.train).mean()
    assert found.row("px-em").log_p.value == pytest.approx(train, abs=1e-8)
    test = density_of_observed(model, found.units, found.data.test).mean()
    assert found.row("px-em").test_log_p.value == pytest.approx(test, abs=1e-8)


def test_without_standardisation_ppca_is_that_of_the_original_columns():
    found = lineage_of(table(), stages=["closed-form"], scale="none")
    assert found.about["scale"] == "none" and found.about["column_scales"] is None
    train = found.data.train.numpy()
    best = best_log_p(train)
    assert found.row("closed-form").log_p.value == pytest.approx(best, abs=1e-6)


def test_given_test_rows_are_scaled_as_the_training_rows_are():
    x = table()
    one, two = (lineage_of(x[:150], x_test=c * x[150:], stages=["closed-form"]) for c in (1, 3))
    assert torch.equal(one.units.scale, two.units.scale)
    model = one.pairs["closed-form"][0].__self__
    for found, c in ((one, 1), (two, 3)):
        expected = density_of_observed(model, one.units, c * x[150:]).mean()
        assert found.row("closed-form").test_log_p.value == pytest.approx(expected, rel=1e-10)


@pytest.mark.slow
def test_user_pairs_are_fitted_in_the_units_of_the_data():
    x = table()
    vae = VAE.like(x, 2, hidden=(8,), seed=0)
    plain = VAE.mlp(6, 2, hidden=(8,), seed=0).double()
    extra = {"like": (vae.model, vae.guide), "plain": (plain.model, plain.guide)}
    found = lineage_of(x, stages=["closed-form"], extra=extra)
    notes = found.notes()
    assert any("Pairs of your own are fitted in the units of the data" in note for note in notes)
    gap = found.row("closed-form").log_p.value - found.row("like").log_p.value
    assert -3 < gap < 6  # a short fit, at the right scale
    assert math.isnan(found.row("like").noise_scale)
    (note,) = [note for note in notes if "VAE.like(x, latent_dim)" in note]
    assert note.endswith("(plain)")


@pytest.mark.slow
def test_figures_and_draws_are_in_the_units_of_the_data(mixed):
    shown = report_data(mixed)
    train = mixed.data.train
    assert shown.spectrum.standardized
    correlation = np.linalg.eigvalsh(np.corrcoef(train.numpy().T))[::-1]
    np.testing.assert_allclose(shown.spectrum.eigenvalues, correlation, atol=1e-9)
    assert shown.bound_slice.log_likelihood.max() <= mixed.optimum + 1e-8
    for image_grid in (shown.samples, shown.reconstructions):
        off = (image_grid.values.flatten(0, 1) - train.mean(0)) / train.std(0)
        assert off.abs().max() < 20 and off.std(0).min() > 0.05
    tree = lineage_to_arviz(mixed, num_data=4, num_samples=200)
    drawn = np.asarray(tree["posterior_predictive"]["closed-form"]).reshape(-1, 6)
    off = (drawn.std(0) / train.numpy().std(0)).tolist()
    assert min(off) > 0.3 and max(off) < 3


def run(*arguments):
    return CliRunner().invoke(app, ["lineage", *map(str, arguments)])


@pytest.fixture
def wine(tmp_path):
    path = tmp_path / "wine.csv"
    load_wine(as_frame=True).data.to_csv(path, index=False)
    return path


@pytest.mark.slow
def test_the_command_standardises_and_reports_it(wine, tmp_path):
    arguments = (wine, "--latent-dim", 3, "--stages", "closed-form,px-em")
    shown = run(*arguments, "--out", tmp_path / "a")
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    assert "the columns are standardised for every fit (scale='auto')" in text
    assert "sigma is in standard deviations of the columns" in text
    page = (tmp_path / "a" / "report.html").read_text()
    assert "the columns are standardised for every fit" in page
    about = json.loads((tmp_path / "a" / "results.json").read_text())["about"]
    assert about["scale"] == "standardize" and len(about["column_scales"]) == 13
    assert read_results(tmp_path / "a")[0].notes()
    plain = run(*arguments, "--out", tmp_path / "b", "--scale", "none")
    assert plain.exit_code == 0 and "standardised for every fit" not in plain.output
    first, second = (read_results(tmp_path / name)[0] for name in "ab")
    # Wine's columns do not share one noise: standardised, PPCA explains new rows far better.
    gain = first.row("px-em").test_log_p.value - second.row("px-em").test_log_p.value
    assert gain > 3


def test_the_command_does_not_standardise_images(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, load_digits().images[:120])
    shown = run(path, "--latent-dim", 2, "--stages", "closed-form", "--out", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    found = read_results(tmp_path / "out")[0]
    assert found.about["scale"] == "none" and found.about["scale_note"] == ""


def test_an_unknown_scale_raises(wine, tmp_path):
    shown = run(wine, "--scale", "robust", "--out", tmp_path)
    assert shown.exit_code != 0
    assert "--scale must be one of 'auto', 'none', 'standardize'" in str(shown.exception)
    with pytest.raises(ValueError, match="scale must be one of"):
        run_lineage(table(), latent_dim=2, scale="robust")
