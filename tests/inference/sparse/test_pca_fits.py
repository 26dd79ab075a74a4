"""PCA as an autoencoder, and the Gaussian that an autoencoder implies."""

import math

import numpy as np
import oracles
import pytest
import torch
from scipy import stats
from sklearn.decomposition import PCA
from torch import nn

from ppl_vae import (
    PPCA,
    Autoencoder,
    Bernoulli,
    Gaussian,
    digits,
    elbo,
    fit_closed_form,
    mlp,
)
from ppl_vae.evaluation import subspace
from ppl_vae.inference import fit_pca, implied_gaussian

X = oracles.simulate_ppca([6.0, 4.0, 2.5], 0.4, 120, 8, 0) + 3
KINDS = [{}, {"tied": True}, {"tied": True, "columns": "orthonormal"}, {"columns": "unit"}]
NAMES = ["untied", "tied", "orthonormal", "unit"]


def linear(K=3, data_dim=8, **options):
    return Autoencoder.linear(data_dim, K, seed=0, **options).double()


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_pca_matches_scikit_learn(kind):
    autoencoder = linear(**kind)
    fit = fit_pca(autoencoder, X)
    pca = PCA(3).fit(X)
    projected = pca.inverse_transform(pca.transform(X))
    np.testing.assert_allclose(autoencoder.reconstruct(X), projected, atol=1e-11)
    np.testing.assert_allclose(abs(autoencoder.features(X)), abs(pca.transform(X)), atol=1e-11)
    loss = 0.5 * ((X - projected) ** 2).sum(1).mean() + 4 * math.log(2 * math.pi)
    assert float(fit.objective) == pytest.approx(-loss, rel=1e-12)
    found = elbo(autoencoder.model, autoencoder.guide, X).mean()
    assert float(found) == pytest.approx(-loss, rel=1e-12)
    assert repr(fit).startswith("PCA: 1 step in")


def test_pca_minimizes_the_squared_error_of_linear_autoencoders():
    autoencoder = linear(likelihood=Gaussian(0.3))
    best = float(fit_pca(autoencoder, X).objective)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        with torch.no_grad():
            for parameter in autoencoder.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.01 * noise)
        assert float(elbo(autoencoder.model, autoencoder.guide, X).mean()) < best
        fit_pca(autoencoder, X)


def test_fewer_rows_than_columns_and_full_rank():
    x = np.random.default_rng(0).normal(size=(5, 9))
    autoencoder = linear(4, 9, tied=True)
    assert float(fit_pca(autoencoder, x).objective) == pytest.approx(
        -4.5 * math.log(2 * math.pi), rel=1e-12
    )
    np.testing.assert_allclose(autoencoder.reconstruct(x), x, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: linear(prior="laplace"), "autoencoder must have prior='flat' and a Gaussian of"),
        (lambda: linear(likelihood=Gaussian("shared")), r"prior='flat' and Gaussian\(scale=.sh"),
        (lambda: linear(likelihood=Bernoulli(soft_targets=True)), "squared error alone"),
        (lambda: Autoencoder.mlp(8, 3, seed=0), "autoencoder must be linear, as Autoencoder.line"),
        (lambda: linear(code_activation="relu"), "autoencoder must be linear"),
        (
            lambda: linear(9),
            "latent_dim=9 is larger than the rank of the centred data, 8",
        ),
        (lambda: linear(3, 7), "x has 8 columns, the autoencoder 7"),
    ],
)
def test_unsuitable_autoencoders_are_rejected(make, match):
    with pytest.raises(ValueError, match=match):
        fit_pca(make(), X)


def test_missing_values_are_rejected():
    with pytest.raises(ValueError, match="missing"):
        fit_pca(linear(), np.where(X > 4, np.nan, X))


# The implied Gaussian


def scipy_log_likelihood(autoencoder, x):
    """log p from the codes' mean and covariance and the mean squared residual, in numpy."""
    codes = autoencoder.features(x).numpy()
    with torch.no_grad():
        offset = autoencoder.decoder(torch.zeros(1, codes.shape[1]).double())[0].numpy()
        weights = (
            autoencoder.decoder(torch.eye(codes.shape[1]).double()).numpy().T - offset[:, None]
        )
    noise = ((x - codes @ weights.T - offset) ** 2).mean()
    spread = weights @ np.atleast_2d(np.cov(codes.T, bias=True)) @ weights.T
    marginal = stats.multivariate_normal(
        weights @ codes.mean(0) + offset, spread + noise * np.eye(x.shape[1])
    )
    return marginal.logpdf(x)


@pytest.mark.parametrize("kind", [*KINDS, {"code_activation": "tanh"}], ids=[*NAMES, "tanh"])
@pytest.mark.parametrize("K", [1, 3])
def test_the_implied_gaussian_is_that_of_codes_and_residuals(kind, K):
    autoencoder = linear(K, **kind).center(X)
    expected = scipy_log_likelihood(autoencoder, X)
    found = implied_gaussian(autoencoder, X).log_likelihood(X).detach()
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_implied_gaussian_of_pca_falls_short_of_ppca_by_the_formula():
    autoencoder, best = linear(), PPCA.like(X, 3)
    fit_pca(autoencoder, X)
    fit_closed_form(best, X)
    implied = implied_gaussian(autoencoder, X)
    values, D, K = oracles.sample_spectrum(X)[0], 8, 3
    s2 = values[K:].sum() / D
    inside = (np.log(values[:K] + s2) + values[:K] / (values[:K] + s2)).sum()
    formula = -0.5 * (D * math.log(2 * math.pi) + inside + (D - K) * math.log(s2) + D)
    found = float(implied.log_likelihood(X).detach().mean())
    assert found == pytest.approx(formula, rel=1e-12)
    assert found == pytest.approx(oracles.implied_by_pca(X, K), rel=1e-12)
    assert found < float(best.log_likelihood(X).detach().mean()) - 0.01
    assert subspace(implied, best).largest_angle < 1e-6


def test_the_implied_gaussian_is_invariant_to_linear_maps_of_the_codes():
    autoencoder = linear().center(X)
    before = implied_gaussian(autoencoder, X).log_likelihood(X).detach()
    turn = torch.as_tensor(oracles.rotation(3, 0) * [0.1, 3.0, 7.0])
    with torch.no_grad():
        autoencoder.decoder[0].weight.copy_(autoencoder.decoder[0].weight @ torch.linalg.inv(turn))
        encoder = autoencoder.encoder[0]
        encoder.weight.copy_(turn @ encoder.weight)
        encoder.bias.copy_(turn @ encoder.bias)
    after = implied_gaussian(autoencoder, X).log_likelihood(X).detach()
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_the_implied_gaussian_with_unused_codes_and_more_codes_than_columns():
    x = digits()[:100]
    autoencoder = Autoencoder.linear(64, 70, columns="unit", code_activation="relu", seed=0)
    implied = implied_gaussian(autoencoder, x)
    assert implied.loadings.shape == (64, 70) and implied.loadings.dtype == torch.float64
    assert bool(implied.log_likelihood(x).isfinite().all())


def test_the_implied_gaussian_ignores_missing_values():
    mask = np.random.default_rng(0).random(X.shape) > 0.2
    autoencoder = linear().center(X)
    codes = autoencoder.features(X, mask=mask).numpy()
    weights, bias = (p.detach().numpy() for p in autoencoder.decoder.parameters())
    residuals = (X - codes @ weights.T - bias)[mask]
    found = implied_gaussian(autoencoder, np.where(mask, X, np.nan))
    assert float(found.noise_scale.detach()) == pytest.approx(
        math.sqrt((residuals**2).mean()), rel=1e-12
    )
    spread = weights @ np.cov(codes.T, bias=True) @ weights.T
    loadings = found.loadings.detach().numpy()
    np.testing.assert_allclose(loadings @ loadings.T, spread, atol=1e-12)


def test_autoencoders_without_an_implied_gaussian_are_rejected():
    whole = linear(8)
    fit_pca(whole, X)
    with pytest.raises(ValueError, match="of latent_dim=8, reproduces x without an error"):
        implied_gaussian(whole, X)
    with pytest.raises(ValueError, match=r"must be an affine map W z \+ b; its outputs differ"):
        implied_gaussian(Autoencoder.mlp(8, 3, seed=0).double(), X)
    bernoulli = linear(likelihood=Bernoulli(soft_targets=True))
    with pytest.raises(ValueError, match="needs a Gaussian likelihood whose sigma is no netw"):
        implied_gaussian(bernoulli, 1 / (1 + np.exp(-X)))


def test_a_custom_affine_decoder_is_accepted():
    decoder = nn.Sequential(mlp(3, 4, seed=0), mlp(4, 8, seed=1))  # two affine maps
    made = Autoencoder(encoder=mlp(8, 3, (5,), seed=2), decoder=decoder, data_dim=8, latent_dim=3)
    x = torch.as_tensor(X)
    expected = scipy_log_likelihood(made.double(), X)
    np.testing.assert_allclose(
        implied_gaussian(made, x).log_likelihood(x).detach(), expected, rtol=1e-9
    )
