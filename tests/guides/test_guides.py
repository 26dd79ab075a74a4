"""Gaussian guides: families, exact guides and their projections, per datum, and amortized."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import oracles
from draws import draw
from ppl_vae.core.state import seeded
from ppl_vae.guides.families import (
    COVARIANCES,
    LOWER_KNEE,
    MARGIN_ABOVE,
    MARGIN_BELOW,
    UPPER_KNEE,
    gaussian,
    kl_projection,
    num_scale_outputs,
    soft_clamp,
)
from ppl_vae.guides.guides import AmortizedGuide, ExactGuide, PerDatumGuide
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.networks.mlp_conv import mlp
from ppl_vae.objectives.bounds import log_weights
from ppl_vae.objectives.divergences import closed_kl

D, K, N = 6, 3, 40


@pytest.fixture
def x():
    return torch.from_numpy(oracles.simulate_ppca([9.0, 4.0, 2.5], 0.5, N, D, seed=0))


@pytest.fixture
def rotated(x):
    """The ML solution with loadings rotated away from the principal axes."""
    loadings, loc, noise = oracles.closed_form_ppca(x.numpy(), K)
    loadings = loadings @ oracles.rotation(K, seed=1)
    return PPCA.from_parameters(
        torch.from_numpy(loadings), torch.from_numpy(loc), float(np.sqrt(noise))
    )


# Families


@pytest.mark.parametrize(
    ("covariance", "number"), [("unit", 0), ("isotropic", 1), ("diagonal", 4), ("full", 10)]
)
def test_number_of_covariance_parameters(covariance, number):
    assert num_scale_outputs(covariance, 4) == number


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_clamp_is_the_identity_inside_and_bounded_outside(dtype):
    inside = torch.linspace(LOWER_KNEE, UPPER_KNEE, 9001, dtype=dtype)
    assert torch.equal(soft_clamp(inside), inside)
    wide = torch.cat([-torch.logspace(6, 0, 400), torch.logspace(0, 6, 400)]).to(dtype)
    wide.requires_grad_()
    bounded = soft_clamp(wide)
    assert (bounded.diff() >= 0).all() and torch.equal(bounded, soft_clamp(wide))
    assert (
        bounded.min() >= LOWER_KNEE - MARGIN_BELOW and bounded.max() <= UPPER_KNEE + MARGIN_ABOVE
    )
    (slope,) = torch.autograd.grad(bounded.sum(), wide)
    assert (slope > 0).all() and (slope <= 1).all()
    # The formulas inside and outside meet with slope one.
    ends = torch.tensor([LOWER_KNEE, UPPER_KNEE], dtype=dtype)
    beyond = ends + torch.tensor([-1e-3, 1e-3], dtype=dtype)
    torch.testing.assert_close(soft_clamp(beyond), beyond, rtol=0, atol=1e-5)
    extreme = torch.tensor([-torch.inf, torch.inf], dtype=dtype)
    assert soft_clamp(extreme).tolist() == [LOWER_KNEE - MARGIN_BELOW, UPPER_KNEE + MARGIN_ABOVE]
    assert soft_clamp(torch.tensor(torch.nan, dtype=dtype)).isnan()


@pytest.mark.parametrize("covariance", ["isotropic", "diagonal", "full"])
@pytest.mark.parametrize("value", [-1e6, -60.0, 30.0, 1e6])
def test_densities_and_divergences_are_finite_in_single_precision_at_the_bounds(covariance, value):
    width = num_scale_outputs(covariance, K)
    raw = torch.full((4, width), value)
    raw[:, K:] = 0.5
    raw.requires_grad_()
    q = gaussian(torch.zeros(4, K), raw, covariance)
    prior = dist.Normal(torch.zeros(K), 1.0).to_event(1)
    z = q.rsample()
    site = {"fn": q, "mask": None}
    kl = closed_kl(site, {"fn": prior, "mask": None})
    for total in (kl.sum(), (q.log_prob(z) - prior.log_prob(z)).sum()):
        assert total.isfinite()
        (slope,) = torch.autograd.grad(total, raw, retain_graph=True)
        assert slope.isfinite().all() and slope.square().isfinite().all()


@pytest.mark.parametrize("missing", ["zeros", "zeros+mask"])
@pytest.mark.parametrize("covariance", ["isotropic", "diagonal", "full"])
def test_weights_trained_with_plain_pytorch_give_the_same_q(covariance, missing):
    """Two heads for means and log-variances in plain PyTorch equal one layer of stacked
    weights."""
    width, inputs = num_scale_outputs(covariance, K), D * (1 + missing.endswith("mask"))
    with seeded(0):
        body, loc, scale = (nn.Linear(*s).double() for s in ((inputs, 7), (7, K), (7, width)))
        encoder = mlp(inputs, K + width, (7,)).double()
    with torch.no_grad():
        scale.bias[: min(K, width)] += torch.linspace(-20, 20, min(K, width))
        for part, layers in ((encoder[0], [body]), (encoder[2], [loc, scale])):
            part.weight.copy_(torch.cat([layer.weight for layer in layers]))
            part.bias.copy_(torch.cat([layer.bias for layer in layers]))
    x = draw(N, D, seed=2)
    inputs_of_x = x if missing == "zeros" else torch.cat([x, torch.ones_like(x)], 1)
    hidden = torch.relu(body(inputs_of_x))
    mean, raw = loc(hidden), scale(hidden)
    q = AmortizedGuide(encoder, K, covariance=covariance, missing=missing).distribution(x)
    torch.testing.assert_close(q.mean, mean, rtol=1e-9, atol=1e-9)
    variances = q.scale_tril.diagonal(dim1=1, dim2=2).square() if width > K else q.variance
    expected = raw[:, :K].exp().expand(N, K)
    torch.testing.assert_close(variances, expected, rtol=1e-9, atol=0)
    if width == K:
        z = draw(N, K, seed=3)
        log_q = dist.Normal(mean, (0.5 * raw).exp()).log_prob(z).sum(-1)
        torch.testing.assert_close(q.log_prob(z), log_q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", [(), (5,), (2, 5)])
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_every_family_is_a_gaussian_with_the_given_mean(covariance, batch):
    width = num_scale_outputs(covariance, K)
    loc, raw = draw(*batch, K, seed=0), draw(*batch, width, seed=1)
    q = gaussian(loc, raw, covariance)
    assert (q.batch_shape, q.event_shape) == (batch, (K,))
    torch.testing.assert_close(q.mean, loc)
    assert q.has_rsample


def test_covariances_of_given_parameters():
    raw = torch.tensor([0.2, -0.4, 0.6, 1.0, -2.0, 0.5], dtype=torch.float64)
    loc = torch.zeros(K, dtype=torch.float64)
    torch.testing.assert_close(gaussian(loc, raw[:0], "unit").variance, torch.ones_like(loc))
    torch.testing.assert_close(
        gaussian(loc, raw[:1], "isotropic").variance, raw[0].exp().expand(3)
    )
    torch.testing.assert_close(gaussian(loc, raw[:3], "diagonal").variance, raw[:3].exp())
    unit_lower = torch.tensor([[1, 0, 0], [1.0, 1, 0], [-2.0, 0.5, 1]], dtype=torch.float64)
    expected = torch.diag((raw[:3] / 2).exp()) @ unit_lower
    torch.testing.assert_close(gaussian(loc, raw, "full").scale_tril, expected)


def test_every_full_covariance_can_be_represented():
    target = draw(K, K, seed=2)
    target = torch.linalg.cholesky(target @ target.T + torch.eye(K))
    diagonal = target.diagonal()
    rows, columns = np.tril_indices(K, -1)
    below = (target / diagonal[:, None])[rows, columns]
    raw = torch.cat([2 * diagonal.log(), below])
    torch.testing.assert_close(gaussian(torch.zeros(K).double(), raw, "full").scale_tril, target)


# The exact guide


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_the_gap_of_a_projected_posterior_equals_theory(rotated, x, covariance):
    q, posterior = ExactGuide(rotated, covariance=covariance).distribution(x), rotated.posterior(x)
    torch.testing.assert_close(q.mean, posterior.mean, rtol=1e-10, atol=1e-12)
    exact = _covariances(posterior).detach().numpy()
    kl = [
        oracles.gaussian_kl(np.zeros(K), S, np.zeros(K), P)
        for S, P in zip(_covariances(q).detach().numpy(), exact, strict=True)
    ]
    stated = oracles.best_q_gap(rotated.loadings.detach().numpy(), 0.5, covariance)
    np.testing.assert_allclose(kl, stated, rtol=1e-9, atol=1e-12)


def test_the_exact_guide_gives_log_p_from_every_draw(rotated, x):
    weights = log_weights(rotated.model, ExactGuide(rotated), x, 5, seed=0)
    torch.testing.assert_close(weights, rotated.log_likelihood(x).expand(5, N), rtol=0, atol=1e-9)


def _covariances(q):
    if isinstance(q, dist.MultivariateNormal):
        return q.covariance_matrix
    return torch.diag_embed(q.variance)


@pytest.mark.parametrize("covariance", ["unit", "isotropic", "diagonal"])
def test_the_variances_of_the_kl_projection(rotated, x, covariance):
    variance = ExactGuide(rotated, covariance=covariance).distribution(x).variance
    stated = oracles.best_q_variances(rotated.loadings.detach().numpy(), 0.5, covariance)
    np.testing.assert_allclose(variance.detach().numpy(), np.tile(stated, (N, 1)), rtol=1e-10)


def test_the_optimal_diagonal_variances_are_not_the_marginal_variances(rotated, x):
    marginal = rotated.posterior(x).variance
    best = ExactGuide(rotated, covariance="diagonal").distribution(x).variance
    assert (best < marginal - 1e-3).all()


def test_the_gap_of_two_rotated_axes_equals_theory():
    l_i, l_j, noise, angle = 5.0, 2.0, 0.5, 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    loadings = np.vstack([np.diag(np.sqrt([l_i - noise, l_j - noise])) @ turn, np.zeros((2, 2))])
    ppca = PPCA.from_parameters(torch.from_numpy(loadings), torch.zeros(4), noise**0.5)
    x = draw(1, 4, seed=3)
    precision = ppca.posterior(x).precision_matrix[0].detach()
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    q = kl_projection(ppca.posterior(x), "diagonal")
    kl = torch.distributions.kl_divergence(
        dist.MultivariateNormal(q.mean, torch.diag_embed(q.variance)), ppca.posterior(x)
    )
    stated = oracles.rotated_pair_gap(l_i, l_j, angle)
    assert gap.item() == pytest.approx(stated, rel=1e-10)
    assert kl.item() == pytest.approx(stated, rel=1e-10)


def test_on_the_principal_axes_the_diagonal_guide_is_exact(rotated, x):
    ppca = rotated.canonical()
    guide = ExactGuide(ppca, covariance="diagonal")
    weights = log_weights(ppca.model, guide, x, 3, seed=0)
    torch.testing.assert_close(weights, ppca.log_likelihood(x).expand(3, N), rtol=0, atol=1e-9)


def test_an_exact_guide_needs_a_posterior():
    with pytest.raises(TypeError, match="model must have a method 'posterior'; VAE has none"):
        ExactGuide(VAE.mlp(4, 2, seed=0))


class Pendulum:
    """An object with a posterior that is not a module."""

    def posterior(self, x):
        return dist.MultivariateNormal(x[:, :2], torch.eye(2))


def test_an_exact_guide_of_an_object_that_is_no_module():
    q = ExactGuide(Pendulum(), covariance="diagonal").distribution(torch.ones(3, 4))
    assert q.mean.tolist() == [[1.0, 1.0]] * 3
    assert q.variance.tolist() == [[1.0, 1.0]] * 3


def test_an_exact_guide_is_exact_with_missing_values(rotated, x):
    x[0, 0] = x[1, 2] = x[1, 3] = torch.nan
    weights = log_weights(rotated.model, ExactGuide(rotated), x, 5, seed=0)
    expected = rotated.log_likelihood(x).expand(5, -1)
    torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-10)


def test_an_exact_guide_raises_if_its_model_takes_no_mask(rotated, x):
    class Complete(PPCA):
        def posterior(self, x):
            return super().posterior(x)

    x[0, 0] = torch.nan
    model = Complete.from_parameters(rotated.loadings, rotated.loc, rotated.noise_scale)
    with pytest.raises(ValueError, match="posterior of Complete takes no keyword 'mask'"):
        log_weights(model.model, ExactGuide(model), x)


@pytest.mark.parametrize(
    "make",
    [
        lambda covariance: ExactGuide(PPCA(4, 2, seed=0), covariance=covariance),
        lambda covariance: PerDatumGuide(4, 2, covariance=covariance),
        lambda covariance: AmortizedGuide(nn.Linear(4, 4), 2, covariance=covariance),
        lambda covariance: VAE.mlp(4, 2, covariance=covariance),
    ],
)
def test_an_unknown_family_raises(make):
    known = "'unit', 'isotropic', 'diagonal', 'full'(, 'delta')?"
    match = f"covariance must be one of {known}; got 'low-rank'"
    with pytest.raises(ValueError, match=match):
        make("low-rank")


# One q per datum


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_rows_are_looked_up_by_index(covariance):
    guide = PerDatumGuide(5, 2, covariance=covariance).double()
    with torch.no_grad():
        for p in guide.parameters():
            p.copy_(draw(*p.shape, seed=4))
    x, index = torch.zeros(5, 3), torch.tensor([4, 0, 4])
    whole, part = guide.distribution(x), guide.distribution(x[index], index)
    torch.testing.assert_close(part.mean, guide.loc[index])
    torch.testing.assert_close(_covariances(part), _covariances(whole)[index])


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_per_datum_guides_start_at_the_prior(covariance):
    q = PerDatumGuide(5, 2, covariance=covariance).distribution(torch.zeros(5, 3))
    assert not q.mean.any()
    torch.testing.assert_close(_covariances(q), torch.eye(2).expand(5, 2, 2))


def test_a_minibatch_updates_its_own_rows_only():
    ppca, guide = PPCA(4, 2, seed=0), PerDatumGuide(6, 2)
    x = draw(6, 4, seed=5).float()
    svi = SVI(ppca.model, guide, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO())
    index = torch.tensor([5, 1])
    svi.step(x[index], index=index, num_data=6)
    moved = (guide.loc.abs().sum(1) > 0) & (guide.unconstrained_scale.abs().sum(1) > 0)
    assert moved.nonzero().flatten().tolist() == [1, 5]


def test_tables_are_the_parameters_with_one_row_per_datum():
    guide = PerDatumGuide(6, 2)
    assert {id(p) for p in guide.tables()} == {id(guide.loc), id(guide.unconstrained_scale)}
    assert [id(p) for p in PerDatumGuide(6, 2, covariance="unit").tables()] != []


def test_a_missing_index_raises():
    guide, x = PerDatumGuide(5, 2), torch.zeros(3, 4)
    with pytest.raises(ValueError, match="x has 3 rows, this PerDatumGuide one q per datum for 5"):
        guide(x)


@pytest.mark.parametrize("bad", [-1, 5])
def test_an_index_out_of_range_raises(bad):
    guide, x = PerDatumGuide(5, 2), torch.zeros(2, 4)
    match = rf"index must lie in 0\.\.4; it ranges from {min(bad, 0)} to"
    with pytest.raises(IndexError, match=match):
        guide(x, index=torch.tensor([0, bad]), num_data=5)


def test_another_num_data_raises():
    match = "num_data is 9, and this PerDatumGuide has one q per datum for 5"
    with pytest.raises(ValueError, match=match):
        PerDatumGuide(5, 2)(torch.zeros(2, 4), index=torch.arange(2), num_data=9)


@pytest.mark.parametrize(("arguments", "name"), [((0, 2), "num_data"), ((5, 0), "latent_dim")])
def test_invalid_sizes_of_a_per_datum_guide_raise(arguments, name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number >= 1; got 0"):
        PerDatumGuide(*arguments)


# Amortized


@pytest.mark.parametrize("homoscedastic", [False, True])
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_an_encoder_returns_means_and_covariance_parameters(covariance, homoscedastic):
    width = num_scale_outputs(covariance, K)
    encoder = mlp(D, K + (0 if homoscedastic else width), seed=0).double()
    guide = AmortizedGuide(encoder, K, covariance=covariance, homoscedastic=homoscedastic).double()
    x = draw(5, D, seed=6)
    q, out = guide.distribution(x), encoder(x)
    torch.testing.assert_close(q.mean, out[:, :K])
    raw = torch.zeros(5, width).double() if homoscedastic else out[:, K:]
    torch.testing.assert_close(
        _covariances(q), _covariances(gaussian(out[:, :K], raw, covariance))
    )
    shared = [guide.unconstrained_scale] if homoscedastic and width else []
    assert len(list(guide.parameters())) == len(list(encoder.parameters())) + len(shared)


def test_an_encoder_may_return_a_location_and_a_scale():
    loc, scale = draw(5, K, seed=7), draw(5, K, seed=8).exp()
    tril = torch.linalg.cholesky(torch.eye(K).double() * 2).expand(5, K, K)
    q = AmortizedGuide(lambda x: (loc, scale), K).distribution(torch.zeros(5, D).double())
    torch.testing.assert_close((q.mean, q.stddev), (loc, scale))
    q = AmortizedGuide(lambda x: [loc, tril], K, covariance="full").distribution(torch.zeros(5, D))
    torch.testing.assert_close((q.mean, q.scale_tril), (loc, tril))


def test_an_encoder_may_be_a_plain_function_and_x_numpy():
    guide = AmortizedGuide(lambda x: torch.cat([x, x], -1), 2)
    assert guide(np.array([[1.0, 2.0]], dtype="f4")).shape == (1, 2)


@pytest.mark.parametrize(
    ("encoder", "match"),
    [
        (nn.Linear(D, 2 * K + 1), r"the encoder must return \(rows, 6\) for latent_dim=3"),
        (nn.Linear(D, K), r"returned \(5, 3\)"),
        (lambda x: x.sum(), r"returned \(\)"),
        (lambda x: (x[:, :2], x[:, :2].exp()), r"the encoder must return \(rows, 3\)"),
    ],
)
def test_an_encoder_of_another_width_raises(encoder, match):
    with pytest.raises(ValueError, match=match):
        AmortizedGuide(encoder, K)(torch.zeros(5, D))


def test_the_linear_encoder_of_ppca_is_exact(rotated, x):
    """V = M^-1 W', b = -V mu, and on the principal axes variances s2 / M_kk."""
    ppca = rotated.canonical()
    W, loc = ppca.loadings.detach(), ppca.loc.detach()
    M = W.T @ W + 0.5 * torch.eye(K)
    encoder = nn.Linear(D, K).double()
    guide = AmortizedGuide(encoder, K, homoscedastic=True).double()
    with torch.no_grad():
        encoder.weight.copy_(torch.linalg.solve(M, W.T))
        encoder.bias.copy_(-encoder.weight @ loc)
        guide.unconstrained_scale.copy_((0.5 / M.diagonal()).log())
    weights = log_weights(ppca.model, guide, x, 4, seed=0)
    torch.testing.assert_close(weights, ppca.log_likelihood(x).expand(4, N), rtol=0, atol=1e-9)


# Missing values in the inputs of an encoder


@pytest.mark.parametrize("missing", ["zeros", "zeros+mask"])
def test_an_encoder_gets_zeros_and_optionally_the_mask(missing, x):
    received = []

    def encoder(rows):
        received.append(rows)
        return torch.zeros(len(rows), 2 * K).double()

    guide = AmortizedGuide(encoder, K, missing=missing)
    mask = draw(N, D, seed=3) > 0
    for junk in (torch.nan, 1e6):
        guide.distribution(torch.where(mask, x, junk), mask=mask)
    guide.distribution(x)
    zeros, columns = torch.where(mask, x, 0.0), torch.cat([mask, torch.ones_like(mask)])
    expected = torch.cat([zeros, x])
    if missing == "zeros+mask":
        expected = torch.cat([expected, columns.double()], 1)
    assert torch.equal(received[0], received[1])
    assert torch.equal(torch.cat(received[1:]), expected)


def test_nan_without_a_mask_raises(x):
    guide = AmortizedGuide(mlp(D, 2 * K, seed=0), K).double()
    x[0, :2] = torch.nan
    for call in (guide, guide.distribution):
        with pytest.raises(
            ValueError, match=r"x has 2 NaN entries that are not masked.*mask=~x.isnan()"
        ):
            call(x)
        call(x, mask=~x.isnan())
        with pytest.raises(ValueError, match="x has 2 NaN entries"):
            call(x, mask=torch.ones(N, D).bool())


def test_an_unknown_encoding_of_missing_values_raises():
    with pytest.raises(
        ValueError, match=r"missing must be one of 'zeros', 'zeros.mask'; got 'mea"
    ):
        AmortizedGuide(mlp(D, 2 * K), K, missing="mean")
    guide = AmortizedGuide(mlp(D, 2 * K), K, missing="zeros+mask")
    with pytest.raises(
        RuntimeError, match=r"The encoder got \(2, 12\), with missing='zeros.mask'"
    ):
        guide.distribution(torch.zeros(2, D))


# Guides as Pyro programs


@pytest.mark.parametrize(
    "make",
    [
        lambda: ExactGuide(PPCA(4, 2, seed=0)),
        lambda: PerDatumGuide(9, 2),
        lambda: AmortizedGuide(nn.Linear(4, 4), 2),
    ],
    ids=["exact", "mean field", "amortized"],
)
def test_a_guide_is_a_program_with_one_site_in_the_plate(make):
    guide, x, index = make(), torch.zeros(3, 4), torch.tensor([8, 0, 3])
    trace = poutine.trace(guide).get_trace(x, index=index, num_data=9, observe=False, mask=None)
    site = trace.nodes["z"]
    (frame,) = site["cond_indep_stack"]
    assert (frame.name, frame.dim, frame.size, frame.full_size) == ("data", -1, 3, 9)
    assert site["scale"] == 3
    assert site["fn"].event_shape == (2,)
    assert trace.nodes["_RETURN"]["value"] is site["value"]
