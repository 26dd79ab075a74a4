"""Global latent variables: runs, their draws, automatic guides, and pairs given a draw."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from global_pairs import (
    GLOBAL_PAIRS,
    MeanFieldGuide,
    WithAutomatic,
    linear_decoder,
    linear_decoder_model,
    normal_mean,
    random_decoder,
)
from ppl_vae.core.batch import Batch
from ppl_vae.core.global_sites import condition_on_globals
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import isolated_store, seeded
from ppl_vae.core.traces import by_draw, by_draw_and_datum
from ppl_vae.evaluation.inference_gaps.gaps import gaps
from ppl_vae.evaluation.latent_space.collapse import kl_by_dimension
from ppl_vae.evaluation.prediction.predictive import encode
from ppl_vae.objectives.bounds import elbo, log_weights
from user_pairs import N, draw

S = 3


def run_of(model, guide, x, num_samples=S):
    pair, batch = Pair(model, guide), Batch(x)
    with isolated_store(), seeded(0), torch.no_grad():
        return pair.run(batch, num_samples=num_samples, dim=pair.sample_dim(batch))


def values_of(run, number):
    """The latent values of one draw, by site."""
    local = {n: by_draw_and_datum(run, s, s["value"])[number] for n, s in run.latent.items()}
    shared = {n: by_draw(s, s["value"])[number] for n, s in run.global_latent.items()}
    return local, shared


@pytest.mark.parametrize("name", GLOBAL_PAIRS)
def test_each_draw_has_global_variables_of_its_own(name, float64):
    """Log p of the values of each draw, by a plain trace of the model alone."""
    model, guide, x = GLOBAL_PAIRS[name]()
    run = run_of(model, guide, x)
    joint = sum(run.per_datum(s, s["fn"].log_prob(s["value"])) for s in run.latent.values())
    joint = joint + sum(
        run.per_datum(s, s["fn"].log_prob(s["value"])) for s in run.observed.values()
    )
    draws = []
    for number in range(S):
        local, shared = values_of(run, number)
        if "offset" in shared:
            shared["offset"] = shared["offset"].reshape(-1, 1)
        trace = poutine.trace(poutine.condition(model, data=local | shared)).get_trace(x)
        trace.compute_log_prob()
        sites = {n: trace.nodes[n] for n in (*run.latent, *run.observed)}
        expected = sum(site["log_prob"] for site in sites.values())
        torch.testing.assert_close(joint[number], expected.expand(N))
        draws.append(torch.cat([value.flatten() for value in shared.values()]))
    if name != "auto_delta":
        assert torch.stack(draws).var(0).min() > 0


@pytest.mark.parametrize("name", GLOBAL_PAIRS)
def test_local_and_global_log_weights_are_all_of_the_joint(name, float64):
    model, guide, x = GLOBAL_PAIRS[name]()
    run = run_of(model, guide, x, 1)
    with torch.no_grad():
        total = run.log_weights().sum() + run.global_log_weights().sum()
        expected = run.model.log_prob_sum() - run.guide.log_prob_sum()
    assert float(total) == pytest.approx(float(expected), rel=1e-10)


def test_programs_that_read_a_matrix_of_weights_run_once_per_draw(float64):
    assert Pair(*random_decoder()[:2]).sample_dim(Batch(draw(N, 4, seed=1))) is None
    assert Pair(*linear_decoder()[:2]).sample_dim(Batch(draw(N, 4, seed=1))) == -2


def test_a_pair_without_local_variables(float64):
    model, guide, x = normal_mean()
    run = run_of(model, guide, x)
    assert not run.latent and list(run.global_latent) == ["theta"]
    assert run.log_weights().shape == (S, N)
    for function in (encode, gaps, kl_by_dimension):
        with pytest.raises(ValueError, match="the model has no latent variables of each datum"):
            function(model, guide, x)


# A pair given a draw


@pytest.mark.parametrize("name", GLOBAL_PAIRS)
def test_a_pair_given_a_draw_has_no_global_variables(name, float64):
    model, guide, x = GLOBAL_PAIRS[name]()
    fixed = condition_on_globals(model, guide, x, seed=1)
    run = run_of(*fixed, x)
    assert not run.global_latent
    if run.latent:
        again = run_of(*fixed, x)
        torch.testing.assert_close(run.log_weights(), again.log_weights())
    other = condition_on_globals(model, guide, x, seed=1)
    torch.testing.assert_close(elbo(*fixed, x, seed=2), elbo(*other, x, seed=2))


def test_there_is_nothing_to_condition_on_without_global_variables():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(1), 0.5))

    with pytest.raises(ValueError, match="nothing to condition on; use the pair itself"):
        condition_on_globals(model, guide, draw(N, 1, seed=0))


# Automatic guides


def test_a_joint_automatic_guide_of_all_variables_is_refused_inside_a_guide(float64):
    """AutoMultivariateNormal of z and the globals has no log weight per datum."""
    joint = AutoMultivariateNormal(linear_decoder_model)

    def guide(x, index=None, num_data=None):
        joint(x)

    with pytest.raises(ValueError, match=r"draws the latent variables of all data as one.*block"):
        log_weights(linear_decoder_model, guide, draw(N, 4, seed=0))


def test_an_automatic_guide_of_globals_and_of_each_datum(float64):
    """AutoNormal has a q of z per datum, and a q of the globals."""
    x = draw(N, 4, seed=0)
    guide = AutoNormal(linear_decoder_model)
    weights = log_weights(linear_decoder_model, guide, x, 5, seed=0)
    assert weights.shape == (5, N)
    with pytest.raises(ValueError, match="AutoNormal has one q per datum for the 24 rows"):
        log_weights(linear_decoder_model, guide, x[:7])


def test_an_automatic_guide_of_globals_alone_takes_any_rows(float64):
    model, _, x = normal_mean()
    guide = AutoNormal(model)
    first = log_weights(model, guide, x, 2, seed=0)
    torch.testing.assert_close(log_weights(model, guide, x[:7], 2, seed=0), first[:, :7])
    index = torch.arange(3, 8)
    part = log_weights(model, guide, x[index], 2, index=index, num_data=N, seed=0)
    torch.testing.assert_close(part, first[:, index])


# Refusals

REFUSED = {
    "undeclared event": (
        lambda: pyro.sample("theta", dist.Normal(torch.zeros(4), 1.0)),
        r"site 'theta' of the model has batch shape \(4,\), more dimensions than plates",
    ),
    "scale": (
        lambda: poutine.scale(
            lambda: pyro.sample("theta", dist.Normal(torch.zeros(4), 1.0).to_event(1)), scale=0.1
        )(),
        "site 'theta' of the model has scale 0.1, where its plates explain 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_global_sites_without_a_density_are_refused(case, float64):
    prior, match = REFUSED[case]
    x = draw(N, 4, seed=0)

    def model(x):
        theta = prior()
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, 1.0).to_event(1), obs=x)

    def guide(x):
        prior()

    with pytest.raises(ValueError, match=match):
        log_weights(model, guide, x)


def test_a_guide_of_another_shape_is_refused(float64):
    guide = WithAutomatic(AutoNormal(poutine.block(normal_mean()[0], hide=["z"])))
    with pytest.raises(ValueError, match="latent sites of the model are missing from the guide"):
        log_weights(linear_decoder_model, guide, draw(N, 4, seed=0))
    with pytest.raises(ValueError, match=r"missing from the guide: \['scale'\]"):
        log_weights(linear_decoder_model, MeanFieldGuide(scale=False), draw(N, 4, seed=0))
