"""PPCA computes in float64 for any dtype and scale; overflow; half precision."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import oracles
from ppl_vae import PPCA, ExactGuide, fit_em
from ppl_vae.cli.main import app
from ppl_vae.core.validation import as_matrix
from ppl_vae.evaluation import subspace
from ppl_vae.interop.sklearn import PPCATransformer
from ppl_vae.models.linear.eigen import triangular_factor
from ppl_vae.objectives.bounds import log_weights

HALF = [torch.float16, torch.bfloat16]


def drawn(scales, K, noise, N=5, seed=0, missing=0.3):
    """Rows of a model with loadings of these scales in random directions, and its parameters."""
    rng = np.random.default_rng(seed)
    scales = np.asarray(scales, dtype=float)
    loadings = rng.normal(size=(len(scales), K)) * scales[:, None]
    loc = rng.normal(size=len(scales)) * scales
    scale = np.broadcast_to(np.asarray(noise, dtype=float), len(scales))
    x = loc + rng.normal(size=(N, K)) @ loadings.T + scale * rng.normal(size=(N, len(scales)))
    return oracles.with_missing_values(x, missing, seed), (loc, loadings, scale)


def made(loc, loadings, scale):
    scale = torch.tensor(scale) if np.ptp(scale) else float(scale[0])
    return PPCA.from_parameters(torch.from_numpy(loadings), torch.from_numpy(loc), scale)


def in_double(ppca):
    """The same parameters in float64."""
    parts = (p.detach().double() for p in (ppca.loadings, ppca.loc, ppca.noise_scale))
    return PPCA.from_parameters(*parts)


# Oracle


def test_rational_elimination_agrees_with_floating_point_on_well_conditioned_problems():
    x, (loc, loadings, scale) = drawn([1, 2, 1, 3, 1], 2, 0.5)
    mean, sd = oracles.impute(x, loc, loadings, scale**2)
    for n, row in enumerate(x):
        log_p, means, sds = oracles.exact_given_observed(row, loc, loadings, scale)
        stated = oracles.log_density(row, loc, loadings, scale**2)[0]
        assert log_p == pytest.approx(stated, rel=1e-12)
        np.testing.assert_allclose(means, mean[n, np.isnan(row)], rtol=1e-11)
        np.testing.assert_allclose(sds, sd[n, np.isnan(row)], rtol=1e-11)


# Any scale, in float64


@pytest.mark.parametrize("missing", [0, 0.3])
@pytest.mark.parametrize(
    ("scales", "K", "noise", "tolerance"),
    [
        ([1] * 6, 2, 0.5, 1e-12),
        ([1] * 6, 3, 1e-8, 1e-6),
        ([1e12, 1e12, 1, 1, 1], 2, 1, 1e-5),
        ([1e12, 1e6, 1, 1, 1], 2, 1, 1e-5),
        ([1e12, 1e12, 1e12, 1, 1, 1], 3, 1, 1e-3),  # eps |x| / sigma is 1e-3
        ([1e6, 1e-6, 1, 1, 1], 2, 1e-6, 1e-5),
        ([1e12, 1e3, 1e-6, 1, 1, 1], 2, [1e9, 1, 1e-9, 1e-3, 1e-3, 1e-3], 1e-10),
        ([1e150] * 4, 2, 1e149, 1e-11),
        ([1e-150] * 4, 2, 1e-151, 1e-11),
        ([1e300] * 4, 2, 1e298, 1e-11),
    ],
)
def test_log_p_and_imputed_values_are_exact_at_any_scale(scales, K, noise, tolerance, missing):
    """x itself has a relative error of eps, which is eps |x| / sigma standard deviations."""
    for seed in range(3):
        x, parameters = drawn(scales, K, noise, seed=seed, missing=missing)
        ppca = made(*parameters)
        log_p, filled = ppca.log_likelihood(x).detach(), ppca.impute(x)
        for n, row in enumerate(x):
            stated, means, sds = oracles.exact_given_observed(row, *parameters[:2], parameters[2])
            assert float(log_p[n]) == pytest.approx(stated, rel=1e-13, abs=tolerance)
            absent = np.isnan(row)
            away = np.abs(filled.mean[n].numpy()[absent] - means) / sds
            assert (away < tolerance).all()
            np.testing.assert_allclose(filled.sd[n].numpy()[absent], sds, rtol=1e-9)


def test_gradients_are_correct_for_patterns_computed_on_their_principal_axes():
    """A rotation of W changes nothing; on the principal axes no precision is lost."""
    x, (loc, loadings, scale) = drawn([1e5, 1e5, 1, 1, 1], 2, 1.0)
    ppca = made(loc, loadings, scale)
    _, _, axes = np.linalg.svd(loadings)
    gradients = []
    for turn in (np.eye(2), axes.T):
        ppca = made(loc, loadings @ turn, scale)
        ppca.log_likelihood(x).sum().backward()
        gradients.append(ppca.loadings.grad.numpy() @ turn.T)
    ours = gradients[0]
    step = 1e-6 * np.abs(loadings)
    for d, k in ((0, 0), (1, 1), (3, 0), (4, 1)):
        ends = []
        for sign in (1, -1):
            moved = loadings.copy()
            moved[d, k] += sign * step[d, k]
            parts = loc, moved, scale
            ends.append(sum(oracles.exact_given_observed(row, *parts)[0] for row in x))
        slope = (ends[0] - ends[1]) / (2 * step[d, k])
        assert ours[d, k] == pytest.approx(slope, rel=1e-4, abs=1e-6 / np.abs(loadings[d, k]))
        assert gradients[1][d, k] == pytest.approx(ours[d, k], rel=1e-6, abs=1e-9)


def test_the_posterior_has_a_cholesky_factor_on_any_axes():
    x, parameters = drawn([1e9, 1e9, 1, 1, 1], 2, 1.0, missing=0)
    q = made(*parameters).posterior(x)
    assert torch.equal(q.scale_tril, q.scale_tril.tril())
    means, covariances = oracles.posterior(x[:1], *parameters[:2], parameters[2] ** 2)
    np.testing.assert_allclose(q.mean[0].detach(), means[0], rtol=1e-6)
    root = q.scale_tril[0].detach().numpy()
    # w_d' V w_d is between 0 and 1 noise variance, however long w_d.
    along = np.linalg.norm(parameters[1] @ root, axis=1)
    assert (along[:2] < 1 + 1e-6).all() and (along[:2] > 0.1).all()
    assert np.linalg.norm(covariances[0] - root @ root.T) < 1e-6


def test_the_canonical_form_keeps_short_rows():
    """The loadings of a column of scale 1e-6 next to one of 1e12."""
    _, (loc, loadings, scale) = drawn([1e12, 1e-6, 1, 1], 2, 1e-3)
    turned = made(loc, loadings, scale).canonical().loadings.detach().numpy()
    lengths = np.linalg.norm(loadings, axis=1)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), lengths, rtol=1e-12)
    cosine = (turned[1] @ turned[2]) / (lengths[1] * lengths[2])
    assert cosine == pytest.approx((loadings[1] @ loadings[2]) / (lengths[1] * lengths[2]), 1e-9)


@pytest.mark.parametrize("num_rows", [3, 7, 113, 224, 229, 1500])
def test_a_triangular_factor_of_any_number_of_rows_keeps_small_singular_values(num_rows):
    # Singular values from 1 to 1e-10, which X'X would lose: they are known from the construction.
    generator = np.random.default_rng(num_rows)
    size = min(num_rows, 7)
    singular = np.logspace(0, -10, size)
    left = np.linalg.qr(generator.normal(size=(num_rows, size)))[0]
    right = np.linalg.qr(generator.normal(size=(7, size)))[0]
    factor = triangular_factor(torch.from_numpy(left * singular @ right.T))
    assert factor.shape == (size, 7) and torch.equal(factor, factor.triu())
    found = np.linalg.svd(factor.numpy(), compute_uv=False)
    assert found == pytest.approx(singular, abs=1e-15)


@pytest.mark.parametrize("unit", [1e-150, 1.0, 1e150])
def test_the_kl_between_models_does_not_depend_on_the_unit(unit):
    _, first = drawn([1, 2, 1, 3, 1], 2, [0.5, 0.2, 0.7, 1.0, 0.1])
    _, second = drawn([1, 1, 2, 3, 1], 3, [0.3, 0.2, 0.6, 1.1, 0.2], seed=1)
    covariances = [oracles.ppca_covariance(w, s**2) for _, w, s in (first, second)]
    stated = oracles.gaussian_kl(first[0], covariances[0], second[0], covariances[1])
    found = subspace(*(made(*(unit * part for part in parts)) for parts in (first, second)))
    assert found.kl == pytest.approx(stated, rel=1e-10)


# float32


def heywood():
    """Two nearly equal columns and missing values: a noise variance reaches its minimum."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2)) @ rng.normal(size=(2, 6)) + 0.5 * rng.normal(size=(200, 6))
    x[:, 0] = x[:, 1] + 1e-4 * rng.normal(size=200)
    return oracles.with_missing_values(x, 0.2, 0).astype("f4")


def test_factor_analysis_at_a_heywood_case_imputes_in_float32_as_in_float64():
    x = heywood()
    ppca = PPCA.like(x, 2, noise="diagonal", seed=0)
    assert any("Heywood" in note for note in fit_em(ppca, x).notes)
    found, stated = ppca.impute(x), in_double(ppca).impute(x.astype(float))
    assert found.mean.dtype == found.sd.dtype == torch.float32
    usual = torch.from_numpy(np.nanstd(x, axis=0))
    assert ((found.mean - stated.mean).abs() / usual).max() < 1e-6
    assert ((found.sd - stated.sd).abs() / usual).max() < 1e-6


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-4])
def test_log_p_in_float32_is_accurate_for_small_noise(noise):
    rng = np.random.default_rng(0)
    loadings = rng.normal(size=(20, 2))
    x = rng.normal(size=(5, 2)) @ loadings.T + noise * rng.normal(size=(5, 20))
    single = torch.from_numpy(loadings).float()
    ppca = PPCA.from_parameters(single, torch.zeros(20), noise)
    for rows in (x, x.astype("f4")):
        found = ppca.log_likelihood(rows)
        assert found.dtype == torch.float32
        scale = np.full(20, ppca.noise_scale.item())
        for value, row in zip(found.tolist(), rows.astype(float), strict=True):
            parts = np.zeros(20), single.double().numpy(), scale
            stated = oracles.exact_given_observed(row, *parts)[0]
            assert value == pytest.approx(stated, rel=1e-6)


@pytest.mark.parametrize("unit", [1e-30, 1e-18, 1e18, 1e30, 1e37])
def test_a_float32_model_accepts_any_unit(unit):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 2)) @ rng.normal(size=(2, 6)) + 0.5 * rng.normal(size=(100, 6))
    x = (unit * x).astype("f4")
    ppca = PPCA.like(x, 2, seed=0)
    fitted = fit_em(ppca, x)
    found = ppca.log_likelihood(x).mean().item()
    assert found == pytest.approx(float(fitted.log_likelihood[-1]), rel=1e-6)
    for values in (
        ppca.sample(50, seed=0),
        ppca.reconstruct(x),
        ppca.reconstruct(x, shrink=False),
    ):
        assert values.dtype == torch.float32 and values.isfinite().all()
        assert 0.3 < values.detach().abs().double().mean() / np.abs(x.astype(float)).mean() < 3


def test_exact_results_have_the_dtype_of_the_model_and_the_accuracy_of_float64():
    x, parameters = drawn([1, 10, 1, 1, 5], 2, 0.01, missing=0)
    ppca = made(*parameters).float()
    double = in_double(ppca)
    for name in ("posterior_mean", "log_likelihood", "reconstruct"):
        found, stated = (getattr(model, name)(x) for model in (ppca, double))
        assert found.dtype == torch.float32, name
        torch.testing.assert_close(found, stated.float(), rtol=0, atol=0)
    pairs = (
        (ppca.covariance(), double.covariance()),
        (ppca.sample(3, seed=0), double.sample(3, seed=0)),
    )
    for found, stated in pairs:
        torch.testing.assert_close(found, stated.float(), rtol=0, atol=0)
    assert ppca.posterior(x).scale_tril.dtype == torch.float32
    assert ppca.canonical().loadings.dtype == torch.float32
    assert ppca.marginal().log_prob(torch.from_numpy(x)).dtype == torch.float64


def test_gradients_pass_through_the_conversion():
    x, parameters = drawn([1, 2, 1, 3, 1], 2, 0.5, missing=0)
    single = made(*parameters).float()
    double = in_double(single)
    for model in (single, double):
        model.log_likelihood(x).sum().backward()
    for mine, its in zip(single.parameters(), double.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad.double(), its.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 1e-4])
def test_the_log_weights_of_the_exact_guide_are_log_p_in_a_float32_program(noise):
    """z is rounded to eps |z|, which is eps |x| / sigma standard deviations in each entry."""
    rng = np.random.default_rng(0)
    loadings = rng.normal(size=(20, 3))
    x = rng.normal(size=(50, 3)) @ loadings.T + noise * rng.normal(size=(50, 20))
    x = torch.from_numpy(x).float()
    ppca = PPCA.from_parameters(torch.from_numpy(loadings).float(), torch.zeros(20), noise)
    weights = log_weights(ppca.model, ExactGuide(ppca), x, 20).detach().double()
    away = weights - in_double(ppca).log_likelihood(x)
    limit = 40 * torch.finfo(torch.float32).eps * float(x.abs().max()) / noise + 1e-5
    assert away.abs().max() < 5 * limit and away.mean().abs() < limit


# Overflow


def far(noise=1e10, dtype=torch.float32):
    return PPCA.from_parameters(torch.full((4, 2), 1e20, dtype=dtype), torch.zeros(4), noise)


def test_an_overflow_of_the_dtype_raises_an_error_that_names_the_result():
    with pytest.raises(
        FloatingPointError,
        match=r"the covariance: 16 of 16 numbers overflow float32 \(the largest .* is 2e\+40; "
        r"the limit is 3\.4e\+38\); convert the model by \.double\(\), or rescale the columns",
    ):
        far().covariance()
    assert far(dtype=torch.float64).covariance().isfinite().all()
    x = np.full((3, 4), 1e35)
    x[1] = 1.0
    with pytest.raises(FloatingPointError, match=r"log p\(x\): 2 of 3 numbers overflow float32"):
        PPCA(4, 1, seed=0).log_likelihood(x)
    assert PPCA(4, 1, seed=0).double().log_likelihood(x).isfinite().all()
    with pytest.raises(FloatingPointError, match=r"log p\(x\): 1 of 1 .* float64.*rescale"):
        PPCA(4, 1, seed=0).double().log_likelihood(np.full((1, 4), 1e300))
    big = PPCA.from_parameters(torch.full((4, 1), 2e38), torch.zeros(4), 1e38)
    with pytest.raises(FloatingPointError, match=r"samples of x: .* overflow float32"):
        big.sample(100, seed=0)
    x = np.array([[3e38, 3e38, 3e38, np.nan]], dtype="f4")
    steep = PPCA.from_parameters(torch.tensor([[1.0], [1], [1], [10]]), torch.zeros(4), 1.0)
    with pytest.raises(FloatingPointError, match=r"imputed values: .* overflow float32"):
        steep.impute(x)
    with pytest.raises(FloatingPointError, match=r"reconstructions: .* overflow float32"):
        steep.reconstruct(x)


def test_noise_below_the_precision_of_float64_raises_an_error():
    loadings = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 3)))
    ppca = PPCA.from_parameters(loadings, torch.zeros(5), 1e-22)
    x = np.array([[1.0, 2, np.nan, np.nan, np.nan]])  # two values for three latent dimensions
    stated = r"too large relative to the noise .*reaches \d\.\d+e\+22"
    for method in ("log_likelihood", "posterior", "posterior_mean", "reconstruct", "impute"):
        with pytest.raises(FloatingPointError, match=stated):
            getattr(ppca, method)(x)


def test_the_scikit_learn_transformer_names_the_result_that_overflows():
    rng = np.random.default_rng(0)
    transformer = PPCATransformer(n_components=1).fit(1e30 * rng.normal(size=(30, 3)))
    with pytest.raises(FloatingPointError, match=r"means of x overflow float32.*float64"):
        transformer.inverse_transform(np.array([[1e12]], dtype="f4"))


# Half precision


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_raised_with_a_warning(dtype):
    x = torch.randn(20, 3, generator=torch.manual_seed(0)).to(dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.warns(UserWarning, match=f"x is of {name}, .*is converted to float32") as caught:
        assert as_matrix(x).dtype == torch.float32
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=f"rows is of {name}, .*it is converted to float64"):
        assert as_matrix(x, name="rows", dtype=torch.float64).dtype == torch.float64
    assert as_matrix(x, dtype=dtype).dtype == dtype  # for a model of that dtype
    with pytest.warns(UserWarning, match="converted to float32"):
        ppca = PPCA.like(x, 1, seed=0)
    assert ppca.loc.dtype == torch.float32
    for method in (ppca.log_likelihood, ppca.impute, lambda x: fit_em(ppca, x)):
        with pytest.warns(UserWarning, match="converted to float32") as caught:
            method(x)
        assert len(caught) == 1
    half = copy.deepcopy(ppca).to(dtype)
    assert half.log_likelihood(x.float()).dtype == dtype


def test_half_precision_in_a_file_and_in_scikit_learn(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float16)
    x[3, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    out = tmp_path / "filled.csv"
    arguments = [
        "impute",
        tmp_path / "x.npy",
        "--out",
        out,
        "--latent-dim",
        1,
        "--noise",
        "isotropic",
    ]
    shown = CliRunner().invoke(app, [str(word) for word in arguments])
    assert shown.exit_code == 0, shown.output
    assert "note: the numbers are float16" in shown.output
    assert not pd.read_csv(out)["x3"].isna().any()
    with pytest.warns(UserWarning, match="X has dtype float16, .*cast to float64"):
        PPCATransformer(n_components=1).fit(x)
