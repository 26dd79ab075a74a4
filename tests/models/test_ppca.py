"""PPCA: the program, and every exact quantity against dense oracles."""

import math

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats

import oracles
from ppl_vae.core.validation import as_vector
from ppl_vae.models.linear.principal_axes import tril_of_inverse
from ppl_vae.models.linear.sufficient_statistics import SampleCovariance
from ppl_vae.models.ppca import PPCA

N, D, K = 30, 7, 3


def make(noise=0.6, seed=0, dtype=torch.float64, D=D, K=K):
    """A model in general position and its parameters as arrays (noise is the variance)."""
    rng = np.random.default_rng(seed)
    loadings, loc = rng.normal(size=(D, K)), 3 * rng.normal(size=D)
    scale = torch.tensor(noise, dtype=dtype).sqrt()
    ppca = PPCA.from_parameters(torch.tensor(loadings, dtype=dtype), torch.tensor(loc), scale)
    return ppca, (loc, loadings, noise)


def draw(*shape, seed=0):
    return np.random.default_rng(100 + seed).normal(size=shape) * 2


def assert_close(actual, expected, rtol=1e-10, atol=1e-10):
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=rtol, atol=atol)


# Exact quantities


def test_the_log_likelihood_agrees_with_the_dense_covariance():
    ppca, parameters = make()
    x = draw(N, D)
    assert ppca.log_likelihood(x).shape == (N,)
    assert_close(ppca.log_likelihood(x), oracles.log_density(x, *parameters))


def test_the_marginal_is_the_dense_gaussian():
    ppca, (loc, loadings, noise) = make()
    marginal, x = ppca.marginal(), draw(N, D)
    assert (marginal.batch_shape, marginal.event_shape) == ((), (D,))
    assert_close(marginal.mean, loc)
    assert_close(marginal.covariance_matrix, oracles.ppca_covariance(loadings, noise))
    assert_close(
        marginal.log_prob(torch.from_numpy(x)), oracles.log_density(x, loc, loadings, noise)
    )


def test_the_posterior_agrees_with_the_dense_precision():
    ppca, parameters = make()
    x = draw(N, D)
    posterior = ppca.posterior(x)
    means, covariances = oracles.posterior(x, *parameters)
    assert (posterior.batch_shape, posterior.event_shape) == ((N,), (K,))
    assert_close(posterior.mean, means)
    assert_close(posterior.covariance_matrix, covariances)
    assert_close(posterior.precision_matrix, np.linalg.inv(covariances), rtol=1e-9)


def test_bayes_rule_holds_at_any_z():
    ppca, _ = make()
    x, z = torch.from_numpy(draw(N, D)), torch.from_numpy(draw(N, K, seed=1))
    log_joint = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Normal(
        z @ ppca.loadings.T + ppca.loc, ppca.noise_scale
    ).log_prob(x).sum(-1)
    torch.testing.assert_close(
        log_joint - ppca.posterior(x).log_prob(z), ppca.log_likelihood(x), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("noise", [1e-2, 1e-6, 1e-10])
def test_tiny_noise_costs_no_accuracy(noise):
    """Eigenvalues up to 1, l / s2 up to 1e10; x is drawn from the model: log p is of order D."""
    rng = np.random.default_rng(3)
    axes = np.linalg.qr(rng.normal(size=(D, K)))[0]
    eigenvalues, loc = np.array([1.0, 0.5, 0.1]), rng.normal(size=D)
    loadings = axes * np.sqrt(eigenvalues - noise) @ oracles.rotation(K, seed=0)
    ppca = PPCA.from_parameters(
        torch.from_numpy(loadings), torch.from_numpy(loc), float(np.sqrt(noise))
    )
    z, e = rng.normal(size=(N, K)), rng.normal(size=(N, D))
    x = z @ loadings.T + loc + np.sqrt(noise) * e
    # x itself has an error of eps |x|, which contributes (eps |x| / sigma) |e| to the exponent.
    tolerance = 100 * D * np.finfo(float).eps / np.sqrt(noise) + 1e-10
    stated = oracles.spectral_log_density(x, loc, axes, eigenvalues, noise)
    assert_close(ppca.log_likelihood(x), stated, rtol=0, atol=tolerance)
    means, covariances = oracles.posterior(x, loc, loadings, noise)
    assert_close(ppca.posterior(x).mean, means, rtol=0, atol=1e-9)
    assert_close(ppca.posterior(x).covariance_matrix / noise, covariances / noise, rtol=1e-7)


def test_single_precision_results_are_accurate_to_single_precision():
    ppca, parameters = make(dtype=torch.float32, noise=0.5)
    x = draw(N, D)
    log_p = ppca.log_likelihood(x)
    assert log_p.dtype == torch.float32
    assert_close(log_p, oracles.log_density(x, *parameters), rtol=1e-4)


def test_no_matrix_of_the_data_dimension_squared_is_allocated():
    """At D = 200,000 one would take 160 GB."""
    D = 200_000
    ppca, x = PPCA(D, 2, seed=0), torch.zeros(3, D)
    assert ppca.log_likelihood(x).isfinite().all()
    assert ppca.posterior(x).mean.shape == (3, 2)
    assert ppca.sample(2, seed=0).shape == (2, D)
    assert ppca.reconstruct(x, shrink=False).shape == (3, D)
    assert ppca.canonical().loadings.shape == (D, 2)
    assert ppca.marginal().log_prob(x).shape == (3,)


def test_gradients_agree_with_the_dense_density():
    ppca, _ = make()
    x = torch.from_numpy(draw(N, D))
    parameters = [ppca.loadings, ppca.loc, ppca.noise_scale_unconstrained]
    eye = torch.eye(D, dtype=torch.float64)
    covariance = ppca.loadings @ ppca.loadings.T + ppca.noise_scale**2 * eye
    dense = dist.MultivariateNormal(ppca.loc, covariance).log_prob(x)
    expected = torch.autograd.grad(dense.sum(), parameters)
    actual = torch.autograd.grad(ppca.log_likelihood(x).sum(), parameters)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_the_closed_form_solution_has_its_stated_likelihood():
    x = oracles.simulate_ppca([9.0, 4.0, 2.0], 0.5, N, D, seed=0)
    loadings, loc, noise = oracles.closed_form_ppca(x, K)
    ppca = PPCA.from_parameters(
        torch.from_numpy(loadings), torch.from_numpy(loc), float(np.sqrt(noise))
    )
    stated = oracles.closed_form_log_likelihood(oracles.sample_spectrum(x)[0], K)
    assert ppca.log_likelihood(x).mean().item() == pytest.approx(stated, rel=1e-12)
    assert_close(
        ppca.canonical().posterior(x).mean.var(0, correction=0),
        oracles.posterior_mean_variance([9.0, 4.0, 2.0], 0.5),
        rtol=1e-9,
    )
    assert_close(ppca.posterior(x).mean.mean(0), 0)


# Reconstruction, canonical form, samples


def test_reconstruction_shrinks_towards_the_mean():
    ppca, (loc, loadings, noise) = make()
    x = draw(N, D)
    means, _ = oracles.posterior(x, loc, loadings, noise)
    assert_close(ppca.reconstruct(x), means @ loadings.T + loc)


def test_reconstruction_without_shrinkage_is_the_projection_of_pca():
    ppca, (loc, loadings, _) = make()
    x = draw(N, D)
    projected = ppca.reconstruct(x, shrink=False)
    hat = loadings @ np.linalg.pinv(loadings)
    assert_close(projected, (x - loc) @ hat.T + loc)
    assert_close(ppca.reconstruct(projected.detach(), shrink=False), projected.detach().numpy())


def test_both_reconstructions_agree_without_noise():
    ppca, _ = make(noise=1e-12)
    x = draw(N, D)
    assert_close(
        ppca.reconstruct(x), ppca.reconstruct(x, shrink=False).detach().numpy(), rtol=1e-8
    )


def test_the_canonical_loadings_lie_on_the_principal_axes():
    ppca, (_, loadings, _) = make()
    canonical = ppca.canonical()
    gram = (canonical.loadings.T @ canonical.loadings).detach()
    assert_close(gram - torch.diag(gram.diagonal()), 0, atol=1e-10)
    assert (gram.diagonal().diff() < 0).all()
    largest = canonical.loadings.abs().argmax(0)
    assert (canonical.loadings[largest, range(K)] > 0).all()
    assert_close(
        canonical.loadings @ canonical.loadings.T, loadings @ loadings.T, rtol=1e-10, atol=1e-10
    )
    assert torch.equal(canonical.loc, ppca.loc)
    assert torch.equal(canonical.noise_scale, ppca.noise_scale)


def test_the_canonical_form_is_a_copy_and_does_not_depend_on_the_rotation():
    ppca, (loc, loadings, _) = make()
    before = ppca.loadings.detach().clone()
    turned = PPCA.from_parameters(
        torch.from_numpy(loadings @ oracles.rotation(K, seed=2)),
        torch.from_numpy(loc),
        ppca.noise_scale.detach(),
    )
    torch.testing.assert_close(
        ppca.canonical().loadings, turned.canonical().loadings, rtol=1e-9, atol=1e-9
    )
    assert torch.equal(ppca.loadings, before)
    assert ppca.canonical()._pyro_name != ppca._pyro_name


def test_samples_follow_the_marginal():
    """Mahalanobis distances of S draws add up to a chi^2 of S D degrees of freedom."""
    ppca, (loc, loadings, noise) = make()
    x = ppca.sample(2_000, seed=0).numpy()
    inverse = np.linalg.inv(oracles.ppca_covariance(loadings, noise))
    total = np.einsum("nd,de,ne->", x - loc, inverse, x - loc)
    tails = stats.chi2(x.size).cdf(total), stats.chi2(x.size).sf(total)
    assert min(tails) > oracles.FAILURE_RATE / 4
    # and their mean is exact to its own covariance.
    mean = (x - loc).mean(0)
    assert stats.chi2(D).sf(len(x) * mean @ inverse @ mean) > oracles.FAILURE_RATE / 2


@pytest.mark.parametrize("bad", [0, -1])
def test_a_sample_has_at_least_one_row(bad):
    with pytest.raises(ValueError, match=f"num_samples must be a whole number >= 1; got {bad}"):
        make()[0].sample(bad)


# Metamorphic relations


def test_a_rotation_of_the_latent_space_changes_no_marginal():
    ppca, (loc, loadings, _) = make()
    turn = oracles.rotation(K, seed=1)
    turned = PPCA.from_parameters(
        torch.from_numpy(loadings @ turn), torch.from_numpy(loc), ppca.noise_scale.detach()
    )
    x = draw(N, D)
    assert_close(turned.log_likelihood(x), ppca.log_likelihood(x).detach().numpy())
    assert_close(turned.reconstruct(x), ppca.reconstruct(x).detach().numpy())
    assert_close(turned.posterior(x).mean, (ppca.posterior(x).mean.detach().numpy()) @ turn)


def test_rows_are_independent():
    ppca, _ = make()
    x, order = draw(N, D), np.random.default_rng(0).permutation(N)
    whole = ppca.log_likelihood(x)
    torch.testing.assert_close(ppca.log_likelihood(x[order]), whole[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(ppca.log_likelihood(x[4:5]), whole[4:5], rtol=0, atol=1e-12)


def test_a_change_of_unit_shifts_log_p_by_a_constant():
    ppca, _ = make()
    x = draw(N, D)
    scaled = PPCA.from_parameters(
        10 * ppca.loadings.detach(), 10 * ppca.loc.detach(), 10 * ppca.noise_scale.detach()
    )
    assert_close(
        scaled.log_likelihood(10 * x), ppca.log_likelihood(x).detach().numpy() - D * math.log(10)
    )


def test_a_shift_of_data_and_mean_changes_nothing():
    ppca, _ = make()
    x, shift = draw(N, D), torch.from_numpy(draw(D, seed=5))
    moved = PPCA.from_parameters(
        ppca.loadings.detach(), ppca.loc.detach() + shift, ppca.noise_scale.detach()
    )
    assert_close(moved.log_likelihood(x + shift.numpy()), ppca.log_likelihood(x).detach().numpy())


def test_an_additional_dimension_of_zero_loadings_is_noise():
    ppca, (loc, loadings, _) = make()
    wider = PPCA.from_parameters(
        torch.from_numpy(np.hstack([loadings, np.zeros((D, 1))])),
        torch.from_numpy(loc),
        ppca.noise_scale.detach(),
    )
    x = draw(N, D)
    torch.testing.assert_close(wider.log_likelihood(x), ppca.log_likelihood(x), rtol=0, atol=1e-10)


# Parameters


def test_assigning_keeps_the_parameter_objects():
    ppca, (loc, _, _) = make()
    before = [id(p) for p in ppca.parameters()]
    new = torch.from_numpy(draw(D, K))
    assert ppca.assign(loadings=new, noise_scale=0.1) is ppca
    assert [id(p) for p in ppca.parameters()] == before
    assert torch.equal(ppca.loadings, new)
    assert_close(ppca.loc, loc)


@pytest.mark.parametrize("scale", [0.1, 1e-8, 12345.678])
def test_a_noise_scale_is_assigned_in_the_precision_of_the_model(scale):
    ppca = PPCA(D, K, seed=0).double().assign(noise_scale=scale)
    assert ppca.noise_scale.item() == pytest.approx(scale, rel=1e-13)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_noise_must_be_positive(bad):
    with pytest.raises(ValueError, match="noise_scale must be positive; got"):
        PPCA(D, K).assign(noise_scale=bad)


@pytest.mark.parametrize(
    ("name", "shape"), [("loadings", (1, K)), ("loadings", (D, 1)), ("loc", (1,))]
)
def test_parameters_of_another_shape_are_not_broadcast(name, shape):
    with pytest.raises(ValueError, match=rf"{name} must have shape"):
        PPCA(D, K).assign(**{name: torch.ones(shape)})


def test_an_isotropic_noise_scale_is_a_scalar():
    with pytest.raises((ValueError, TypeError), match="noise_scale"):
        PPCA(D, K).assign(noise_scale=torch.ones(1))


def test_a_model_can_be_made_from_its_config():
    ppca = PPCA(D, K, seed=0)
    assert ppca.config() == {"data_dim": D, "latent_dim": K, "noise": "isotropic"}
    assert PPCA(**ppca.config()).loadings.shape == (D, K)


def test_a_model_prints_as_the_call_that_made_it():
    assert repr(PPCA(8, 2, seed=0)) == 'PPCA(data_dim=8, latent_dim=2, noise="isotropic")'
    diagonal = PPCA.from_parameters(torch.ones(3, 1), torch.zeros(3), torch.ones(3))
    assert repr(diagonal) == 'PPCA(data_dim=3, latent_dim=1, noise="diagonal")'


@pytest.mark.parametrize(("sizes", "name"), [((0, 1), "data_dim"), ((3, 0), "latent_dim")])
def test_sizes_must_be_positive(sizes, name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number >= 1; got 0"):
        PPCA(*sizes)


@pytest.mark.parametrize(
    "x",
    [
        draw(N, D),
        draw(N, D).astype("f4"),
        torch.from_numpy(draw(N, D)),
        pd.DataFrame(draw(N, D)),
        (10 * draw(N, D)).astype(int),
    ],
    ids=["numpy", "float32", "tensor", "pandas", "integers"],
)
def test_a_model_like_the_data_starts_in_the_units_of_the_data(x):
    array = np.asarray(x, dtype=float)
    ppca = PPCA.like(x, K, seed=0)
    single = getattr(x, "dtype", None) == np.float32 or (
        isinstance(x, np.ndarray) and x.dtype.kind == "i"
    )
    assert ppca.loc.dtype == (torch.float32 if single else torch.float64)
    tolerance = 1e-5 if single else 1e-10
    assert_close(ppca.loc, array.mean(0), rtol=tolerance, atol=1e-5 if single else 1e-10)
    half = array.var(0).mean() / 2
    assert ppca.noise_scale.item() ** 2 == pytest.approx(half, rel=tolerance)
    log_p = ppca.log_likelihood(x)
    assert as_vector(log_p).isfinite().all()
    # in the unit of the data: the loadings explain a variance of the same order.
    explained = ppca.loadings.square().sum().item() / D
    assert 0.2 * half < explained < 5 * half


def test_constant_columns_with_missing_values_have_no_rank():
    x = np.zeros((5, 3))
    x[1, 2] = np.nan
    with pytest.raises(ValueError, match="rank of the centred data, at most 0"):
        PPCA.like(x, 1)


def test_a_constant_column_is_accepted():
    x = draw(N, D)
    x[:, 2] = 4.0
    assert PPCA.like(x, K).log_likelihood(x).isfinite().all()


@pytest.mark.parametrize(
    ("x", "latent_dim", "match"),
    [
        (draw(N, D), D, f"smaller than the rank of the centred data, {D}.*noise would be zero"),
        (draw(4, D), 3, "rank of the centred data, 3"),
        (np.repeat(draw(3, D), 5, axis=0), 2, "rank of the centred data, 2"),
        (draw(N, 2) @ draw(2, D), 2, "rank of the centred data, 2"),
        (np.ones((N, D)), 1, "rank of the centred data, 0"),
        (draw(1, D), 1, "rank of the centred data, 0"),
        (draw(N, D), 0, "latent_dim must be a whole number >= 1; got 0"),
        (
            np.where(np.arange(D) == 1, np.nan, draw(N, D)),
            2,
            r"columns with nothing observed: \[1\]",
        ),
        (np.where(np.eye(N) == 1, np.nan, 1.0)[:, :4], 4, r"at most 0 \(x has shape \(30, 4\)\)"),
        (draw(N), 1, "x must be 2-d"),
        (np.full((N, D), np.inf), 1, f"x has {N * D} infinite entries"),
    ],
    ids=[
        "square",
        "rows",
        "duplicates",
        "plane",
        "constant",
        "single",
        "zero",
        "no column",
        "missing",
        "1-d",
        "inf",
    ],
)
def test_unsuitable_data_are_refused(x, latent_dim, match):
    with pytest.raises(ValueError, match=match):
        PPCA.like(x, latent_dim)


@pytest.mark.parametrize("method", ["log_likelihood", "posterior", "reconstruct"])
@pytest.mark.parametrize(
    ("x", "match"),
    [
        (np.zeros((2, D + 1)), rf"x must have shape \(rows, {D}\) here; .* \(2, {D + 1}\)"),
        (np.zeros(D), "x must be 2-d"),
        (torch.zeros(D), r"x must (be 2-d|have shape)"),
        (np.full((2, D), np.inf), f"x has {2 * D} infinite entries"),
        (torch.full((2, D), torch.inf), f"x has {2 * D} infinite entries"),
    ],
    ids=["width", "1-d", "tensor 1-d", "inf", "tensor inf"],
)
def test_exact_results_need_finite_rows_of_the_right_width(method, x, match):
    ppca, _ = make()
    with pytest.raises(ValueError, match=match):
        getattr(ppca, method)(x)


# The program


def traced(*args, **kwargs):
    ppca, _ = make()
    return ppca, poutine.trace(ppca.model).get_trace(*args, **kwargs)


def test_the_program_has_two_sites_in_the_plate():
    x = torch.from_numpy(draw(N, D))
    ppca, trace = traced(x)
    z, observed = trace.nodes["z"], trace.nodes["x"]
    assert (z["fn"].batch_shape, z["fn"].event_shape) == ((N,), (K,))
    assert (observed["fn"].batch_shape, observed["fn"].event_shape) == ((N,), (D,))
    assert observed["is_observed"] and not z["is_observed"]
    assert torch.equal(observed["value"], x)
    assert [f.name for f in z["cond_indep_stack"]] == ["data"]
    params = {name for name, site in trace.nodes.items() if site["type"] == "param"}
    assert params == {f"{ppca._pyro_name}.{p}" for p in ("loadings", "loc", "noise_scale")}


def test_the_program_draws_from_the_prior():
    _, trace = traced(num_data=4)
    assert trace.nodes["x"]["value"].shape == (4, D)
    assert not trace.nodes["x"]["is_observed"]
    assert trace.nodes["_RETURN"]["value"] is trace.nodes["x"]["value"]


def test_the_program_draws_x_when_it_does_not_observe():
    x = torch.from_numpy(draw(N, D))
    _, trace = traced(x, observe=False)
    assert trace.nodes["x"]["value"].shape == (N, D)
    assert not torch.equal(trace.nodes["x"]["value"], x)


def test_the_conditional_has_the_decoded_mean_and_scores_observed_entries():
    ppca, (loc, loadings, noise) = make()
    z, x, mask = draw(4, K), draw(4, D, seed=1), draw(4, D, seed=2) > 0
    mean = z @ loadings.T + loc
    scored = ppca.conditional(*map(torch.from_numpy, (z, x, mask)))
    assert_close(scored.mean, mean)
    entries = stats.norm.logpdf(x, mean, noise**0.5)
    assert_close(scored.log_prob(torch.from_numpy(x)), np.where(mask, entries, 0.0).sum(1))


def test_a_minibatch_is_scaled_to_the_whole():
    x, index = torch.from_numpy(draw(5, D)), torch.tensor([8, 1, 2, 19, 4])
    _, trace = traced(x, index=index, num_data=20)
    assert trace.nodes["x"]["scale"] == trace.nodes["z"]["scale"] == 4


def test_masked_entries_have_no_effect():
    x, mask = torch.from_numpy(draw(N, D)), torch.from_numpy(draw(N, D, seed=1) > 0)
    ppca, _ = make()
    results = []
    for filler in (0.0, 7.0, torch.nan):
        filled = torch.where(mask, x, filler)
        torch.manual_seed(0)
        trace = poutine.trace(ppca.model).get_trace(filled, mask=mask)
        ppca.zero_grad()
        trace.log_prob_sum().backward()
        results.append((trace.log_prob_sum().item(), ppca.loadings.grad.clone()))
    z = trace.nodes["z"]["value"]
    cells = dist.Normal(z @ ppca.loadings.T + ppca.loc, ppca.noise_scale).log_prob(x)
    expected = (cells * mask).sum() + dist.Normal(0.0, 1.0).log_prob(z).sum()
    values, gradients = zip(*results, strict=True)
    assert values[0] == values[1] == values[2] == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    assert gradients[0].isfinite().all()


@pytest.mark.parametrize("x", [[list(range(7))], np.arange(7)[None], pd.DataFrame([range(7)])])
def test_the_program_accepts_arrays_of_any_type(x):
    _, trace = traced(x)
    assert trace.nodes["x"]["value"].dtype == torch.float64
    assert trace.nodes["x"]["fn"].base_dist.loc.dtype == torch.float64


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((), {}, "give x, or num_data=n"),
        ((torch.zeros(2, D + 1),), {}, rf"x must have shape \(rows, {D}\) here"),
        ((torch.zeros(D),), {}, rf"x must have shape \(rows, {D}\) here"),
        ((torch.zeros(2, D),), {"index": torch.arange(3)}, "index has 3 entries for 2 rows"),
    ],
)
def test_the_program_refuses_invalid_arguments(args, kwargs, match):
    with pytest.raises(ValueError, match=match):
        traced(*args, **kwargs)


# Linear algebra


@pytest.mark.parametrize("size", [1, 2, 6])
def test_the_cholesky_factor_of_an_inverse(size):
    root = draw(size, size)
    matrix = root @ root.T + 0.1 * np.eye(size)
    factor = tril_of_inverse(torch.from_numpy(matrix))
    assert_close(factor @ factor.T, np.linalg.inv(matrix), rtol=1e-8, atol=1e-8)
    assert torch.equal(factor, factor.tril())
    batch = tril_of_inverse(torch.from_numpy(np.stack([matrix, 2 * matrix])))
    assert_close(batch[0], factor.numpy(), rtol=1e-12)


@pytest.mark.parametrize("shape", [(30, 7), (7, 30), (7, 7)])
def test_moments_are_divided_by_n(shape):
    x = draw(*shape) + 50
    moments = SampleCovariance.of(x)
    S = np.cov(x.T, bias=True)
    assert_close(moments.mean, x.mean(0))
    assert moments.trace.item() == pytest.approx(np.trace(S), rel=1e-12)
    assert moments.data_dim == shape[1]
    other = draw(shape[1], 2, seed=1)
    assert_close(moments @ torch.from_numpy(other), S @ other, rtol=1e-9)
    values, vectors = moments.eigh()
    rank = min(shape[1], shape[0] - 1)
    assert_close(values[:rank], np.linalg.eigvalsh(S)[::-1][:rank], rtol=1e-9)
    vectors, values = vectors[:, :rank], values[:rank]
    assert_close(vectors.T @ vectors, np.eye(rank), atol=1e-9)
    assert_close(torch.from_numpy(S) @ vectors, (vectors * values).numpy(), atol=1e-9)


def test_moments_are_summed_in_double_precision():
    """A large mean in single precision must not cancel the variance."""
    x = (1e4 + draw(1_000, 3)).astype("f4")
    moments = SampleCovariance.of(torch.from_numpy(x))
    assert moments.mean.dtype == torch.float64
    stated = np.var(x.astype(float), axis=0).sum()
    assert moments.trace.item() == pytest.approx(stated, rel=1e-10)


def test_constant_columns_are_named():
    x = draw(N, 4)
    x[:, [1, 3]] = [0.1, -7.3]
    assert SampleCovariance.of(x).constant_columns() == [1, 3]
