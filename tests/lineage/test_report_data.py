"""The data of the report's figures: computed once, and correct."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

import lineages
import oracles
import user_pairs
from lineages import LABELS, SHORT, TINY, USER_PAIR
from ppl_vae import run_lineage
from ppl_vae.core.introspection import bound_object
from ppl_vae.evaluation.latent_space.traversal import GRID_SIZE
from ppl_vae.lineage.report_data import NUM_COLUMNS, ReportData, report_data
from ppl_vae.lineage.result import Lineage


@pytest.fixture(scope="module")
def data():
    return lineages.small_report_data()


def test_reconstructions_are_below_their_originals(data, lineage):
    image_grid, x = data.reconstructions, lineage.data.test[:NUM_COLUMNS]
    assert image_grid.row_labels == ("original", "PPCA", "VAE", USER_PAIR)
    assert torch.equal(image_grid.values[0], x)
    rows = lineage.data.test_rows[:NUM_COLUMNS].tolist()
    assert image_grid.column_labels == tuple(map(str, rows))
    assert np.array_equal(lineages.table()[rows], x.numpy())
    ppca = bound_object(lineage.pairs["closed-form"][0])
    inner = ppca.reconstruct(lineage.units.apply(x)).detach()
    assert (image_grid.values[1] - lineage.units.undo(inner)).abs().max() < 1e-6


def test_samples_are_of_the_models_in_the_units_of_the_data(data, lineage):
    assert data.samples.row_labels == ("PPCA", "VAE", USER_PAIR)
    assert data.samples.values.shape == (3, NUM_COLUMNS, 6)
    center, sd = lineage.data.train.mean(0), lineage.data.train.std(0)
    z = (data.samples.values[:2].mean((0, 1)) - center) / sd
    assert z.abs().max() < 5
    assert data.samples.limits == (
        float(lineage.data.train.min()),
        float(lineage.data.train.max()),
    )


def test_classes_are_those_of_the_training_rows(data, lineage):
    expected = tuple(LABELS[row] for row in lineage.data.train_rows.tolist())
    assert set(data.latent_means) == {"PPCA", "VAE", USER_PAIR}
    for means in data.latent_means.values():
        assert means.labels == expected and means.label == "letter"
        assert means.means.shape == (len(lineage.data.train), 2)
    assert "for figures only" in data.latent_means["VAE"].remark


def test_the_latent_plane_of_ppca_is_on_principal_axes(data, lineage):
    means = data.latent_means["PPCA"].means
    assert means.mean(0).abs().max() < 1e-6
    covariance = torch.cov(means.mT, correction=0)
    values, _ = oracles.sample_spectrum(lineage.units.apply(lineage.data.train).numpy())
    # The posterior mean of axis i varies by 1 - s2 / l_i over the training data.
    expected = 1 - values[2:].mean() / values[:2]
    assert covariance.diagonal().numpy() == pytest.approx(expected, abs=1e-5)
    assert abs(float(covariance[0, 1])) < 1e-6


def test_the_manifold_and_the_interpolation_between_codes(data, lineage):
    assert data.manifold.values.shape == (GRID_SIZE, GRID_SIZE, 6)
    assert data.manifold.column_labels == tuple(reversed(data.manifold.row_labels))
    assert [float(t) for t in data.manifold.column_labels] == pytest.approx(
        [-1.6, -1.0, -0.6, -0.3, 0.0, 0.3, 0.6, 1.0, 1.6]
    )
    assert data.interpolation.values.shape == (3, NUM_COLUMNS, 6)
    fractions = data.interpolation.column_labels
    assert fractions[0] == "0.00" and fractions[-1] == "1.00"
    rows = lineage.data.test_rows[:2].tolist()
    assert data.interpolation.row_labels[0] == f"{rows[0]} to {rows[1]}"


def test_spectrum_kl_comparison_and_slice(data, lineage):
    values, _ = oracles.sample_spectrum(lineage.data.train.numpy())
    assert data.spectrum.eigenvalues.numpy() == pytest.approx(values, abs=1e-8)
    assert data.spectrum.noise["PPCA"] == pytest.approx(values[2:].mean(), rel=1e-6)
    assert data.spectrum.noise["VAE"] == pytest.approx(lineage.row("vae").noise_scale ** 2)
    expected = 0.5 * np.log(values[:2] / values[2:].mean())
    assert data.kl["PPCA"].numpy() == pytest.approx(expected, abs=1e-5)
    assert set(data.kl) == {"PPCA", "VAE", USER_PAIR}
    assert set(data.comparison.names) == {row.stage for row in lineage.rows}
    for name, mean in zip(data.comparison.names, data.comparison.mean, strict=True):
        assert float(mean) == pytest.approx(lineage.row(name).test_log_p.value, abs=1e-9)
    assert float(data.bound_slice.log_likelihood[-1]) == pytest.approx(lineage.optimum, abs=1e-6)
    assert data.left_out == ()


def test_the_cross_check_is_in_the_units_of_the_data(data, lineage):
    assert set(data.cross_check) == {"vae", "iwae", "score-vae", USER_PAIR}
    for name, comparison in data.cross_check.items():
        assert set(comparison.estimates) == {"importance", "annealed"}
        scored = lineage.row(name).held_out
        assert torch.equal(comparison.estimates["importance"].value, scored.value[:10])
        # With 20 temperatures annealing is too low, by less than the log of the units' scale.
        difference, error = comparison.difference("importance", "annealed")
        assert -5 * error < difference < 0.3


def test_report_data_are_read_back_from_json(data):
    again = ReportData.from_dict(json.loads(json.dumps(data.to_dict(), allow_nan=False)))
    assert again.to_dict() == data.to_dict()
    assert torch.equal(again.samples.values, data.samples.values)
    assert again.samples.image_shape == (2, 3)


def without_paths(data):
    """The data as a dict, without the remarks on execution, which contain times."""
    content = data.to_dict()
    for comparison in content["cross_check"].values():
        for estimate in comparison["estimates"].values():
            del estimate["execution"]
    return content


@pytest.mark.slow
def test_report_data_are_reproducible_and_leave_the_generators_unchanged(lineage, data):
    best = min((row for row in lineage.rows if row.model == "PPCA"), key=lambda r: r.shortfall)
    names = {best.stage, lineage.reference, "vae", USER_PAIR}
    before = torch.get_rng_state()
    again = report_data(
        lineages.subset(lineage, names),
        labels=pd.Series(LABELS, index=range(1000, 1200)),
        label="letter",
        image_shape=(2, 3),
    )
    assert torch.equal(before, torch.get_rng_state())
    ours, theirs = without_paths(again), without_paths(data)
    assert set(ours["cross_check"]) == {"vae", USER_PAIR}
    for name, comparison in ours["cross_check"].items():
        assert comparison == theirs["cross_check"][name]
    for name in set(ours) - {"cross_check", "comparison"}:
        assert ours[name] == theirs[name], name


# One of bare parameters and one of two levels; slow, all.
QUICK = {"param_only", "two_level"}
PROGRAMS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in user_pairs.PAIRS
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_user_written_programs(name):
    model, guide, x = user_pairs.PAIRS[name]()
    extra = {"user": (model, guide)}
    found = run_lineage(x, latent_dim=1, stages=["closed-form"], extra=extra, settings=TINY)
    row = found.row("user")
    assert math.isfinite(row.elbo) and math.isfinite(row.log_p.value)
    gap = row.approximation + row.amortization
    # The sites of the guide of two_level are dependent: its gap is not decomposed.
    assert math.isnan(gap) == (name == "two_level")
    assert name == "two_level" or row.log_p.value - row.elbo == pytest.approx(gap)
    data = report_data(found)
    assert data.reconstructions.row_labels == ("original", "PPCA", "user")
    assert data.samples.row_labels == ("PPCA", "user")
    assert data.samples.values.isfinite().all() and "user" in data.kl
    assert all("user" not in reason for reason in data.left_out)


def test_data_with_two_columns_have_no_latent_plane_of_ppca():
    x = oracles.simulate_ppca((16,), 1, 60, 2, seed=0)
    found = run_lineage(x, latent_dim=1, stages=["closed-form", "vae"], settings=TINY)
    data = report_data(found)
    assert set(data.latent_means) == {"VAE"}
    assert any(reason.startswith("latent plane of PPCA: latent_dim") for reason in data.left_out)
    assert math.isfinite(float(data.bound_slice.log_likelihood.sum()))


def test_classes_may_be_an_array():
    extra = {USER_PAIR: lineages.user_written_pair()}
    table = lineages.table()
    found = run_lineage(table, latent_dim=1, stages=["px-em"], extra=extra, settings=TINY)
    data = report_data(found, labels=np.arange(200))
    assert data.latent_means[USER_PAIR].labels == tuple(found.data.train_rows.tolist())
    json.dumps(data.to_dict())


@pytest.mark.cuda
def test_a_lineage_on_a_gpu():
    extra = {USER_PAIR: lineages.user_written_pair()}
    found = run_lineage(lineages.table(), latent_dim=2, settings=SHORT, extra=extra)
    data = report_data(found, labels=LABELS)
    assert next(bound_object(found.pairs["vae"][0]).parameters()).device.type == "cuda"
    assert data.left_out == () and set(data.kl) == {"PPCA", "VAE", USER_PAIR}
    again = report_data(found, labels=LABELS)
    assert again.kl["PPCA"].allclose(data.kl["PPCA"])
    assert found.row("exact-svi").log_p.value <= found.optimum + 1e-6


def test_invalid_arguments(lineage):
    with pytest.raises(ValueError, match="labels has 3 entries for at least"):
        report_data(lineage, labels=[1, 2, 3])
    with pytest.raises(ValueError, match=r"image_shape \(2, 2\) does not match the 6 columns"):
        report_data(lineage, image_shape=(2, 2))
    with pytest.raises(ValueError, match="has no data; run it again"):
        report_data(Lineage.from_dict(lineage.to_dict()))
