"""Estimators of gradients: each against the slow formula draw by draw, and against the truth."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from scipy import stats

import oracles
from draws import draw
from gradients import parameters_of, ppca_pair, value_and_gradients
from loops import Recorder, slow_log_joints
from ppl_vae import VAE, CapturedSVI, ExactGuide
from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import train_mode
from ppl_vae.objectives.bounds import ELBO, IWAE
from user_pairs import PAIRS, auto_normal

S = 2
SLOW = {
    "stl": ELBO(S, beta=0.7, gradient="stl"),
    "score": ELBO(S, beta=0.7, kl="sampled", gradient="score"),
    "score-loo": ELBO(S, beta=0.7, kl="sampled", gradient="score-loo"),
    "dreg": IWAE(S, gradient="dreg"),
}
PLAIN = {
    "stl": ELBO(S, beta=0.7, kl="sampled"),
    "score": ELBO(S, beta=0.7, kl="sampled"),
    "score-loo": ELBO(S, beta=0.7, kl="sampled"),
    "dreg": IWAE(S),
}


def slow_surrogate(name, model, guide, x):
    """The estimator's formula on draws with their graph, densities one draw and datum at a time.

    Draws are detached afterwards, and what depends on the detached ones is run again.
    """
    torch.manual_seed(0)
    with Recorder() as recorder:
        PLAIN[name].differentiable_loss(model, guide, x)
    made = [value for values in recorder.values.values() for value in values]
    cut = {k: [v.detach().requires_grad_() for v in vs] for k, vs in recorder.values.items()}
    recorder.values = cut
    observed = [value for values in cut.values() for value in values]
    log_p, log_q = (slow_log_joints(program, x, recorder, S) for program in (model, guide))
    weights = log_p - log_q
    if name == "dreg":
        shares = torch.softmax(weights.detach(), 0)
        by_draws, direct = (shares**2 * weights).sum(), (shares * log_p).sum()
    else:
        # log p(x | z) + beta (log p(z) - log q): the prior and the guide are weighed by 0.7.
        prior = prior_of(model, x, recorder)
        terms = log_p - 0.3 * prior - 0.7 * log_q
        by_draws, direct = terms.sum() / S, (terms + 0.7 * log_q).sum() / S
        if name.startswith("score"):
            learned = terms.detach()
            if name == "score-loo":
                rest = [torch.cat([learned[:s], learned[s + 1 :]]).mean(0) for s in range(S)]
                learned = learned - torch.stack(rest)
            return (terms + learned * log_q).sum() / S
    slopes = torch.autograd.grad(by_draws, observed, retain_graph=True)
    return direct + sum((slope * value).sum() for slope, value in zip(slopes, made, strict=True))


def prior_of(model, x, recorder):
    """log p(z) at the recorded draws: the model without what it observes."""
    return slow_log_joints(pyro.poutine.block(model, hide_fn=observes), x, recorder, S)


def observes(msg):
    return msg["type"] == "sample" and msg["is_observed"] and msg["name"] in ("x", "obs")


@pytest.mark.parametrize("estimator", SLOW)
@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_those_of_the_slow_formula(name, estimator, float64):
    model, guide, x = PAIRS[name]()
    x = x[:3]
    with train_mode(model, guide, training=False):
        parameters = parameters_of(model, guide, x)
        source = slow_surrogate(estimator, model, guide, x)
        expected = torch.autograd.grad(-source, parameters, allow_unused=True)
        value, actual = value_and_gradients(SLOW[estimator], model, guide, x)
        plain, _ = value_and_gradients(PLAIN[estimator], model, guide, x)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    assert value.item() == pytest.approx(plain.item(), rel=1e-12)


# The truth: pairs of one dimension, every row with parameters of its own, so that a run over
# many equal rows gives as many independent gradients

X, NOISE = 1.3, 0.7
each_way = pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl": "sampled"},
        {"gradient": "stl"},
        {"gradient": "score"},
        {"gradient": "score", "kl": "sampled"},
        {"gradient": "score-loo"},
        {"gradient": "score-loo", "kl": "sampled"},
    ],
    ids=str,
)


def conjugate(n, loc=0.2, scale=0.8, prior=-0.4):
    """z ~ N(prior, 1), x ~ N(z, 0.7^2), q = N(loc, scale^2); a gradient for each of the three."""
    values = (loc, math.log(scale), prior)
    rows = tuple(torch.full((n,), v, dtype=torch.float64, requires_grad=True) for v in values)

    def model(x):
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(rows[2], 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x[:, 0])

    def guide(x):
        with pyro.plate("data", n):
            pyro.sample("z", dist.Normal(rows[0], rows[1].exp()))

    return model, guide, torch.full((n, 1), X, dtype=torch.float64), rows


def two_levels(n):
    """z2 ~ N(0, 1), z1 ~ N(a z2, 1), x ~ N(z1, 0.7^2); q(z1) q(z2 | z1), the latter by b z1."""
    values = (0.9, 0.5, -0.3, 0.4)
    rows = tuple(torch.full((n,), v, dtype=torch.float64, requires_grad=True) for v in values)

    def model(x):
        with pyro.plate("data", n):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros_like(rows[0]), 1.0))
            z1 = pyro.sample("z1", dist.Normal(rows[0] * z2, 1.0))
            pyro.sample("x", dist.Normal(z1, NOISE), obs=x[:, 0])

    def guide(x):
        with pyro.plate("data", n):
            z1 = pyro.sample("z1", dist.Normal(rows[1], rows[2].exp()))
            pyro.sample("z2", dist.Normal(rows[3] * z1, 0.8))

    return model, guide, torch.full((n, 1), X, dtype=torch.float64), rows


def counts(n):
    """z ~ Poisson(2), x ~ N(z, 1), q = Poisson(rate): no reparameterized gradient."""
    rows = (torch.full((n,), math.log(1.5), dtype=torch.float64, requires_grad=True),)

    def model(x):
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Poisson(torch.full_like(rows[0], 2.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x):
        with pyro.plate("data", n):
            pyro.sample("z", dist.Poisson(rows[0].exp()))

    return model, guide, torch.full((n, 1), X, dtype=torch.float64), rows


def gradients(objective, pair, seed=0):
    """The gradient of the objective of each row in its parameters: (parameters, rows)."""
    model, guide, x, rows = pair
    torch.manual_seed(seed)
    loss = objective.differentiable_loss(model, guide, x)
    return -torch.stack(torch.autograd.grad(loss, rows))


def z_scores(found, truth):
    """How many standard errors the mean of each gradient is off, (parameters,)."""
    error = (found.std(1) / found.shape[1] ** 0.5).numpy()
    return (found.mean(1).numpy() - truth) / np.maximum(error, 1e-12)


def exact_elbo_gradient(beta, loc=0.2, scale=0.8, prior=-0.4):
    """The gradient in q's mean, its log scale and the prior's mean."""
    variance = scale**2
    pull = (X - loc) / NOISE**2 - beta * (loc - prior)
    return np.array([pull, -variance / NOISE**2 + beta * (1 - variance), beta * (loc - prior)])


@pytest.mark.parametrize("beta", [1.0, 0.3])
@each_way
def test_every_gradient_of_the_elbo_has_the_exact_mean(options, beta):
    found = gradients(ELBO(2, beta=beta, **options), conjugate(20_000))
    z = z_scores(found, exact_elbo_gradient(beta))
    assert np.abs(z).max() < oracles.z_limit(3 * 7 * 2), z


def quadrature_of_two(loc, log_scale, prior):
    """E log((w_1 + w_2) / 2) by Gauss-Hermite quadrature over both draws."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    z = loc + math.exp(log_scale) * nodes
    log_w = stats.norm.logpdf(z, prior) + stats.norm.logpdf(X, z, NOISE)
    log_w = log_w - stats.norm.logpdf(z, loc, math.exp(log_scale))
    both = np.logaddexp(log_w[:, None], log_w[None, :]) - math.log(2)
    return weights @ both @ weights / weights.sum() ** 2


@pytest.mark.parametrize("gradient", ["reparameterized", "dreg"])
def test_every_gradient_of_the_importance_weighted_bound_has_the_exact_mean(gradient):
    at, truth = np.array([0.2, math.log(0.8), -0.4]), []
    for step in 1e-5 * np.eye(3):
        rise = quadrature_of_two(*(at + step)) - quadrature_of_two(*(at - step))
        truth.append(rise / 2e-5)
    z = z_scores(gradients(IWAE(2, gradient), conjugate(50_000)), np.array(truth))
    assert np.abs(z).max() < oracles.z_limit(3 * 2), z


@pytest.mark.parametrize("num_samples", [1, 4, 16])
@pytest.mark.parametrize("make", [conjugate, two_levels])
def test_dreg_and_plain_gradients_have_one_mean(make, num_samples):
    plain, dreg = (
        gradients(IWAE(num_samples, gradient), make(20_000), seed)
        for seed, gradient in enumerate(("reparameterized", "dreg"))
    )
    error = ((plain.var(1) + dreg.var(1)) / plain.shape[1]).sqrt()
    z = (plain.mean(1) - dreg.mean(1)) / error
    assert z.abs().max() < oracles.z_limit(3 * (3 + 4)), z


@each_way
def test_every_gradient_of_two_levels_has_one_mean(options):
    """E log p(x | z1) - KL as a polynomial in the parameters, differentiated by hand."""
    a, b, r, g = 0.9, 0.5, -0.3, 0.4
    v, s2 = math.exp(2 * r), NOISE**2
    # -E (z1 - a z2)^2 / 2 and -E z2^2 / 2, for z2 = g z1 + 0.8 e.
    first = b**2 + v  # E z1^2
    truth = np.array(
        [
            g * (1 - a * g) * first - a * 0.64,
            (X - b) / s2 - (1 - a * g) ** 2 * b - g**2 * b,
            -v / s2 - (1 - a * g) ** 2 * v - g**2 * v + 1,
            a * (1 - a * g) * first - g * first,
        ]
    )
    z = z_scores(gradients(ELBO(2, **options), two_levels(20_000)), truth)
    assert np.abs(z).max() < oracles.z_limit(4 * 7), z


@pytest.mark.parametrize("options", [{"kl": "auto"}, {"kl": "sampled"}], ids=str)
@pytest.mark.parametrize("gradient", ["score", "score-loo"])
def test_the_score_serves_sites_without_a_reparameterized_gradient(gradient, options):
    def bound(log_rate):
        z, rate = np.arange(80), math.exp(log_rate)
        q = stats.poisson.pmf(z, rate)
        terms = (
            stats.norm.logpdf(X, z) + stats.poisson.logpmf(z, 2) - stats.poisson.logpmf(z, rate)
        )
        return q @ terms

    at = math.log(1.5)
    truth = (bound(at + 1e-5) - bound(at - 1e-5)) / 2e-5
    found = gradients(ELBO(3, gradient=gradient, **options), counts(50_000))
    assert abs(z_scores(found, truth)[0]) < oracles.z_limit(4)


def test_parameters_that_both_programs_share():
    """With the exact guide what is left is E d log p(x, z) = d log p(x), Fisher's identity."""
    ppca, _, x = ppca_pair()
    parameters = list(ppca.parameters())
    exact = torch.autograd.grad(ppca.log_likelihood(x).sum(), parameters)
    for objective in (ELBO(200, gradient="stl"), IWAE(200, gradient="dreg")):
        along = []
        for seed in range(25):
            torch.manual_seed(seed)
            loss = objective.differentiable_loss(ppca.model, ExactGuide(ppca), x)
            slopes = torch.autograd.grad(-loss, parameters)
            along.append(sum((a * b).sum() for a, b in zip(slopes, exact, strict=True)).item())
        truth = sum(slope.square().sum() for slope in exact).item()
        z = (np.mean(along) - truth) / (np.std(along, ddof=1) / 25**0.5)
        # The mean of 25 means of 200 draws is normal; its error is estimated, hence Student's t.
        assert abs(z) < stats.t.isf(oracles.FAILURE_RATE / 2 / 2, 24)


def test_points_are_no_draws(float64):
    """exp(u) by way of a ``Delta`` is the log-normal: the same draws, densities and gradients."""
    model, _, x = PAIRS["positive_latent"]()
    loc, raw = draw(len(x), 2).requires_grad_(), draw(len(x), 2, seed=1).requires_grad_()

    def direct(x, **_):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(loc, raw.exp()).to_event(1))

    def by_a_point(x, **_):
        with pyro.plate("data", len(x)):
            q = dist.Normal(loc, raw.exp()).to_event(1)
            u = pyro.sample("u", q, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.exp(), log_density=-u.sum(-1), event_dim=1))

    for objective in SLOW.values():
        found = []
        for guide in (direct, by_a_point):
            torch.manual_seed(0)
            loss = objective.differentiable_loss(model, guide, x)
            found.append((loss, *torch.autograd.grad(loss, (loc, raw))))
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_a_point_with_parameters_keeps_its_gradient(float64):
    """All of q's parameters stand in the point: nothing is left for the score or the draws."""
    model, _, x = PAIRS["positive_latent"]()
    loc, raw = draw(len(x), 2).requires_grad_(), draw(len(x), 2, seed=1).requires_grad_()

    def guide(x, **_):
        with pyro.plate("data", len(x)):
            noise = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            u = pyro.sample("u", noise, infer={"is_auxiliary": True})
            log_z = loc + raw.exp() * u
            jacobian = -(log_z + raw).sum(-1)
            pyro.sample("z", dist.Delta(log_z.exp(), log_density=jacobian, event_dim=1))

    for name, objective in SLOW.items():
        found = []
        for one in (objective, PLAIN[name]):
            torch.manual_seed(0)
            loss = one.differentiable_loss(model, guide, x)
            found.append(torch.autograd.grad(loss, (loc, raw)))
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


# How large the noise is


def test_signal_to_noise_of_the_encoder_rises_for_dreg_and_falls_for_plain():
    """|mean| / sd of the gradient in q's mean: in the limit as sqrt(S) and as 1 / sqrt(S).

    q is wider than the posterior (0.57), so that its weights have all moments that are needed.
    """
    rows, ratios = 25_000, {}
    for gradient in ("reparameterized", "dreg"):
        found = [
            gradients(IWAE(number, gradient), conjugate(rows, 1.0, 0.65), seed=number)[0]
            for number in (1, 8, 64)
        ]
        ratios[gradient] = np.array([abs(float(g.mean() / g.std())) for g in found])
    # The error of a ratio r of this kind is sqrt((1 + r^2 / 2) / rows) for a normal gradient.
    for gradient, sign in (("reparameterized", -1), ("dreg", 1)):
        r = ratios[gradient]
        error = np.sqrt((2 + (r[1:] ** 2 + r[:-1] ** 2) / 2) / rows)
        assert (sign * np.diff(r) > oracles.z_limit(4) * error).all(), ratios


def test_a_baseline_and_a_draws_gradient_lower_the_variance():
    variances = [
        gradients(ELBO(4, **options), conjugate(20_000))[0].var().item()
        for options in ({"gradient": "score"}, {"gradient": "score-loo"}, {})
    ]
    assert variances[0] > 1.5 * variances[1] > 3 * variances[2]


# Bounds


def test_importance_weighted_bounds_rise_with_the_number_of_draws():
    rows, bounds, errors = 40_000, [], []
    model, guide, x, _ = conjugate(rows)
    for num_samples in (1, 4, 16, 64):
        torch.manual_seed(num_samples)
        with torch.no_grad():
            # Rows are equal, so that their mean is one bound, and their spread its error.
            log_w = IWAE(num_samples)._run(Pair(model, guide), Batch(x)).log_weights()
            values = torch.logsumexp(log_w, 0) - math.log(num_samples)
            torch.manual_seed(num_samples)
            mean, _ = IWAE(num_samples).mean_value(model, guide, x)
        assert float(mean) == pytest.approx(float(values.mean()), rel=1e-12)
        bounds.append(float(mean))
        errors.append(float(values.std()) / rows**0.5)
    log_p = stats.norm.logpdf(X, -0.4, math.sqrt(1 + NOISE**2))
    both = np.hypot(errors[1:], errors[:-1])
    assert (np.diff(bounds) > oracles.z_limit(4) * both).all(), bounds
    assert bounds[-1] < log_p + oracles.z_limit(4) * errors[-1]


@pytest.mark.parametrize("num_samples", [1, 2, 64])
def test_with_the_exact_guide_every_bound_is_log_p(num_samples):
    variance = 1 / (1 + 1 / NOISE**2)
    loc = variance * (-0.4 + X / NOISE**2)
    model, guide, x, _ = conjugate(3, loc, math.sqrt(variance))
    log_p = 3 * stats.norm.logpdf(X, -0.4, math.sqrt(1 + NOISE**2))
    for objective in (IWAE(num_samples), IWAE(num_samples, "dreg")):
        loss = objective.differentiable_loss(model, guide, x).item()
        assert -loss == pytest.approx(log_p, rel=1e-12)


def test_at_the_exact_posterior_the_landing_sticks(float64):
    """The encoder's gradient is zero for each draw, and with the score in it is not."""
    ppca, guide, x = ppca_pair("full")
    posterior = ppca.posterior(x)
    tril = posterior.scale_tril.detach().expand(len(x), 2, 2)
    with torch.no_grad():
        guide.loc.copy_(posterior.mean)
        log_diagonal = 2 * tril.diagonal(dim1=-2, dim2=-1).log()
        # raw holds log-variances, then the lower triangle in units of rows.
        guide.unconstrained_scale[:, :2] = log_diagonal
        guide.unconstrained_scale[:, 2] = tril[:, 1, 0] / tril[:, 1, 1]
    table = list(guide.parameters())
    sizes = {}
    for name, objective in {
        "stl": ELBO(3, gradient="stl"),
        "dreg": IWAE(3, gradient="dreg"),
        "plain": ELBO(3, kl="sampled"),
    }.items():
        loss = objective.differentiable_loss(ppca.model, guide, x)
        slopes = torch.autograd.grad(loss, table)
        sizes[name] = max(float(slope.abs().max()) for slope in slopes)
    assert sizes["stl"] < 1e-9 > sizes["dreg"]
    assert sizes["plain"] > 0.1


# In Pyro's SVI, and captured there


@pytest.mark.parametrize("objective", SLOW.values(), ids=SLOW)
def test_a_step_of_stock_svi_follows_the_gradient(objective, float64):
    vae, x = VAE.mlp(6, 2, hidden=(5,), seed=0).double(), draw(8, 6)
    parameters = list(vae.parameters())
    before = [p.detach().clone() for p in parameters]
    torch.manual_seed(0)
    loss = objective.differentiable_loss(vae.model, vae.guide, x)
    slopes = torch.autograd.grad(loss, parameters)
    torch.manual_seed(0)
    svi = SVI(vae.model, vae.guide, pyro.optim.SGD({"lr": 1e-3}), objective)
    assert svi.step(x) == pytest.approx(loss.item(), rel=1e-12)
    for p, old, slope in zip(parameters, before, slopes, strict=True):
        torch.testing.assert_close(p.detach(), old - 1e-3 * slope, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_captured_steps_of_svi_are_its_own(float64):
    losses = []
    for kind, options in ((SVI, {}), (CapturedSVI, {"compiled": False})):
        pyro.clear_param_store()
        vae, x = VAE.mlp(6, 2, hidden=(5,), seed=0).double(), draw(8, 6)
        svi = kind(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), SLOW["dreg"], **options)
        torch.manual_seed(0)
        losses.append([svi.step(x) for _ in range(4)])
    assert svi.execution == "recorded"
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def test_a_guide_of_pyros_own_trains_by_every_estimator(float64):
    """``AutoNormal``: draws of an auxiliary site, and a point made of them."""
    for objective in SLOW.values():
        pyro.clear_param_store()
        model, guide, x = auto_normal()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), objective)
        torch.manual_seed(0)
        losses = [svi.step(x) for _ in range(40)]
        assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 10
