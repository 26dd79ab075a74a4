"""What pictures show: computed once, right, and never made up."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

import foreign
import lineages
import oracles
from lineages import LABELS, MINE, SHORT
from ppl_vae import run_lineage
from ppl_vae.core.program import bound_object
from ppl_vae.evaluation.latent_space.traversal import GRID_SIZE
from ppl_vae.lineage.report_data import ACROSS, ReportData, report_data
from ppl_vae.lineage.run import Lineage


@pytest.fixture(scope="module")
def shown():
    return lineages.shown()


@pytest.fixture(scope="module")
def ladder():
    return lineages.ladder()


def test_reconstructions_stand_under_their_originals(shown, ladder):
    image_grid, x = shown.reconstructions, ladder.data.test[:ACROSS]
    assert image_grid.row_labels == ("original", "PPCA", "VAE", MINE)
    assert torch.equal(image_grid.values[0], x)
    rows = ladder.data.test_rows[:ACROSS].tolist()
    assert image_grid.column_labels == tuple(map(str, rows))
    assert np.array_equal(lineages.table()[rows], x.numpy())
    ppca = bound_object(ladder.pairs["closed-form"][0])
    inner = ppca.reconstruct(ladder.units.apply(x)).detach()
    assert (image_grid.values[1] - ladder.units.undo(inner)).abs().max() < 1e-6


def test_samples_are_of_the_models_in_the_units_of_the_data(shown, ladder):
    assert shown.samples.row_labels == ("PPCA", "VAE", MINE)
    assert shown.samples.values.shape == (3, ACROSS, 6)
    center, spread = ladder.data.train.mean(0), ladder.data.train.std(0)
    z = (shown.samples.values[:2].mean((0, 1)) - center) / spread
    assert z.abs().max() < 5
    assert shown.samples.limits == (float(ladder.data.train.min()), float(ladder.data.train.max()))


def test_classes_are_those_of_the_training_rows(shown, ladder):
    expected = tuple(LABELS[row] for row in ladder.data.train_rows.tolist())
    assert set(shown.latent_means) == {"PPCA", "VAE", MINE}
    for means in shown.latent_means.values():
        assert means.labels == expected and means.label == "letter"
        assert means.means.shape == (len(ladder.data.train), 2)
    assert "for pictures only" in shown.latent_means["VAE"].about


def test_the_plane_of_ppca_stands_on_principal_axes(shown, ladder):
    means = shown.latent_means["PPCA"].means
    assert means.mean(0).abs().max() < 1e-6
    covariance = torch.cov(means.mT, correction=0)
    values, _ = oracles.sample_spectrum(ladder.units.apply(ladder.data.train).numpy())
    # The posterior mean of axis i varies by 1 - s2 / l_i over the training data.
    expected = 1 - values[2:].mean() / values[:2]
    assert covariance.diagonal().numpy() == pytest.approx(expected, abs=1e-5)
    assert abs(float(covariance[0, 1])) < 1e-6


def test_the_manifold_and_the_ways_between_codes(shown, ladder):
    assert shown.manifold.values.shape == (GRID_SIZE, GRID_SIZE, 6)
    assert shown.manifold.column_labels == tuple(reversed(shown.manifold.row_labels))
    assert [float(t) for t in shown.manifold.column_labels] == pytest.approx(
        [-1.6, -1.0, -0.6, -0.3, 0.0, 0.3, 0.6, 1.0, 1.6]
    )
    assert shown.interpolation.values.shape == (3, ACROSS, 6)
    assert (
        shown.interpolation.column_labels[0] == "0.00"
        and shown.interpolation.column_labels[-1] == "1.00"
    )
    rows = ladder.data.test_rows[:2].tolist()
    assert shown.interpolation.row_labels[0] == f"{rows[0]} to {rows[1]}"


def test_spectrum_kl_comparison_and_slice(shown, ladder):
    values, _ = oracles.sample_spectrum(ladder.data.train.numpy())
    assert shown.spectrum.eigenvalues.numpy() == pytest.approx(values, abs=1e-8)
    assert shown.spectrum.noise["PPCA"] == pytest.approx(values[2:].mean(), rel=1e-6)
    assert shown.spectrum.noise["VAE"] == pytest.approx(ladder.row("vae").noise_scale ** 2)
    expected = 0.5 * np.log(values[:2] / values[2:].mean())
    assert shown.kl["PPCA"].numpy() == pytest.approx(expected, abs=1e-5)
    assert set(shown.kl) == {"PPCA", "VAE", MINE}
    assert set(shown.comparison.names) == {row.stage for row in ladder.rows}
    for name, mean in zip(shown.comparison.names, shown.comparison.mean, strict=True):
        assert float(mean) == pytest.approx(ladder.row(name).test_log_p.value, abs=1e-9)
    assert float(shown.bound_slice.log_likelihood[-1]) == pytest.approx(ladder.optimum, abs=1e-6)
    assert shown.left_out == ()


def test_a_second_opinion_is_in_the_units_of_the_data(shown, ladder):
    assert set(shown.cross_check) == {"vae", "iwae", "score-vae", MINE}
    for name, told in shown.cross_check.items():
        assert set(told.estimates) == {"importance", "annealed"}
        scored = ladder.row(name).held_out
        assert torch.equal(told.estimates["importance"].value, scored.value[:10])
        # 20 temperatures are few: annealing falls short, by little, and never by a unit's log.
        difference, error = told.difference("importance", "annealed")
        assert -5 * error < difference < 0.3


def test_exhibits_come_back_from_json(shown):
    again = ReportData.from_dict(json.loads(json.dumps(shown.to_dict(), allow_nan=False)))
    assert again.to_dict() == shown.to_dict()
    assert torch.equal(again.samples.values, shown.samples.values)
    assert again.samples.image_shape == (2, 3)


def without_paths(shown):
    """The exhibits as a dict; how estimates were computed says how long they took."""
    content = shown.to_dict()
    for told in content["cross_check"].values():
        for estimate in told["estimates"].values():
            del estimate["path"]
    return content


def test_they_repeat_and_leave_the_generators_alone(ladder, shown):
    before = torch.get_rng_state()
    again = report_data(ladder, labels=LABELS, label="letter", image_shape=(2, 3))
    assert torch.equal(before, torch.get_rng_state())
    assert without_paths(again) == without_paths(shown)


@pytest.mark.parametrize("name", foreign.PAIRS)
def test_pairs_the_package_has_never_seen(name):
    model, guide, x = foreign.PAIRS[name]()
    extra = {"mine": (model, guide)}
    found = run_lineage(x, latent_dim=1, stages=["closed-form"], extra=extra, settings=SHORT)
    shown = report_data(found)
    assert shown.reconstructions.row_labels == ("original", "PPCA", "mine")
    assert shown.samples.row_labels == ("PPCA", "mine")
    assert shown.samples.values.isfinite().all() and "mine" in shown.kl
    assert all("mine" not in why for why in shown.left_out)


def test_narrow_data_have_no_plane_of_ppca():
    x = oracles.simulate_ppca((16,), 1, 60, 2, seed=0)
    found = run_lineage(x, latent_dim=1, stages=["closed-form", "vae"], settings=SHORT)
    shown = report_data(found)
    assert set(shown.latent_means) == {"VAE"}
    assert any(why.startswith("latent plane of PPCA: latent_dim") for why in shown.left_out)
    assert math.isfinite(float(shown.bound_slice.log_likelihood.sum()))


def test_classes_may_be_a_series_or_an_array(ladder, shown):
    frame = pd.Series(LABELS, index=range(1000, 1200))
    again = report_data(ladder, labels=frame, image_shape=(2, 3))
    assert again.latent_means["PPCA"].labels == shown.latent_means["PPCA"].labels
    numbers = report_data(lineages.plain_ladder(), labels=np.arange(200)).to_dict()
    json.dumps(numbers)


@pytest.mark.cuda
def test_a_ladder_on_a_gpu():
    extra = {MINE: lineages.hand_written_pair()}
    found = run_lineage(lineages.table(), latent_dim=2, settings=SHORT, extra=extra)
    shown = report_data(found, labels=LABELS)
    assert next(bound_object(found.pairs["vae"][0]).parameters()).device.type == "cuda"
    assert shown.left_out == () and set(shown.kl) == {"PPCA", "VAE", MINE}
    again = report_data(found, labels=LABELS)
    assert again.kl["PPCA"].allclose(shown.kl["PPCA"])
    assert found.row("exact-svi").log_p.value <= found.optimum + 1e-6


def test_bad_arguments(ladder):
    with pytest.raises(ValueError, match="labels has 3 entries for at least"):
        report_data(ladder, labels=[1, 2, 3])
    with pytest.raises(ValueError, match=r"image_shape \(2, 2\) does not hold the 6 columns"):
        report_data(ladder, image_shape=(2, 2))
    with pytest.raises(ValueError, match="holds no data to look at"):
        report_data(Lineage.from_dict(ladder.to_dict()))
