"""The lineage: every stage on one small table, its identities, and user-written pairs in it."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

import lineages
import oracles
from lineages import SHORT, TINY, USER_PAIR, bounded, default_stages
from ppl_vae import PPCA, VAE, AmortizedGuide, PerDatumGuide, digits, mlp, run_lineage
from ppl_vae.core.introspection import bound_object
from ppl_vae.data.splits import split
from ppl_vae.lineage import Lineage
from ppl_vae.lineage.names import STAGE_NAMES
from ppl_vae.lineage.stages import STAGES

EXACT = ("closed-form", "em", "px-em", "variational-em")


@pytest.fixture(scope="module")
def table():
    return lineages.table()


def test_all_stages_are_present(lineage):
    assert [row.stage for row in lineage.rows] == [*default_stages(), USER_PAIR]
    assert lineage.finished and list(STAGES) == list(STAGE_NAMES)
    assert set(STAGES) - set(default_stages()) == {"nuts"}


def test_exact_stages_agree_with_the_closed_form(lineage, table):
    x = split(table, seed=1).train.numpy()
    values, _ = oracles.sample_spectrum(x)
    noise = values[2:].mean()
    spectrum = np.concatenate([values[:2], np.full(4, noise)])
    log_p = -0.5 * (6 * math.log(2 * math.pi) + np.log(spectrum).sum() + 6)
    for name in EXACT:
        row = lineage.row(name)
        assert row.log_p.value == pytest.approx(log_p, abs=1e-7)
        assert row.elbo == pytest.approx(log_p, abs=1e-6)
        assert row.log_p.method == "exact" and row.log_p.error is None
        assert row.noise_scale == pytest.approx(math.sqrt(noise), abs=1e-5)
        assert row.angle < 0.02


def test_autoencoders_are_scored_by_their_implied_gaussian(lineage, table):
    x = split(table, seed=1).train.numpy()
    log_p = oracles.implied_by_pca(x, 2)
    row = lineage.row("pca")
    assert row.log_p.value == pytest.approx(log_p, abs=1e-9) and row.log_p.method == "exact"
    assert row.angle < 1e-5 and row.shortfall == pytest.approx(lineage.optimum - log_p, abs=1e-9)
    values, _ = oracles.sample_spectrum(x)
    assert row.noise_scale == pytest.approx(math.sqrt(values[2:].sum() / 6), rel=1e-9)
    fitted = lineage.row("linear-autoencoder")
    assert 0 < fitted.shortfall < 1 and fitted.fit.algorithm == "SVI"
    for each in (row, fitted):
        assert all(map(math.isnan, (each.elbo, each.approximation, each.amortization)))
        assert each.held_out.method == "exact"


def test_the_gaps_sum_to_log_p_minus_the_elbo(lineage):
    for row in bounded(lineage):
        gap = row.approximation + row.amortization
        assert row.log_p.value - row.elbo == pytest.approx(gap, abs=1e-9), row.stage
        assert math.isfinite(row.test_log_p.value) and row.test_log_p.error > 0
    for row in lineage.rows:
        assert 0 <= row.log_p.share_reliable <= 1 and 0 <= row.test_log_p.share_reliable <= 1


def test_no_ppca_stage_exceeds_the_closed_form_on_training_rows(lineage):
    for row in lineage.rows:
        if row.model == "PPCA":
            assert lineage.optimum - row.log_p.value == pytest.approx(row.shortfall, abs=1e-9)
            assert row.shortfall >= -1e-9, row.stage
            assert not row.approximation <= -1e-3, row.stage
        else:
            assert math.isnan(row.angle) and math.isnan(row.shortfall)
            assert row.posterior is not None or row.log_p.method == "estimated"


def test_results_are_reproducible_and_leave_the_generators_unchanged(table, lineage):
    names = ("em", "linear-amortized", "vae")
    before = torch.get_rng_state()
    again = run_lineage(table, latent_dim=2, stages=names, settings=SHORT, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for name in names:
        ours, theirs = (dict(r.row(name).to_dict()) for r in (again, lineage))
        for key in ("elbo", "log_p", "approximation", "amortization", "test_log_p"):
            assert ours[key] == theirs[key], (name, key)


@pytest.mark.slow
def test_units_of_the_data_change_log_p_by_their_jacobian(table, lineage):
    names = ("closed-form", "linear-amortized", "vae")
    scaled = run_lineage(100 * table - 7, latent_dim=2, stages=names, settings=SHORT, seed=1)
    for name in names:
        ours, theirs = scaled.row(name), lineage.row(name)
        shift = -6 * math.log(100)
        assert ours.elbo - theirs.elbo == pytest.approx(shift, abs=0.02), name
        assert ours.log_p.value - theirs.log_p.value == pytest.approx(shift, abs=0.02)
        assert ours.noise_scale == pytest.approx(100 * theirs.noise_scale, rel=0.01)


def test_test_rows_affect_held_out_log_p_only(table):
    names = ("px-em", "linear-amortized", "vae")
    rows = table[:150], table[150:]
    first, other = (
        run_lineage(rows[0], x_test=x_test, latent_dim=2, stages=names, settings=TINY)
        for x_test in (rows[1], 2 * rows[1])
    )
    for name in names:
        a, b = first.row(name), other.row(name)
        assert (a.elbo, a.log_p, a.noise_scale) == (b.elbo, b.log_p, b.noise_scale)
        assert a.test_log_p.value > b.test_log_p.value


@pytest.mark.slow
def test_user_written_pairs_are_in_the_same_table(table):
    ppca = PPCA.like(table, 2, seed=0)
    guide = AmortizedGuide(mlp(6, 4, (8,), seed=0).double(), 2)
    vae = VAE.mlp(6, 2, hidden=(8,), seed=0)
    inner = PPCA.like(table, 2, seed=0)
    num_train = len(split(table).train)
    extra = {
        "user PPCA": (ppca.model, guide),
        "user VAE": (vae.model, vae.guide),
        "one q per datum": (inner.model, PerDatumGuide(num_train, 2).double()),
    }
    partial_results = []
    lineage = run_lineage(
        table,
        latent_dim=2,
        stages=["px-em"],
        extra=extra,
        settings=SHORT,
        after_stage=partial_results.append,
    )
    assert [row.stage for row in partial_results[-1].rows] == ["px-em", *extra]
    assert [len(part.rows) for part in partial_results] == [1, 2, 3, 4]
    user_row = lineage.row("user PPCA")
    assert user_row.log_p.method == "exact" and user_row.angle < 90
    assert user_row.shortfall > 0
    assert user_row.log_p.value == pytest.approx(
        ppca.log_likelihood(lineage.data.train).mean().item(), abs=1e-9
    )
    assert lineage.row("user VAE").log_p.method == "estimated"
    assert math.isfinite(lineage.row("one q per datum").test_log_p.value)
    assert lineage.pairs["user VAE"] == (vae.model, vae.guide)


def test_results_are_json(lineage):
    content = json.loads(json.dumps(lineage.to_dict(), allow_nan=False))
    assert [row["stage"] for row in content["rows"]] == [*default_stages(), USER_PAIR]
    assert content["about"]["num_train"] == len(lineage.data.train)
    assert len(content["rows"][0]["fit"]["objective"]) == 1
    assert content["about"]["columns"] == ["x1", "x2", "x3", "x4", "x5", "x6"]


def test_a_lineage_is_read_back_from_json(lineage):
    content = json.loads(json.dumps(lineage.to_dict(), allow_nan=False))
    again = Lineage.from_dict(content)
    assert again.to_dict() == lineage.to_dict()
    assert again.data is None and again.pairs == {} and again.finished
    vae, before = again.row("vae"), lineage.row("vae")
    assert torch.equal(vae.held_out.value, before.held_out.value)
    assert vae.held_out.reliable.dtype == torch.bool and math.isnan(vae.angle)
    assert vae.test_log_p == before.test_log_p and again.optimum == lineage.optimum
    with pytest.raises(ValueError, match=r"this is no StageMetrics: it has no \['ascent'\]"):
        del content["rows"][0]["ascent"]
        Lineage.from_dict(content)


def test_all_stages_are_scored_on_the_same_held_out_rows(lineage):
    for row in lineage.rows:
        if row.stage == "closed-form":
            ppca = bound_object(lineage.pairs["closed-form"][0])
            inner = lineage.units.apply(lineage.data.test)
            exact = ppca.log_likelihood(inner).detach() + lineage.units.log_jacobian(inner)
            assert (row.held_out.value - exact).abs().max() < 1e-9
        assert len(row.held_out.value) == lineage.about["num_scored"] == len(lineage.data.test)
        assert row.held_out.mean == row.test_log_p.value
        assert (row.held_out.method == "exact") == (row.model == "PPCA")


def test_objectives_are_in_the_units_of_the_data(lineage, table):
    for name in EXACT:
        row = lineage.row(name)
        assert float(row.fit.objective[-1]) == pytest.approx(row.log_p.value, abs=1e-6)
    row = lineage.row("exact-svi")
    assert float(row.fit.objective[-20:].mean()) == pytest.approx(row.log_p.value, abs=0.5)
    assert float(row.curve.value[-1]) == pytest.approx(row.log_p.value, abs=0.5)
    ascent = lineage.row("linear-amortized").ascent
    assert float(ascent.log_likelihood[-1]) <= lineage.optimum + 1e-9
    assert lineage.row("vae").ascent is None and lineage.row("closed-form").ascent is None


def test_bound_and_log_p_are_equal_after_every_e_step_of_the_stored_history(lineage):
    for name in ("em", "px-em"):
        ascent = lineage.row(name).ascent
        e_steps = ascent.at == ascent.at.floor()
        assert len(ascent.at) == 2 * lineage.row(name).fit.steps
        assert (ascent.bound - ascent.log_likelihood)[e_steps].abs().max() < 1e-9


def test_progress_is_reported_for_every_stage_in_order(table):
    calls = []
    names = ["px-em", "exact-svi"]
    run_lineage(
        table,
        latent_dim=2,
        stages=names,
        settings=SHORT,
        progress=lambda *call: calls.append(call),
    )
    assert list(dict.fromkeys(call[:2] for call in calls)) == [
        (name, phase) for name in names for phase in ("fitting", "evaluating")
    ]
    steps = [call[2:] for call in calls if call[:2] == ("exact-svi", "fitting")]
    assert steps[-1] == (SHORT.steps, SHORT.steps)
    done = [step for step, _ in steps]
    assert done == sorted(done) and len(done) > 3


def test_names_of_columns_are_kept_and_constant_columns_are_noted():
    x = np.column_stack([lineages.table(), np.full(200, 3.0)])
    frame = pd.DataFrame(x, columns=[*"abcdef", "constant"])
    found = run_lineage(frame, latent_dim=2, stages=["closed-form", "em"], settings=SHORT)
    assert found.about["columns"] == [*"abcdef", "constant"]
    assert found.about["constant_columns"] == ["constant"]
    assert found.notes() == ["constant columns: constant"]
    many = found.about | {"constant_columns": [f"c{k}" for k in range(30)]}
    (note,) = dataclasses.replace(found, about=many).notes()
    assert note.endswith("c9, ... (30 in all)")
    with pytest.raises(ValueError, match="columns must name each of x's 7 columns; it has 2"):
        run_lineage(x, latent_dim=2, columns=["a", "b"])


def test_invalid_arguments(table):
    with pytest.raises(ValueError, match=r"stages must be one of 'pca'.*got 'emm'"):
        run_lineage(table, latent_dim=2, stages=["emm"])
    ppca = PPCA.like(table, 2)
    with pytest.raises(ValueError, match="must not have the names of stages"):
        run_lineage(table, latent_dim=2, extra={"em": (ppca.model, ppca.model)})
    with pytest.raises(ValueError, match="smaller than the rank"):
        run_lineage(table, latent_dim=6)


@pytest.mark.slow
def test_on_digits_the_vae_exceeds_ppca_and_the_estimates_are_reliable():
    lineage = run_lineage(digits(), latent_dim=10)
    for row in lineage.rows:
        print(row.stage, row.elbo, row.log_p, row.test_log_p, row.fit.seconds)
        assert row.test_log_p.share_reliable >= 0.85, row.stage
        assert row.log_p.share_reliable >= 0.85, row.stage
    vae, ppca = (lineage.row(name).test_log_p for name in ("vae", "closed-form"))
    assert vae.value - 4 * vae.error > ppca.value + 4 * ppca.error
    print(lineage.about["seconds"], "s")
