"""Log weights, ELBO and IWAE of any pair, against slow loops, stock Pyro and exact answers."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import oracles
from draws import draw
from global_state import generators, store_names
from gradients import parameters_of, ppca_pair, value_and_gradients
from loops import Recorder, slow_joint_log_weights, slow_log_weights
from ppl_vae.core.state import train_mode
from ppl_vae.guides.families import COVARIANCES
from ppl_vae.guides.guides import AmortizedGuide, ExactGuide
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.networks.mlp_conv import mlp
from ppl_vae.objectives.bounds import ELBO, IWAE, elbo, log_weights
from user_pairs import PAIRS, auto_normal, param_table

WRAPS = [lambda p: p, lambda p: poutine.block(p, hide=[])]
each_pair = pytest.mark.parametrize("name", PAIRS)

D, K, N = 6, 2, 12


def log_mean_exp(weights):
    return torch.logsumexp(weights, 0) - math.log(len(weights))


def assert_same(first, second, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(first, second, rtol=rtol, atol=atol)


# Log weights: every pair against the slow loop


@pytest.mark.parametrize("num_samples", [1, 3])
@each_pair
def test_log_weights_are_those_of_one_draw_and_one_datum_at_a_time(name, num_samples, float64):
    model, guide, x = PAIRS[name]()
    with train_mode(model, guide, training=False):
        with Recorder() as recorder:
            weights = log_weights(model, guide, x, num_samples, seed=0)
        expected = slow_log_weights(model, guide, x, recorder, num_samples)
    assert weights.shape == (num_samples, len(x))
    torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [param_table, auto_normal])
def test_log_weights_of_pairs_that_hold_a_table(make, float64):
    model, guide, x = make()
    with Recorder() as recorder:
        weights = log_weights(model, guide, x, 3, seed=0)
    expected = slow_joint_log_weights(model, guide, x, recorder, 3)
    torch.testing.assert_close(weights.sum(1), expected, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_log_weights_of_our_own_pairs(covariance):
    vae = VAE.mlp(D, K, hidden=(5,), covariance=covariance, seed=0).double()
    x = draw(N, D)
    with Recorder() as recorder:
        weights = log_weights(vae.model, vae.guide, x, 3, seed=0)
    expected = slow_log_weights(vae.model, vae.guide, x, recorder, 3)
    torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-10)


def test_every_draw_of_the_exact_guide_gives_log_p():
    ppca, _, x = ppca_pair()
    exact = ppca.log_likelihood(x)
    for weights in (
        log_weights(ppca.model, ExactGuide(ppca), x, 20, seed=0),
        log_weights(ppca.model, ExactGuide(ppca), x[:5], 20, index=torch.arange(5), num_data=N),
    ):
        torch.testing.assert_close(
            weights, exact[: weights.shape[1]].expand_as(weights), rtol=0, atol=1e-9
        )


def test_weights_have_mean_p_and_the_variance_that_theory_gives():
    """For q = N(m, c^2 P^-1), E[w] = p(x) and E[w^2] / p^2 is known."""
    ppca, _, x = ppca_pair()
    tril = ppca.posterior(x).scale_tril.detach()
    guide = AmortizedGuide(
        lambda x: (ppca.posterior(x).mean, 1.5**0.5 * tril.expand(len(x), K, K)),
        K,
        covariance="full",
    )
    S, covariance = 4_000, (tril @ tril.mT).numpy()
    covariance = covariance if covariance.ndim == 2 else covariance[0]
    weights = log_weights(ppca.model, guide, x, S, seed=0)
    ratio = (weights - ppca.log_likelihood(x)).exp()
    second = oracles.proposal_second_moment(1.5 * covariance, covariance, np.zeros(K))
    z = (ratio.mean() - 1).item() / math.sqrt((second - 1) / ratio.numel())
    assert abs(z) < oracles.z_limit(2)
    # the second moment is bounded here, so its own spread can be read from the draws.
    spread = ratio.square().std().item() / math.sqrt(ratio.numel())
    assert abs(ratio.square().mean().item() - second) < oracles.z_limit(2) * spread


@each_pair
def test_a_seed_repeats_and_nothing_is_left_behind(name, float64):
    model, guide, x = PAIRS[name]()
    with train_mode(model, guide, training=False):
        log_weights(model, guide, x, seed=0)
        before, names = generators(), store_names()
        first, again = (log_weights(model, guide, x, 3, seed=7) for _ in range(2))
        other = log_weights(model, guide, x, 3, seed=8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert generators() == before
    assert store_names() == names == sorted(n for n in names if name == "param_only")


def test_log_weights_have_gradients():
    ppca, _, x = ppca_pair()
    log_weights(ppca.model, ExactGuide(ppca), x, 4, seed=0).mean(0).sum().backward()
    actual = [p.grad.clone() for p in ppca.parameters()]
    expected = torch.autograd.grad(ppca.log_likelihood(x).sum(), list(ppca.parameters()))
    torch.testing.assert_close(actual, list(expected), rtol=1e-8, atol=1e-8)


def test_log_weights_are_unscaled_in_a_minibatch():
    ppca, guide, x = ppca_pair()
    index = torch.tensor([7, 2, 9])
    with Recorder() as recorder:
        part = log_weights(ppca.model, guide, x[index], 2, index=index, num_data=N, seed=0)
    z = recorder.draws(2)[0]["z"]
    loc, scale = guide.loc[index], (0.5 * guide.unconstrained_scale[index]).exp()
    expected = (
        dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        + dist.Normal(z @ ppca.loadings.T + ppca.loc, 0.6).log_prob(x[index]).sum(-1)
        - dist.Normal(loc, scale).log_prob(z).sum(-1)
    )
    torch.testing.assert_close(part[0], expected, rtol=1e-10, atol=1e-10)


def test_permuted_rows_give_permuted_weights():
    ppca, guide, x = ppca_pair()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    guide = ExactGuide(ppca, covariance="unit")
    with Recorder() as recorder:
        weights = log_weights(ppca.model, guide, x[order], 2, seed=0)
    (drawn,) = recorder.values["z"]
    back = slow_log_weights(ppca.model, guide, x[order], recorder, 2)
    torch.testing.assert_close(weights, back)
    with Recorder() as again:
        log_weights(ppca.model, guide, x, 1, seed=0)
    again.values["z"] = [drawn[:, order.argsort()]]
    torch.testing.assert_close(
        slow_log_weights(ppca.model, guide, x, again, 2), weights[:, order.argsort()]
    )


@pytest.mark.parametrize("wrap", WRAPS, ids=["bare", "handler"])
def test_data_of_any_kind_go_to_the_dtype_of_the_pair(wrap):
    vae = VAE.mlp(D, K, hidden=(8,), seed=0).double()
    x = draw(N, D).round()
    expected = log_weights(vae.model, vae.guide, x, 2, seed=0)
    for other in (x.numpy(), x.numpy().astype("f4"), x.int(), x.tolist()):
        actual = log_weights(wrap(vae.model), wrap(vae.guide), other, 2, seed=0)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# Masks


def test_a_masked_column_is_a_column_left_out():
    ppca, guide, x = ppca_pair()
    kept = torch.tensor([0, 2, 3, 5])
    mask = torch.zeros(N, D, dtype=torch.bool)
    mask[:, kept] = True
    smaller = PPCA.from_parameters(
        ppca.loadings.detach()[kept], ppca.loc.detach()[kept], ppca.noise_scale.detach()
    )
    expected = log_weights(smaller.model, guide, x[:, kept], 3, seed=0)
    missing = torch.where(mask, x, torch.nan)
    for weights in (
        log_weights(ppca.model, guide, x, 3, mask=mask, seed=0),
        log_weights(ppca.model, guide, missing, 3, seed=0),
        log_weights(ppca.model, guide, missing.numpy(), 3, mask=mask.numpy(), seed=0),
    ):
        torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["functions", "regularized"])
def test_masked_cells_are_dropped_one_by_one(name, float64):
    model, guide, x = PAIRS[name]()
    x = torch.from_numpy(oracles.with_missing_values(x.numpy(), 0.4, seed=0))
    observed = ~x.isnan()
    with train_mode(model, guide, training=False):
        with Recorder() as recorder:
            weights = log_weights(model, guide, x, 3, seed=0)
        filled = torch.where(observed, x, 0.0)
        complete = slow_log_weights(model, guide, filled, recorder, 3)
        for s, values in enumerate(recorder.draws(3)):
            with poutine.condition(data=values):
                fn = poutine.trace(model).get_trace(filled).nodes["x"]["fn"]
            unseen = (fn.base_dist.log_prob(filled) * ~observed).sum(-1)
            torch.testing.assert_close(weights[s], complete[s] - unseen, rtol=1e-9, atol=1e-9)


def test_missing_values_leave_finite_gradients():
    vae = VAE.mlp(D, K, hidden=(8,), seed=0).double()
    x = torch.from_numpy(oracles.with_missing_values(draw(N, D).numpy(), 0.4, seed=0))
    for objective in (ELBO(), ELBO(3), IWAE(3), *CUT, ELBO(2, gradient="score-loo")):
        vae.zero_grad()
        filled, mask = torch.where(x.isnan(), 0.0, x), ~x.isnan()
        objective.differentiable_loss(vae.model, vae.guide, filled, mask=mask).backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in vae.parameters())


# The ELBO


@each_pair
def test_the_sampled_elbo_is_the_mean_of_the_log_weights(name, float64):
    model, guide, x = PAIRS[name]()
    with train_mode(model, guide, training=False), pyro.get_param_store().scope():
        for num_samples in (1, 3):
            torch.manual_seed(0)
            with Recorder() as recorder:
                loss = ELBO(num_samples, kl="sampled").loss(model, guide, x)
            expected = slow_log_weights(model, guide, x, recorder, num_samples).mean(0).sum()
            assert loss == pytest.approx(-expected.item(), rel=1e-10)


@each_pair
def test_one_sampled_draw_is_stock_trace_elbo(name, float64):
    model, guide, x = PAIRS[name]()
    assert_same(
        *[value_and_gradients(o, model, guide, x) for o in (Trace_ELBO(), ELBO(kl="sampled"))]
    )


SAME_ORDER = [name for name in PAIRS if name != "two_level"]


@pytest.mark.parametrize("name", SAME_ORDER)
def test_one_draw_is_stock_mean_field_elbo(name, float64):
    model, guide, x = PAIRS[name]()
    assert_same(
        *[value_and_gradients(o, model, guide, x) for o in (TraceMeanField_ELBO(), ELBO())]
    )


@pytest.mark.parametrize("name", ["functions", "tutorial", "unnamed_modules", "positive_latent"])
def test_many_draws_are_stock_vectorized_particles(name, float64):
    model, guide, x = PAIRS[name]()
    stock = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    assert_same(*[value_and_gradients(o, model, guide, x) for o in (stock, ELBO(5, kl="sampled"))])


def test_sites_in_another_order_are_never_given_a_closed_kl(float64):
    model, guide, x = PAIRS["two_level"]()
    values = []
    for objective in (Trace_ELBO(), ELBO(), ELBO(kl="sampled")):
        torch.manual_seed(0)
        values.append(objective.loss(model, guide, x))
    assert values[1] == values[2] == pytest.approx(values[0], rel=1e-12)
    torch.manual_seed(0)
    with pyro.validation_enabled(False):
        assert TraceMeanField_ELBO().loss(model, guide, x) != pytest.approx(values[0], rel=1e-6)


def test_a_guide_that_carries_a_density_is_never_given_a_closed_kl(float64):
    """AutoNormal samples a Delta with the log Jacobian of its transform in ``log_density``."""
    model, guide, x = auto_normal()
    values = []
    for objective in (Trace_ELBO(), ELBO(), ELBO(kl="sampled")):
        torch.manual_seed(0)
        values.append(objective.loss(model, guide, x))
    assert values[2] == pytest.approx(values[0], rel=1e-12)
    assert values[1] == pytest.approx(values[0], rel=1e-12)


def test_a_program_may_know_the_size_of_its_data_itself():
    """Without keywords: the plate's own full size scales the loss, as in stock Pyro."""

    def model(x):
        with pyro.plate("data", 1000, subsample=torch.arange(len(x))):
            two_sites(x)

    def guide(x):
        with pyro.plate("data", 1000, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(x[:, :K], 0.5).to_event(1))

    x, values = draw(N, D), []
    for objective in (Trace_ELBO(), ELBO(kl="sampled"), IWAE(1)):
        torch.manual_seed(0)
        values.append(objective.loss(model, guide, x))
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-10)


def index_cases():
    index = torch.tensor([7, 2, 9])
    return {
        "all": ({}, slice(None)),
        "minibatch": ({"index": index, "num_data": N}, index),
        "the first of many": ({"index": torch.arange(N), "num_data": 5 * N}, slice(None)),
    }


STOCK = [(Trace_ELBO, lambda: ELBO(kl="sampled"), covariance) for covariance in COVARIANCES]
# Stock Pyro has no closed-form KL for a full covariance.
STOCK += [(TraceMeanField_ELBO, ELBO, covariance) for covariance in COVARIANCES[:-1]]


@pytest.mark.parametrize("case", index_cases())
@pytest.mark.parametrize(("stock", "ours", "covariance"), STOCK)
def test_our_pairs_under_stock_objectives(stock, ours, covariance, case):
    keywords, rows = index_cases()[case]
    ppca, table, x = ppca_pair(covariance)
    amortized = AmortizedGuide(
        mlp(D, K + table.unconstrained_scale.shape[-1], seed=0), K, covariance=covariance
    )
    guides = [amortized.double(), ExactGuide(ppca, covariance=covariance)]
    for guide in guides if case == "the first of many" else [table, *guides]:
        both = [
            value_and_gradients(o, ppca.model, guide, x[rows], **keywords)
            for o in (stock(), ours())
        ]
        assert_same(*both)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_the_closed_kl_is_that_of_the_oracle(covariance):
    ppca, guide, x = ppca_pair(covariance)
    _, kl = ELBO(3).terms(ppca.model, guide, x)
    q = guide.distribution(x)
    full = covariance == "full"
    S = q.covariance_matrix if full else torch.diag_embed(q.variance)
    expected = [
        oracles.gaussian_kl(m, s, np.zeros(K), np.eye(K))
        for m, s in zip(q.mean.detach().numpy(), S.detach().numpy(), strict=True)
    ]
    np.testing.assert_allclose(kl.detach().numpy(), expected, rtol=1e-10)


def test_the_closed_kl_of_a_full_covariance_against_any_diagonal_prior():
    loc, scale = draw(K, seed=5), draw(K, seed=6).exp()
    _, guide, x = ppca_pair("full")

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
            px = dist.Normal(z.sum(-1, keepdim=True), 1.0).expand(x.shape)
            pyro.sample("x", px.to_event(1), obs=x)

    torch.manual_seed(0)
    reconstruction, kl = ELBO().terms(model, guide, x)
    q = guide.distribution(x)
    expected = [
        oracles.gaussian_kl(m, s, loc.numpy(), np.diag(scale.numpy() ** 2))
        for m, s in zip(q.mean.detach().numpy(), q.covariance_matrix.detach().numpy(), strict=True)
    ]
    np.testing.assert_allclose(kl.detach().numpy(), expected, rtol=1e-10)
    torch.manual_seed(0)
    other = ELBO(kl="sampled").terms(model, guide, x)
    torch.testing.assert_close(reconstruction, other[0])


@pytest.mark.parametrize("name", SAME_ORDER)
def test_closed_and_sampled_kl_have_one_expectation(name, float64):
    model, guide, x = PAIRS[name]()
    # As many runs of one draw per datum each: x repeated, so that nothing needs a sample plate.
    repeats = 100
    x = x.repeat(repeats, 1)
    with train_mode(model, guide, training=False), pyro.get_param_store().scope(), torch.no_grad():
        torch.manual_seed(0)
        reconstruction, kl = ELBO().terms(model, guide, x)
        weights = ELBO(kl="sampled").terms(model, guide, x)
    difference = (reconstruction - kl - weights[0] + weights[1]).reshape(repeats, -1).sum(1)
    z = difference.mean() / (difference.std() / repeats**0.5)
    assert abs(z) < oracles.z_limit(len(SAME_ORDER)) or difference.abs().max() < 1e-9


def test_terms_add_up():
    ppca, guide, x = ppca_pair()
    for objective in (ELBO(4), ELBO(4, kl="sampled")):
        torch.manual_seed(0)
        reconstruction, kl = objective.terms(ppca.model, guide, x)
        torch.manual_seed(0)
        mean, num_data = objective.mean_value(ppca.model, guide, x)
        assert reconstruction.shape == kl.shape == (N,)
        torch.testing.assert_close(mean, (reconstruction - kl).mean())
        assert num_data == N


@pytest.mark.parametrize("beta", [0.0, 0.25, 4.0])
@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_beta_weighs_the_kl(kl, beta):
    ppca, guide, x = ppca_pair()
    torch.manual_seed(0)
    reconstruction, divergence = ELBO(3, kl=kl).terms(ppca.model, guide, x)
    torch.manual_seed(0)
    loss = ELBO(3, beta=beta, kl=kl).loss(ppca.model, guide, x)
    assert loss == pytest.approx(-(reconstruction - beta * divergence).sum().item(), rel=1e-12)


@pytest.mark.parametrize("gradient", ["reparameterized", "stl", "score-loo"])
@pytest.mark.parametrize("beta", [0.25, 4.0])
def test_beta_is_the_variance_of_the_decoder(beta, gradient, float64):
    """objective(s2 = 1, beta = b) = b objective(s2 = b, beta = 1) + constant, and its gradient.

    With log N(x; m, s2) = -(x - m)^2 / (2 s2) - log(2 pi s2) / 2 the constant is, for D cells,
    D / 2 (b log(2 pi b) - log(2 pi)).
    """
    networks, x = [mlp(K, D, seed=0), mlp(D, 2 * K, seed=1)], draw(N, D)
    parameters, values, slopes = [p for n in networks for p in n.parameters()], [], []
    for sigma, weight in ((1.0, beta), (beta**0.5, 1.0)):
        shape = {"likelihood": Gaussian(sigma), "data_dim": D, "latent_dim": K}
        vae = VAE(decoder=networks[0], encoder=networks[1], **shape)
        torch.manual_seed(0)
        objective = ELBO(2, beta=weight, gradient=gradient)
        loss = objective.differentiable_loss(vae.model, vae.guide, x)
        values.append(-loss.item() / N)
        slopes.append(torch.autograd.grad(loss, parameters))
    constant = 0.5 * D * (beta * math.log(2 * math.pi * beta) - math.log(2 * math.pi))
    assert values[0] == pytest.approx(beta * values[1] + constant, rel=1e-12)
    assert_same(slopes[0], tuple(beta * slope for slope in slopes[1]), 1e-10, 1e-10)


def kl_by_dimension(guide, x):
    q = guide.distribution(x).base_dist
    return 0.5 * (q.loc**2 + q.scale**2 - 1 - 2 * q.scale.log()).mean(0)


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("floor", [0.01, 0.2, 5.0])
def test_free_bits_are_a_floor_under_the_kl_of_each_dimension(floor, num_samples):
    ppca, guide, x = ppca_pair()
    with torch.no_grad():
        guide.loc[:, 1] *= 3  # one dimension above the middle floor, one below
        guide.loc[:, 0] *= 0.1
        guide.unconstrained_scale[:, 0] *= 0.1
    torch.manual_seed(0)
    reconstruction, _ = ELBO(num_samples).terms(ppca.model, guide, x)
    by_dimension = kl_by_dimension(guide, x)
    torch.manual_seed(0)
    loss = ELBO(num_samples, free_bits=floor).loss(ppca.model, guide, x)
    expected = reconstruction.mean() - by_dimension.clamp(min=floor).sum()
    assert loss == pytest.approx(-N * expected.item(), rel=1e-12)
    assert by_dimension[0] < 0.2 < by_dimension[1]


def test_below_its_floor_the_kl_has_no_gradient():
    _, guide, x = ppca_pair()

    def model(x):  # does not read z, so that only the KL has a gradient
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(x.new_zeros(D), 1.0).to_event(1), obs=x)

    ELBO(free_bits=100.0).differentiable_loss(model, guide, x).requires_grad_().backward()
    assert guide.loc.grad is None or not guide.loc.grad.any()
    ELBO(free_bits=1e-9).differentiable_loss(model, guide, x).backward()
    torch.testing.assert_close(guide.loc.grad, guide.loc.detach())


def test_free_bits_of_a_plate_of_latent_variables_hold_for_each():
    """Latent dimensions as an inner plate, not as an event."""
    x = draw(N, D)
    loc, scale = draw(N, K, seed=1), draw(N, K, seed=2).exp()

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            with pyro.plate("dimensions", K, dim=-1):
                pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(x.new_zeros(1, D), 1.0).to_event(1), obs=x.unsqueeze(1))

    def guide(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("dimensions", K, dim=-1):
            pyro.sample("z", dist.Normal(loc, scale))

    kl = 0.5 * (loc**2 + scale**2 - 1 - 2 * scale.log()).mean(0)
    floor = kl.mean().item()
    assert kl.min() < floor < kl.max()
    reconstruction, _ = ELBO().terms(model, guide, x)
    loss = ELBO(free_bits=floor).loss(model, guide, x)
    expected = reconstruction.mean() - kl.clamp(min=floor).sum()
    assert loss == pytest.approx(-N * expected.item(), rel=1e-12)


def test_free_bits_of_a_kl_without_a_closed_form(float64):
    """Gamma prior, log-normal guide: the floor stands under the sampled KL."""
    model, guide, x = PAIRS["positive_latent"]()
    torch.manual_seed(0)
    reconstruction, kl = ELBO(4).terms(model, guide, x)
    torch.manual_seed(0)
    low = ELBO(4, free_bits=1e-12).loss(model, guide, x) / len(x)
    assert low == pytest.approx(-(reconstruction - kl).mean().item(), rel=1e-9)
    torch.manual_seed(0)
    high = ELBO(4, free_bits=50.0).loss(model, guide, x) / len(x)
    assert high == pytest.approx(-(reconstruction.mean() - 2 * 50.0).item(), rel=1e-12)


def test_free_bits_stand_under_the_sampled_kl_where_it_is_asked_for():
    ppca, guide, x = ppca_pair()
    torch.manual_seed(0)
    reconstruction, kl = ELBO(3, kl="sampled").terms(ppca.model, guide, x)
    torch.manual_seed(0)
    loss = ELBO(3, kl="sampled", free_bits=1e-12).loss(ppca.model, guide, x)
    assert loss == pytest.approx(-(reconstruction - kl).sum().item(), rel=1e-12)


# The ELBO of a data set


def test_the_elbo_of_each_datum_is_unbiased():
    ppca, _, x = ppca_pair(N=300)
    guide = ExactGuide(ppca, covariance="isotropic")
    gap = oracles.best_q_gap(ppca.loadings.detach().numpy(), 0.36, "isotropic")
    error = elbo(ppca.model, guide, x, seed=0) - (ppca.log_likelihood(x).detach() - gap)
    assert gap > 0.01
    z = error.mean() / (error.std() / len(x) ** 0.5)
    assert abs(z) < oracles.z_limit()


@pytest.mark.parametrize("fraction", [0.0, 0.3])
@pytest.mark.parametrize("batch_size", [1, 5, N, 100])
def test_rows_are_looked_up_by_their_place_in_the_data(batch_size, fraction):
    ppca, table, x = ppca_pair()
    x = torch.from_numpy(oracles.with_missing_values(x.numpy(), fraction, seed=0))
    centres = table.loc.detach()

    def guide(x, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            pyro.sample("z", dist.Normal(centres[rows], 1e-9).to_event(1))

    values = elbo(ppca.model, guide, x, batch_size=batch_size, seed=0)
    residual = (x - centres @ ppca.loadings.T - ppca.loc) / ppca.noise_scale
    cells = -0.5 * residual.square() - 0.5 * math.log(2 * math.pi * 0.6**2)
    kl = 0.5 * (centres.square() + 1e-18 - 1 - 2 * math.log(1e-9)).sum(-1)
    expected = torch.where(x.isnan(), 0.0, cells).sum(-1) - kl
    torch.testing.assert_close(values, expected.detach(), rtol=0, atol=1e-6)


@each_pair
def test_the_elbo_of_any_pair_runs_in_evaluation_mode_and_leaves_nothing(name):
    model, guide, x = PAIRS[name]()
    modules = [m for m in (getattr(model, "__self__", model), guide) if isinstance(m, nn.Module)]
    log_weights(model, guide, x)  # parameters without a home enter the store here
    buffers = [b for m in modules for b in m.buffers()]
    before_buffers = [b.clone() for b in buffers]
    before, names = generators(), store_names()
    first, again = (elbo(model, guide, x, num_samples=2, batch_size=9, seed=3) for _ in range(2))
    assert first.shape == (len(x),)
    assert first.isfinite().all()
    assert not first.requires_grad
    assert torch.equal(first, again)
    assert generators() == before
    assert store_names() == names
    assert all(part.training for m in modules for part in m.modules())
    assert all(torch.equal(a, b) for a, b in zip(before_buffers, buffers, strict=True))


def test_the_elbo_does_not_depend_on_the_mode_it_is_called_in(float64):
    model, guide, x = PAIRS["regularized"]()
    values = []
    for training in (True, False):
        with train_mode(model, guide, training=training):
            values.append(elbo(model, guide, x, num_samples=2, seed=0))
    assert torch.equal(*values)


# IWAE


@each_pair
def test_iwae_is_the_slow_log_mean_exp(name, float64):
    model, guide, x = PAIRS[name]()
    with train_mode(model, guide, training=False), pyro.get_param_store().scope():
        torch.manual_seed(0)
        with Recorder() as recorder:
            loss = IWAE(4).loss(model, guide, x)
        weights = slow_log_weights(model, guide, x, recorder, 4)
    assert loss == pytest.approx(-log_mean_exp(weights).sum().item(), rel=1e-10)


def test_one_importance_sample_is_the_elbo(float64):
    model, guide, x = PAIRS["functions"]()
    assert_same(*[value_and_gradients(o, model, guide, x) for o in (Trace_ELBO(), IWAE(1))])


@pytest.mark.parametrize("objective", [ELBO(4, kl="sampled"), IWAE(4)], ids=repr)
def test_a_minibatch_keeps_the_bound_a_bound(objective):
    """With the exact guide every weight is p(x): a scale inside the logarithm would show."""
    ppca, _, x = ppca_pair()
    index = torch.tensor([7, 2, 9])
    guide, exact = ExactGuide(ppca), ppca.log_likelihood(x[index]).mean().item()
    loss = objective.loss(ppca.model, guide, x[index], index=index, num_data=1000)
    assert loss == pytest.approx(-1000 * exact, rel=1e-10)


def test_iwae_in_a_minibatch_is_the_slow_loop():
    ppca, guide, x = ppca_pair()
    index = torch.tensor([7, 2, 9])
    torch.manual_seed(0)
    with Recorder() as recorder:
        loss = IWAE(5).loss(ppca.model, guide, x[index], index=index, num_data=N)
    z = recorder.values["z"][0]
    joint = dist.Normal(z @ ppca.loadings.T + ppca.loc, 0.6).log_prob(x[index]).sum(-1)
    joint = joint + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    weights = joint - guide.distribution(x[index], index).log_prob(z)
    assert z.shape == (5, 3, K)
    assert loss == pytest.approx(-N * log_mean_exp(weights).mean().item(), rel=1e-10)


def test_iwae_is_tighter_than_the_elbo_and_never_above_log_p_by_chance():
    ppca, _, x = ppca_pair(N=200)
    guide = ExactGuide(ppca, covariance="unit")
    with torch.no_grad():
        weights = log_weights(ppca.model, guide, x, 64, seed=0)
        exact = ppca.log_likelihood(x)
    bounds = torch.stack([log_mean_exp(weights[:S]) for S in (1, 8, 64)])
    means = bounds.mean(1)
    assert means[0] < means[1] < means[2]
    error = (bounds[2] - exact).std() / len(x) ** 0.5
    assert (means[2] - exact.mean()) / error < oracles.z_limit()


# As objectives of Pyro's SVI


TRAINED = [ELBO(), ELBO(3, kl="sampled"), IWAE(3)]
UNREGISTERED = {"functions", "two_level", "normalized_over_dim_one", "positive_latent"}
"""Pairs whose networks are no parameters to Pyro, so that its SVI does not train them."""


def assert_trained(losses, before, after):
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


FIRST_AND_OTHERS = [TRAINED[0], *(pytest.param(o, marks=pytest.mark.slow) for o in TRAINED[1:])]


@pytest.mark.parametrize("objective", FIRST_AND_OTHERS, ids=repr)
@each_pair
def test_every_pair_trains(name, objective):
    model, guide, x = PAIRS[name]()
    parameters = parameters_of(model, guide, x)
    before = [p.detach().clone() for p in parameters]
    optimizer, losses = torch.optim.Adam(parameters, lr=0.03), []
    torch.manual_seed(0)
    for _ in range(25):
        optimizer.zero_grad()
        loss = objective.differentiable_loss(model, guide, x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_trained(losses, before, parameters)


@pytest.mark.parametrize("objective", FIRST_AND_OTHERS, ids=repr)
@pytest.mark.parametrize("name", sorted(PAIRS.keys() - UNREGISTERED))
def test_stock_svi_trains_with_our_objectives(name, objective):
    model, guide, x = PAIRS[name]()
    parameters = parameters_of(model, guide, x)
    before = [p.detach().clone() for p in parameters]
    torch.manual_seed(0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), objective)
    assert_trained([svi.step(x) for _ in range(25)], before, parameters)


def test_evaluating_a_loss_moves_nothing():
    vae, x = VAE.mlp(D, K, hidden=(8,), seed=0), draw(N, D).float()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.1}), ELBO())
    before = [p.detach().clone() for p in vae.parameters()]
    loss = svi.evaluate_loss(x)
    assert isinstance(loss, float)
    assert all(torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True))
    assert all(p.grad is None for p in vae.parameters())


def test_gradients_are_added_to_what_is_there():
    ppca, guide, x = ppca_pair()
    for _ in range(2):
        torch.manual_seed(0)
        ELBO().loss_and_grads(ppca.model, guide, x)
    twice = guide.loc.grad.clone()
    guide.loc.grad = None
    torch.manual_seed(0)
    ELBO().loss_and_grads(ppca.model, guide, x)
    torch.testing.assert_close(twice, 2 * guide.loc.grad)


def test_an_objective_is_a_pyro_elbo():
    vae, x = VAE.mlp(D, K, hidden=(8,), seed=0), draw(N, D).float()

    class Both(nn.Module):
        def __init__(self, program):
            super().__init__()
            self.vae, self.program = vae, program

        def forward(self, x):
            return self.program(x)

    loss = ELBO()(Both(vae.model), vae.guide)(x)
    loss.backward()
    assert all(p.grad is not None for p in vae.parameters())
    assert isinstance(ELBO(), pyro.infer.ELBO)
    assert isinstance(IWAE(), pyro.infer.ELBO)


@pytest.mark.parametrize("wrap", WRAPS, ids=["bare", "handler"])
def test_one_objective_serves_pairs_of_every_nesting(wrap, float64):
    shared = ELBO(3)
    for name in ("functions", "feature_plate", "two_level", "functions", "naive_conv"):
        model, guide, x = PAIRS[name]()
        values = []
        for objective in (shared, ELBO(3)):
            objective.loss(wrap(model), wrap(guide), x)
            torch.manual_seed(0)
            values.append(objective.loss(wrap(model), wrap(guide), x))
        assert values[0] == values[1]


def test_a_condition_is_a_model_too():
    ppca, guide, x = ppca_pair()
    conditioned = poutine.condition(ppca.model, data={"x": x})
    torch.testing.assert_close(
        log_weights(conditioned, guide, x, 2, seed=0), log_weights(ppca.model, guide, x, 2, seed=0)
    )


# Sites that are no latent variable


def test_deterministic_sites_and_factors():
    ppca, guide, x = ppca_pair()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            mean = pyro.deterministic("mean", z @ ppca.loadings.T + ppca.loc, event_dim=1)
            pyro.sample("x", dist.Normal(mean, 0.6).to_event(1), obs=x)
            pyro.factor("prize", z.sum(-1))

    with Recorder() as recorder:
        weights = log_weights(model, guide, x, 3, seed=0)
    z = recorder.values["z"][0]
    plain = log_weights(ppca.model, guide, x, 3, seed=0)
    torch.testing.assert_close(weights, plain + z.sum(-1))
    for objective in (ELBO(3), ELBO(3, kl="sampled")):
        torch.manual_seed(0)
        with Recorder() as recorder:
            loss = objective.loss(model, guide, x)
        torch.manual_seed(0)
        bonus = recorder.values["z"][0].sum(-1).mean(0).sum().item()
        expected = objective.loss(ppca.model, guide, x) - bonus
        assert loss == pytest.approx(expected, rel=1e-10)


def delta(u):
    """A point mass at 2 u, carrying the log Jacobian -K log 2."""
    return dist.Delta(2 * u, log_density=torch.full_like(u[..., 0], -K * math.log(2)), event_dim=1)


def independent_delta(u):
    return dist.Delta(2 * u, log_density=torch.full_like(u, -math.log(2))).to_event(1)


@pytest.mark.parametrize("point", [delta, independent_delta])
def test_auxiliary_sites_count_in_the_guide(point):
    """z = 2 u by way of an auxiliary Gaussian u and a Delta with the log Jacobian."""
    ppca, _, x = ppca_pair()

    def guide(x):
        with pyro.plate("data", len(x)):
            q = dist.Normal(x[:, :K], 0.3).to_event(1)
            u = pyro.sample("u", q, infer={"is_auxiliary": True})
            pyro.sample("z", point(u))

    with Recorder() as recorder:
        weights = log_weights(ppca.model, guide, x, 3, seed=0)
    torch.testing.assert_close(
        weights, slow_log_weights(ppca.model, guide, x, recorder, 3), rtol=1e-10, atol=1e-10
    )
    torch.manual_seed(0)
    closed = ELBO(3).loss(ppca.model, guide, x)
    torch.manual_seed(0)
    assert closed == pytest.approx(ELBO(3, kl="sampled").loss(ppca.model, guide, x), rel=1e-10)


def test_poutine_mask_counts_as_a_mask():
    ppca, guide, x = ppca_pair()
    keep = torch.arange(N) % 2 == 0

    def model(x):
        with poutine.mask(mask=keep):
            return ppca.model(x)

    def masked_guide(x):
        with poutine.mask(mask=keep):
            return guide(x)

    weights = log_weights(model, masked_guide, x, 2, seed=0)
    plain = log_weights(ppca.model, guide, x, 2, seed=0)
    torch.testing.assert_close(weights, plain * keep)
    torch.manual_seed(0)
    both = ELBO().loss(model, masked_guide, x)
    torch.manual_seed(0)
    reconstruction, kl = ELBO().terms(ppca.model, guide, x)
    assert both == pytest.approx(-((reconstruction - kl) * keep).sum().item(), rel=1e-10)


# Refusals


def model_with(body):
    def model(x):
        with pyro.plate("data", len(x)):
            body(x)

    return model


def guide_with(body):
    return model_with(body)


def z_site(x, name="z"):
    return pyro.sample(name, dist.Normal(x.new_zeros(K), 1.0).to_event(1))


def x_site(x):
    return pyro.sample("x", dist.Normal(x.new_zeros(D), 1.0).to_event(1), obs=x)


def two_sites(x):
    z_site(x)
    x_site(x)


GOOD_MODEL, GOOD_GUIDE = model_with(two_sites), guide_with(z_site)


def scaled_model(x):
    with pyro.plate("data", len(x)):
        with poutine.scale(scale=0.5):
            z_site(x)
        x_site(x)


def tensor_scaled_guide(x):
    with pyro.plate("data", len(x)), poutine.scale(scale=torch.tensor(0.5)):
        z_site(x)


def outside_model(x):
    z_site(x)
    with pyro.plate("data", len(x)):
        x_site(x)


def outside_data_model(x):
    with pyro.plate("data", len(x)):
        z_site(x)
    pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(2), obs=x)


def other_name_model(x):
    with pyro.plate("rows", len(x)):
        two_sites(x)


def other_name_guide(x):
    with pyro.plate("rows", len(x)):
        z_site(x)


def sequential_model(x):
    for n in pyro.plate("data", len(x)):
        pyro.sample(f"z_{n}", dist.Normal(0.0, 1.0))


def sequential_guide(x):
    sequential_model(x)


def oversized_model(x):
    with pyro.plate("data", 2 * len(x)):
        two_sites(torch.cat([x, x]))


def oversized_guide(x):
    with pyro.plate("data", 2 * len(x)):
        z_site(x)


def observed_guide(x):
    z_site(x)
    pyro.sample("x", dist.Normal(x, 1.0).to_event(1))


def two_latent_guide(x):
    z_site(x)
    z_site(x, "y")


def two_latent_model(x):
    two_sites(x)
    z_site(x, "y")


SCALE = r"has scale 0.5, where its plates explain 1 \(poutine.scale\?\).*remove the scale"
REFUSED = {
    "scale": (scaled_model, GOOD_GUIDE, f"site 'z' of the model {SCALE}"),
    "tensor scale": (GOOD_MODEL, tensor_scaled_guide, "site 'z' of the guide has scale"),
    "scaled whole": (poutine.scale(GOOD_MODEL, scale=2.0), GOOD_GUIDE, "model has scale 2.0"),
    "missing latent": (
        model_with(two_latent_model),
        GOOD_GUIDE,
        r"latent sites of the model are missing from the guide: \['y'\]",
    ),
    "observed": (
        GOOD_MODEL,
        guide_with(observed_guide),
        r"sites of the guide are observed in the model: \['x'\]",
    ),
    "unknown": (
        GOOD_MODEL,
        guide_with(two_latent_guide),
        r"site 'y' of the guide is not in the model.*is_auxiliary",
    ),
    "outside": (
        outside_model,
        GOOD_GUIDE,
        "site 'z' is outside the plate 'data' in the model and inside it in the guide",
    ),
    "outside guide": (
        GOOD_MODEL,
        z_site,
        "site 'z' is inside the plate 'data' in the model and outside it in the guide",
    ),
    "data outside": (
        outside_data_model,
        GOOD_GUIDE,
        r"sites \['x'\] of the model are observed outside the plate 'data', and none inside",
    ),
    "other plate": (
        other_name_model,
        other_name_guide,
        r"sites \['x', 'z'\] of the model are outside the plate 'data', and none is inside",
    ),
    "sequential": (
        sequential_model,
        sequential_guide,
        "sites .*'z_0'.* of the model are outside the plate 'data', and none is inside",
    ),
    "size": (
        oversized_model,
        oversized_guide,
        f"in a plate 'data' of size {2 * N}, and x has {N} rows.*subsample=index",
    ),
    "empty": (lambda x: None, lambda x: None, "the model has no sample sites"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_log_weight_a_datum_is_refused(case):
    model, guide, match = REFUSED[case]
    x = draw(N, D)
    with pytest.raises(ValueError, match=match):
        log_weights(model, guide, x)
    for objective in (ELBO(), ELBO(3), IWAE(3)):
        with pytest.raises(ValueError, match=match):
            objective.loss(model, guide, x)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_forgotten_event_dimension_is_refused(num_samples):
    """With as many rows as columns, Pyro's plate takes the columns for the rows."""

    def model(x):
        with pyro.plate("data", len(x)):
            z_site(x)
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0), obs=x)

    match = rf"site 'x' of the model has batch shape \({N}, {N}\).*to_event"
    with pytest.raises(ValueError, match=match):
        log_weights(model, GOOD_GUIDE, draw(N, N), num_samples)


def test_the_good_pair_of_the_refusals_is_good():
    assert log_weights(GOOD_MODEL, GOOD_GUIDE, draw(N, D), 3).shape == (3, N)


def poisson_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Poisson(torch.ones(K)).to_event(1))


def poisson_model(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Poisson(2 * torch.ones(K)).to_event(1))
        x_site(x)


CUT = [ELBO(gradient="stl"), IWAE(2, gradient="dreg")]


@pytest.mark.parametrize("objective", [ELBO(), IWAE(2), *CUT], ids=repr)
def test_a_gradient_needs_reparameterized_sites(objective):
    x = draw(N, D)
    match = r"site 'z' of the guide has no reparameterized gradient.*score-loo.*TraceGraph_ELBO"
    with pytest.raises(ValueError, match=match):
        objective.differentiable_loss(poisson_model, poisson_guide, x)
    with pytest.raises(ValueError, match=match):
        ELBO(gradient="score").terms(poisson_model, poisson_guide, x)
    assert math.isfinite(objective.loss(poisson_model, poisson_guide, x))
    with torch.no_grad():
        assert log_weights(poisson_model, poisson_guide, x, 3).shape == (3, N)


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("size", [1, K + 1])
def test_a_guide_of_another_latent_size_is_refused(size, num_samples):
    ppca, _, x = ppca_pair()
    guide = AmortizedGuide(mlp(D, 2 * size, seed=0), size).double()
    match = rf"site 'z'.*event shape \({size},\) in the guide and \({K},\) in the model"
    with pytest.raises(ValueError, match=match):
        log_weights(ppca.model, guide, x, num_samples)


def test_a_latent_size_that_broadcasts_is_refused():
    def narrow_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))

    match = rf"event shape \(1,\) in the guide and \({K},\) in the model"
    with pytest.raises(ValueError, match=match):
        log_weights(GOOD_MODEL, narrow_guide, draw(N, D))


def test_missing_values_need_a_model_that_takes_a_mask():
    x = draw(N, D)
    x[0, 0] = torch.nan
    match = "x has 1 missing entries, but the model takes no keyword 'mask'"
    with pytest.raises(ValueError, match=match):
        log_weights(GOOD_MODEL, GOOD_GUIDE, x)
    with pytest.raises(ValueError, match=match):
        elbo(GOOD_MODEL, GOOD_GUIDE, x)


def test_a_model_that_observes_nothing_has_no_elbo():
    with pytest.raises(ValueError, match="the model observes nothing; pass its data on as obs=x"):
        ELBO().loss(GOOD_GUIDE, GOOD_GUIDE, draw(N, D))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ELBO(0), "num_samples must be a whole number >= 1; got 0"),
        (lambda: IWAE(-1), "num_samples must be a whole number >= 1; got -1"),
        (lambda: log_weights(GOOD_MODEL, GOOD_GUIDE, draw(N, D), 0), "num_samples must be"),
        (lambda: elbo(GOOD_MODEL, GOOD_GUIDE, draw(N, D), num_samples=0), "num_samples must be"),
        (lambda: elbo(GOOD_MODEL, GOOD_GUIDE, draw(N, D), batch_size=0), "batch_size must be"),
        (lambda: ELBO(kl="closed"), "kl must be one of 'auto', 'sampled'; got 'closed'"),
        (lambda: ELBO(beta=-1.0), "beta and free_bits must be >= 0; got -1.0 and 0.0"),
        (lambda: ELBO(gradient="dreg"), "gradient must be one of.*'score-loo'; got 'dreg'"),
        (lambda: IWAE(gradient="score"), "gradient must be one of.*'dreg'; got 'score'"),
        (lambda: ELBO(gradient="score-loo"), "'score-loo' needs a datum's other draws.*>= 2"),
        (
            lambda: ELBO(free_bits=0.1, gradient="stl"),
            "gradient='stl' needs a value per datum",
        ),
        (lambda: ELBO(free_bits=-1.0), "beta and free_bits must be >= 0; got 1.0 and -1.0"),
    ],
)
def test_bad_options_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_free_bits_need_a_kl_that_is_a_sum():
    ppca, guide, x = ppca_pair("full")
    match = r"free_bits needs a KL that is a sum.*site 'z'.*MultivariateNormal"
    with pytest.raises(ValueError, match=match):
        ELBO(free_bits=0.1).loss(ppca.model, guide, x)


def test_free_bits_do_not_go_with_auxiliary_sites(float64):
    model, guide, x = auto_normal()
    match = "the guide's auxiliary sites .* are not latent dimensions of the model"
    with pytest.raises(ValueError, match=match):
        ELBO(free_bits=0.1).loss(model, guide, x)


def test_a_table_without_its_index_is_refused():
    ppca, guide, x = ppca_pair()
    with pytest.raises(
        ValueError, match="x has 5 rows, this PerDatumGuide one q per datum for 12"
    ):
        log_weights(ppca.model, guide, x[:5])


def test_objectives_say_what_they_are():
    plain = "kl='auto', free_bits=0.0, gradient='reparameterized')"
    assert repr(ELBO(2, beta=0.5)) == f"ELBO(num_samples=2, beta=0.5, {plain}"
    assert repr(IWAE()) == "IWAE(num_samples=8, gradient='reparameterized')"
