"""Rows with nothing observed: imputed by the mean, left out of fits and averages with a note."""

import numpy as np
import pandas as pd
import pytest
import torch

import ppl_vae as pv
from ppl_vae.data.sources.row_blocks import RowBlocks
from ppl_vae.evaluation import compare_latent_dims, select_by_masked_cv
from ppl_vae.guides.guides import ExactGuide
from ppl_vae.interop import FeatureTransformer, PPCATransformer

N, D = 30, 4
X = np.random.default_rng(0).normal(size=(N, D)) @ np.random.default_rng(1).normal(size=(D, D))
HIDDEN = np.where(np.random.default_rng(2).random((N, D)) < 0.2, np.nan, X)
HIDDEN[:, 0] = X[:, 0]
EMPTY = [4, 17]
NOTE = "2 rows with nothing observed were left out: 4, 17"


def with_empty_rows(x):
    nothing = np.full(x.shape[1], np.nan)
    return np.insert(x, [4, 16], nothing, axis=0)


def ppca():
    return pv.PPCA.from_parameters(
        torch.tensor([[1.0], [2.0], [0.5], [0.1]]).double(), torch.arange(D).double(), 0.7
    )


def test_an_empty_row_is_imputed_by_the_mean_and_its_standard_deviation():
    model, x = ppca(), with_empty_rows(HIDDEN)
    found = model.impute(x, draws=2000, seed=0)
    expected = model.impute(HIDDEN)
    kept = np.setdiff1d(np.arange(len(x)), EMPTY)
    torch.testing.assert_close(found.mean[kept], expected.mean)
    sd = model.covariance().diagonal().sqrt().detach()
    for row in EMPTY:
        torch.testing.assert_close(found.mean[row], model.loc.detach())
        torch.testing.assert_close(found.sd[row], sd)
        error = found.draws[:, row].mean(0) - model.loc.detach()
        assert bool((error.abs() < 5 * sd / 2000**0.5).all())


def test_the_posterior_of_an_empty_row_is_the_prior_and_its_log_p_is_zero():
    model, x = ppca(), with_empty_rows(HIDDEN)
    q = model.posterior(x[EMPTY])
    assert bool((q.mean == 0).all())
    torch.testing.assert_close(q.covariance_matrix, torch.ones(2, 1, 1).double())
    assert model.log_likelihood(x)[EMPTY].tolist() == [0.0, 0.0]
    reconstructed = model.reconstruct(x)[EMPTY]
    torch.testing.assert_close(reconstructed, model.loc.expand(2, -1))


def test_a_pair_imputes_empty_rows():
    model, x = ppca(), with_empty_rows(HIDDEN)
    found = pv.impute(model.model, ExactGuide(model), x, num_samples=4000, seed=0)
    exact = model.impute(x)
    error = (found.mean - exact.mean)[EMPTY]
    assert bool((error.abs() < 5 * exact.sd[EMPTY] / 4000**0.5).all())
    torch.testing.assert_close(found.sd[EMPTY], exact.sd[EMPTY], rtol=0.1, atol=0)


FITS = {
    "fit_em": lambda model, x: pv.fit_em(model, x, max_iterations=50),
    "variational_em": lambda model, x: pv.variational_em(model, x, max_iterations=50),
    "fit_closed_form": pv.fit_closed_form,
}


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("kind", [np.array, pd.DataFrame, lambda x: [x[:10], x[10:]]])
def test_exact_fits_leave_empty_rows_out_with_a_note(fit, kind):
    x, results = X if fit == "fit_closed_form" else HIDDEN, []
    for rows in (x, with_empty_rows(x)):
        model = pv.PPCA(D, 2, seed=0).double()
        result = FITS[fit](model, kind(rows))
        results.append((model.covariance().detach(), result.objective[-1]))
    assert NOTE in result.notes
    for without, with_empty in zip(*results, strict=True):
        torch.testing.assert_close(with_empty, without)


def test_bayesian_fits_leave_empty_rows_out_with_a_note():
    x = with_empty_rows(HIDDEN)
    found = [pv.fit_vb(pv.BayesianPPCA(D, 1).double(), rows, seed=0) for rows in (HIDDEN, x)]
    torch.testing.assert_close(found[0].loc, found[1].loc)
    assert NOTE in found[1].notes and found[1].num_data == N
    samples = [
        pv.sample_posterior(
            pv.BayesianPPCA(D, 1), rows, num_samples=4, warmup=1, chains=1, seed=0, progress=False
        )
        for rows in (HIDDEN, x)
    ]
    torch.testing.assert_close(samples[0].draws["loc"], samples[1].draws["loc"])
    assert NOTE in samples[1].notes
    scored = samples[1].log_likelihood(x)
    assert scored.shape[-1] == N + 2 and bool((scored[..., EMPTY] == 0).all())
    imputed = pv.impute(
        samples[1].model.model, None, x, num_samples=4, posterior=samples[1], seed=0
    )
    torch.testing.assert_close(imputed.mean[4], samples[1].parameters().loc.mean(0))


def test_stochastic_fits_use_empty_rows_with_a_note():
    x = with_empty_rows(HIDDEN)
    for make in (
        lambda model: pv.AmortizedGuide(torch.nn.Linear(D, 2).double(), 1),
        lambda model: pv.PerDatumGuide(N + 2, 1).double(),
    ):
        model = ppca()
        result = pv.fit_svi(model.model, make(model), x, steps=2, seed=0, progress=False)
        assert any("2 rows with nothing observed took part" in note for note in result.notes)
    model = ppca()
    bound = pv.elbo(model.model, ExactGuide(model), x, seed=0)
    torch.testing.assert_close(bound[EMPTY], torch.zeros(2).double(), atol=1e-12, rtol=0)


def test_estimates_leave_empty_rows_out_with_a_note():
    model, x = ppca(), with_empty_rows(HIDDEN)
    pair, names = (model.model, ExactGuide(model)), [f"row {k}" for k in range(len(x))]
    estimate = pv.log_likelihood(*pair, x, num_samples=5, seed=0)
    expected = model.log_likelihood(HIDDEN).detach()
    torch.testing.assert_close(estimate.value, expected)
    assert estimate.mean == pytest.approx(float(expected.mean())) and NOTE in estimate.notes
    frame = pd.DataFrame(x, index=names)
    kept = [name for k, name in enumerate(names) if k not in EMPTY]
    assert list(pv.log_likelihood(*pair, frame, 5, seed=0).to_frame().index) == kept
    with pytest.raises(ValueError, match=r"rows with nothing observed: \[4, 17\]"):
        pv.log_likelihood(*pair, x, 5, rows=torch.tensor(EMPTY))
    with pytest.raises(ValueError, match=r"rows with nothing observed: \[4, 17\]; drop them"):
        pv.gaps(*pair, x, steps=1)


def test_selections_of_a_model_leave_empty_rows_out_with_a_warning():
    x = with_empty_rows(HIDDEN)
    with pytest.warns(UserWarning, match=r"left out: 2 of 32 \(numbers 4, 17\)"):
        found = select_by_masked_cv(x, noises=["isotropic"], latent_dims=[1])
    expected = select_by_masked_cv(HIDDEN, noises=["isotropic"], latent_dims=[1])
    torch.testing.assert_close(found.rmse, expected.rmse)
    with pytest.warns(UserWarning, match="left out: 2 of 32"):
        compare_latent_dims(x, [1], num_samples=40, warmup=4, chains=1, seed=0)


def test_estimators_take_empty_rows():
    x = with_empty_rows(HIDDEN)
    transformer = PPCATransformer(1, tol=1e-3).fit(x)
    assert NOTE in transformer.notes_
    assert transformer.transform(x)[EMPTY].tolist() == [[0.0], [0.0]]
    np.testing.assert_allclose(transformer.impute(x)[EMPTY], [transformer.mean_] * 2)
    assert transformer.score_samples(x)[EMPTY].tolist() == [0, 0]
    assert transformer.score(x) == pytest.approx(transformer.score(HIDDEN))
    with pytest.raises(ValueError, match="nothing to score"):
        transformer.score(x[EMPTY])
    features = FeatureTransformer(n_components=1, epochs=1).fit(x)
    assert any("nothing observed" in note for note in features.fit_result_.notes)
    assert np.isfinite(features.transform(x)).all()


def test_blocks_count_the_rows_that_they_leave_out():
    blocks = RowBlocks([with_empty_rows(HIDDEN)[:10], with_empty_rows(HIDDEN)[10:]])
    for _ in range(2):
        assert sum(len(block.values) for block in blocks.read()) == N
        assert blocks.notes() == (NOTE,) and blocks.empty_rows == EMPTY
    kept = RowBlocks(with_empty_rows(HIDDEN), keep_empty_rows=True)
    assert sum(len(block.values) for block in kept.read()) == N + 2 and kept.notes() == ()
    with pytest.raises(ValueError, match="x has no observed value in any of its 3 rows"):
        list(RowBlocks(np.full((3, 2), np.nan)).read())
