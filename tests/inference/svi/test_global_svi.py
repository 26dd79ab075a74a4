"""fit_svi of pairs with global latent variables, and automatic guides of them."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from captured import assert_equal, both_fits
from global_pairs import (
    GLOBAL_PAIRS,
    linear_decoder,
    linear_decoder_model,
    random_decoder,
    rows_of,
)
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch.optim.lr_scheduler import CosineAnnealingLR
from user_pairs import N, draw

from ppl_vae.core.autoguides import plate_of_rows
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.objectives.bounds import ELBO, IWAE, elbo

D = 3
NOISE = 0.5


def regression_data():
    """y = w . (inputs), with correlated inputs, so that the posterior of w is correlated."""
    inputs = draw(N, D, seed=20) @ torch.tensor(
        [[1.0, 0.8, 0.0], [0.0, 0.6, 0.5], [0.0, 0.0, 1.0]]
    )
    targets = inputs @ torch.tensor([1.0, -0.5, 0.3]) + NOISE * draw(N, seed=21)
    return torch.cat([inputs, targets[:, None]], 1)


def regression(x, index=None, num_data=None):
    """Bayesian linear regression: w ~ N(0, I), y_n ~ N(w . inputs_n, NOISE^2)."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    with rows_of(x, index, num_data):
        mean = (x[:, :D] * weight).sum(-1)
        pyro.sample("y", dist.Normal(mean, NOISE), obs=x[:, D])


def exact_posterior(x):
    """The mean and the covariance of w, and the log evidence."""
    inputs, targets = x[:, :D], x[:, D]
    precision = torch.eye(D) + inputs.T @ inputs / NOISE**2
    covariance = torch.linalg.inv(precision)
    mean = covariance @ inputs.T @ targets / NOISE**2
    total = inputs @ inputs.T + NOISE**2 * torch.eye(N)
    evidence = dist.MultivariateNormal(torch.zeros(N), total).log_prob(targets)
    return mean, covariance, evidence


def bound_loss(covariance, precision):
    """KL(q || posterior) of the best q of independent normals, which has variances 1 / P_kk."""
    variances = 1 / precision.diagonal()
    return 0.5 * (covariance.logdet() - variances.log().sum())


def trained(guide, x, batch_size, **options):
    options = {"objective": ELBO(10), "scheduler": CosineAnnealingLR, "capture": False} | options
    return fit_svi(
        regression, guide, x, steps=200, batch_size=batch_size, lr=0.05, seed=0, **options
    )


@pytest.mark.parametrize(
    "batch_size", [pytest.param(None, marks=pytest.mark.slow), 8], ids=["all rows", "minibatches"]
)
@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_automatic_guides_reach_the_exact_bound(kind, batch_size, float64):
    """Minibatches scale the terms of the data, not those of w: else the optimum is another."""
    x = regression_data()
    mean, covariance, evidence = exact_posterior(x)
    guide = kind(regression)
    trained(guide, x, batch_size)
    gap = bound_loss(covariance, torch.linalg.inv(covariance)) if kind is AutoNormal else 0.0
    bound = elbo(regression, guide, x, num_samples=4000, seed=0).sum()
    # The draws of the bound have a variance of about D / 2; minibatches leave noise in q.
    assert abs(float(evidence - gap - bound)) < 0.15
    median = guide.median()["weight"]
    assert float(((median - mean) / covariance.diagonal().sqrt()).abs().max()) < 0.3


@pytest.mark.slow
def test_a_low_rank_guide_and_a_point(float64):
    x = regression_data()
    mean, covariance, _ = exact_posterior(x)
    guide = AutoLowRankMultivariateNormal(regression, rank=2)
    trained(guide, x, None)
    assert float((guide.median()["weight"] - mean).abs().max()) < 0.1
    guide = AutoDelta(regression)
    trained(guide, x, None)
    assert float((guide.median()["weight"] - mean).abs().max()) < 1e-3
    assert covariance.shape == (D, D)


def test_pyros_objective_gives_the_same_fit(float64):
    x = regression_data()
    fits = []
    for objective in (ELBO(kl="sampled"), Trace_ELBO()):
        guide = AutoNormal(regression)
        fit = fit_svi(
            regression, guide, x, steps=5, batch_size=8, seed=0, objective=objective, capture=False
        )
        fits.append((fit.objective, guide.median()["weight"]))
    torch.testing.assert_close(fits[0][0], fits[1][0])
    torch.testing.assert_close(fits[0][1], fits[1][1])


CAPTURED = ("linear_decoder", "auto_normal")
OTHERS = sorted(GLOBAL_PAIRS.keys() - {*CAPTURED, "random_decoder"})


@pytest.mark.parametrize(
    "name", [*CAPTURED, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_captured_steps_equal_eager_ones(name, float64):
    """In minibatches of half the data, whose terms are scaled by two."""
    make = GLOBAL_PAIRS[name]
    x = make()[2]
    found = both_fits(lambda: make()[:2], x, steps=3)
    assert_equal(found)


def test_a_prior_on_the_weights_of_a_network_runs_eagerly(float64):
    model, guide, x = random_decoder()
    with pytest.warns(UserWarning, match="PyroSample attributes, which need Pyro's context"):
        fit = fit_svi(model, guide, x, steps=20, seed=0, capture=True)
    assert fit.execution.startswith("eager")


@pytest.mark.slow
def test_captured_steps_with_several_draws_and_warmup(float64):
    x = linear_decoder()[2]
    found = both_fits(lambda: linear_decoder()[:2], x, steps=3, objective=ELBO(3), warmup=4)
    assert_equal(found)


def test_every_pair_trains(float64):
    for make in GLOBAL_PAIRS.values():
        model, guide, x = make()
        fit = fit_svi(model, guide, x, steps=20, batch_size=12, lr=0.1, seed=0, capture=False)
        assert fit.objective[-5:].mean() > fit.objective[:5].mean(), make.__name__


@pytest.mark.slow
def test_per_datum_and_global_variables_of_one_automatic_guide(float64):
    """AutoNormal of z and the globals, in minibatches, against the same on all rows."""
    x = draw(N, 4, seed=5)
    values = []
    for batch_size in (None, 12):
        guide = AutoNormal(linear_decoder_model, init_scale=0.3, create_plates=plate_of_rows)
        fit_svi(
            linear_decoder_model, guide, x, steps=400 if batch_size is None else 800, lr=0.05,
            batch_size=batch_size, objective=ELBO(5), scheduler=CosineAnnealingLR, seed=0,
            capture=False,
        )  # fmt: skip
        values.append(elbo(linear_decoder_model, guide, x, num_samples=500, seed=0).mean())
    assert float(values[0]) == pytest.approx(float(values[1]), abs=0.1)
    plain = AutoNormal(linear_decoder_model)
    with pytest.raises(ValueError, match="AutoNormal without create_plates"):
        fit_svi(linear_decoder_model, plain, x, steps=2, batch_size=12)


def test_validation_rows_are_scored_without_the_kl_of_globals(float64):
    """The validation value is a bound on their predictive density, for any number of rows."""
    model, guide, x = linear_decoder()
    whole = draw(40, 4, seed=22)
    fit = fit_svi(model, guide, x, x_val=whole, steps=30, lr=0.03, seed=0, capture=False)
    value = elbo(model, guide, whole, num_samples=4, global_kl=False, seed=0).mean()
    assert fit.validation is not None
    assert float(fit.validation.max()) == pytest.approx(float(value))
    automatic = AutoNormal(regression)
    rows = regression_data()
    fit_svi(regression, automatic, rows, x_val=rows[:5], steps=3, batch_size=6, capture=False)


def test_a_resumed_fit_is_an_uninterrupted_one(float64, tmp_path):
    x = regression_data()
    fit = functools.partial(fit_svi, regression, x=x, batch_size=6, lr=0.05, seed=0, capture=False)
    whole = AutoMultivariateNormal(regression)
    fit(guide=whole, steps=20)
    part = AutoMultivariateNormal(regression)
    fit(guide=part, steps=10, checkpoint=tmp_path / "fit")
    resumed = AutoMultivariateNormal(regression)
    fit(guide=resumed, steps=20, checkpoint=tmp_path / "fit")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_importance_weighted_bound_is_for_all_rows(float64):
    x = regression_data()
    guide = AutoNormal(regression)
    with pytest.raises(ValueError, match=r"IWAE with global latent variables.*batch_size=None"):
        fit_svi(regression, guide, x, steps=2, batch_size=8, objective=IWAE(3))
    fit = fit_svi(
        regression, guide, x, steps=60, lr=0.05, objective=IWAE(5), seed=0, capture=False
    )
    assert fit.objective[-20:].mean() > fit.objective[:20].mean()


def test_an_automatic_guide_beside_an_encoder_hides_z(float64):
    """The automatic guide has parameters of the globals alone, and the encoder trains."""
    encoder = linear_decoder()[1].encoder
    automatic = AutoNormal(poutine.block(linear_decoder_model, hide=["z"]))

    def guide(x, index=None, num_data=None):
        automatic(x, index=index, num_data=num_data)
        with rows_of(x, index, num_data):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, (0.5 * raw).exp()).to_event(1))

    x = draw(N, 4, seed=5)
    before = encoder[0].weight.detach().clone()
    fit_svi(linear_decoder_model, guide, x, steps=5, batch_size=8, lr=0.05, capture=False)
    assert not torch.equal(before, encoder[0].weight)
    names = {name.removesuffix("_unconstrained") for name, _ in automatic.named_parameters()}
    assert names == {
        "locs.weight", "locs.scale", "scales.weight", "scales.scale",
    }  # fmt: skip
