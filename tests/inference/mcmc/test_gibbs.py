"""Gibbs sampling of PPCA's posterior: against the prior, quadrature and the closed form."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import oracles
from ppl_vae.data.sources.row_blocks import RowBlock
from ppl_vae.evaluation.calibration.rank_uniformity import UniformRanks
from ppl_vae.inference.mcmc.gibbs import GibbsSampler, sample_gibbs
from ppl_vae.inference.mcmc.gibbs_priors import ConjugatePriors
from ppl_vae.inference.mcmc.settings import ChainSettings
from ppl_vae.inference.mcmc.wishart import draw_normal, draw_normals_of_one_gram
from ppl_vae.models.bayesian_ppca import BayesianPPCA, ParameterDraws
from ppl_vae.models.linear.table_statistics import TableStatistics
from ppl_vae.models.priors import InverseGammaScale


def proper_model(data_dim, latent_dim, noise, prior):
    """A model whose priors differ among rows and columns, and have moments."""

    def between(low, high, size):
        return torch.linspace(low, high, size, dtype=torch.float64)

    concentration, rate = between(2.5, 4, data_dim), between(0.5, 2, data_dim)
    if noise == "isotropic":
        concentration, rate = concentration[0], rate[0]
    relevance = dist.Gamma(between(2, 3, latent_dim), between(1, 2, latent_dim))
    scale = between(0.5, 2, data_dim)[:, None]
    return BayesianPPCA(
        data_dim,
        latent_dim,
        noise=noise,
        prior=prior,
        loadings_prior=dist.Normal(torch.zeros_like(scale), scale),
        loc_prior=dist.Normal(between(-1, 1, data_dim), between(0.5, 1.5, data_dim)),
        noise_prior=InverseGammaScale(concentration, rate),
        relevance_prior=relevance if prior == "ard" else None,
    )


def prior_draws(model, number):
    relevance = model.relevance_prior
    relevance = None if relevance is None else relevance().sample((number,))
    loadings = model.loadings_density(relevance)
    loadings = loadings.sample((number,)) if relevance is None else loadings.sample()
    loc, scale = model.loc_prior().sample((number,)), model.noise_prior().sample((number,))
    return ParameterDraws(loadings, loc, scale, relevance)


def tables(parameters, mask):
    """A table for each draw of the parameters, zero where missing."""
    number, _, latent_dim = parameters.loadings.shape
    z = torch.randn(number, len(mask), latent_dim).double()
    noise = parameters.column_scale.unsqueeze(1) * torch.randn(number, *mask.shape).double()
    x = z @ parameters.loadings.mT + parameters.loc.unsqueeze(1) + noise
    return torch.where(mask, x, 0.0)


def statistics_of(x, mask, transformed):
    """Statistics of one table for each chain, of its rows or of transformed rows."""
    observed = None if bool(mask.all()) else mask
    block = RowBlock(mask.double(), observed, mask.double().sum(0), 1e-16)
    statistics = replace(TableStatistics.of_rows(block), rows=x)
    if not transformed:
        return statistics
    num_data, data_dim = mask.shape
    mean = x.mean(1, keepdim=True)
    factor = torch.linalg.qr(x - mean, mode="r").R
    weight = torch.zeros(data_dim + 1).double()
    weight[0] = math.sqrt(num_data)
    return replace(
        statistics,
        rows=torch.cat([mean * weight[0], factor], 1),
        weight=weight,
        pattern=torch.zeros(data_dim + 1).long(),
        num_zero=torch.tensor([num_data - 1.0 - data_dim]).double(),
    )


def some_missing(num_data, data_dim):
    """A mask with patterns that several rows share, and with others."""
    mask = torch.rand(num_data, data_dim) > 0.3
    mask[: num_data // 2] = mask[0]
    mask[torch.arange(num_data), torch.randint(data_dim, (num_data,))] = True
    mask[torch.randint(num_data, (data_dim,)), torch.arange(data_dim)] = True
    return mask


def functions(parameters, x):
    """Functions of parameters and data whose means and variances exist."""
    loadings, loc, scale, relevance = parameters
    scale = scale.reshape(len(scale), -1)
    covariance = loadings @ loadings.mT
    values = [
        loadings[:, 0, 0],
        loadings.square().sum((1, 2)).log(),
        loadings[..., -1].square().sum(1).log(),
        covariance[:, 0, 1].atan(),
        loc[:, 0],
        loc[:, -1],
        scale[:, 0].log(),
        scale[:, -1].log(),
        x.square().sum((1, 2)).log(),
        ((x.sum(1) / x.count_nonzero(1) - loc)[:, 0] / scale[:, 0]).atan(),
    ]
    if relevance is not None:
        values += [relevance[:, 0].log(), relevance[:, -1].log()]
    return torch.stack(values)


def largest_z(model, mask, *, transformed, expand, chains, rounds):
    """Geweke's test: sweeps alternate with drawing the data anew, which leaves the prior."""
    torch.manual_seed(0)
    priors, parameters = ConjugatePriors.of(model), prior_draws(model, chains)
    for _ in range(rounds):
        statistics = statistics_of(tables(parameters, mask), mask, transformed)
        parameters, _ = GibbsSampler(statistics, priors, expand).sweep(parameters)
    drawn = functions(parameters, tables(parameters, mask))
    fresh = prior_draws(model, 4 * chains)
    exact = functions(fresh, tables(fresh, mask))
    assert drawn.isfinite().all() and exact.isfinite().all()
    error = (drawn.var(1) / drawn.shape[1] + exact.var(1) / exact.shape[1]).sqrt()
    z = (drawn.mean(1) - exact.mean(1)) / error
    return float(z.abs().max()), oracles.z_limit(len(z))


KINDS = list(itertools.product(["isotropic", "diagonal"], ["normal", "ard"]))
# Fewer rows than columns, as few as columns and latent dimensions, more.
SIZES = [(6, 4, 2), (5, 5, 3), (6, 3, 1), (12, 4, 2)]


@pytest.mark.parametrize(("noise", "prior"), KINDS)
@pytest.mark.parametrize("rows", ["rows", "transformed rows", "rows with missing values"])
def test_sweeps_and_new_data_leave_the_prior_as_it_is(noise, prior, rows):
    torch.manual_seed(1)
    mask = torch.ones(12, 4).bool() if rows != "rows with missing values" else some_missing(12, 4)
    z, limit = largest_z(
        proper_model(4, 2, noise, prior),
        mask,
        transformed=rows == "transformed rows",
        expand=True,
        chains=1000,
        rounds=8,
    )
    assert z < limit


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "prior"), KINDS)
@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(("num_data", "data_dim", "latent_dim"), SIZES)
def test_many_sweeps_leave_the_prior_as_it_is(
    noise, prior, expand, missing, num_data, data_dim, latent_dim
):
    torch.manual_seed(1)
    complete = torch.ones(num_data, data_dim).bool()
    z, limit = largest_z(
        proper_model(data_dim, latent_dim, noise, prior),
        some_missing(num_data, data_dim) if missing else complete,
        transformed=False,
        expand=expand,
        chains=5000,
        rounds=20,
    )
    assert z < limit


def smallest_p_value(model, num_data, sampled=None):
    """Of uniform ranks of functions of the true parameters of 1,000 tables, among 49 draws given
    each table, from a chain that starts independently of them; ``sampled`` is another model."""
    torch.manual_seed(2)
    number, draws, warmup, thin = 1000, 49, 300, 20
    mask, true = torch.ones(num_data, 4).bool(), prior_draws(model, number)
    x = tables(true, mask)
    priors = ConjugatePriors.of(sampled or model)
    sampler = GibbsSampler(statistics_of(x, mask, num_data > 6), priors)
    parameters, exact = prior_draws(model, number), functions(true, x)
    below = torch.zeros_like(exact)
    for sweep in range(-warmup, draws * thin):
        parameters, _ = sampler.sweep(parameters)
        if sweep >= 0 and sweep % thin == 0:
            below += functions(parameters, x) < exact
    invariant = [1, 3, 4, 5, 6, 7, 9]  # under rotations, which short chains do not explore
    return UniformRanks(number, draws).p_values(below[invariant].mT.long().numpy()).min()


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "prior"), KINDS)
@pytest.mark.parametrize(("num_data", "latent_dim"), [(30, 1), (30, 2), (6, 1), (6, 2)])
def test_a_thousand_tables_have_uniform_ranks(noise, prior, num_data, latent_dim):
    model = proper_model(4, latent_dim, noise, prior)
    p = smallest_p_value(model, num_data)
    print(f"smallest p-value {p:.4f}")
    assert p > 3e-4  # seven quantities in each of 16 cases


@pytest.mark.slow
def test_draws_under_another_prior_have_other_ranks():
    noise = InverseGammaScale(torch.tensor(5.0), torch.tensor(4.0))
    model, other = proper_model(4, 1, "isotropic", "normal"), BayesianPPCA(4, 1, noise_prior=noise)
    assert smallest_p_value(model, 6, other) < 3e-4


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("prior", ["normal", "ard"])
def test_moves_leave_the_likelihood_given_z_as_it_is(prior, missing):
    """The sums of squared residuals of each column determine it."""
    torch.manual_seed(0)
    model = proper_model(4, 3, "isotropic", prior)
    x = oracles.with_missing_values(torch.randn(30, 4).double(), 0.2 * missing, 0)
    sampler = GibbsSampler(TableStatistics.of(x), ConjugatePriors.of(model))
    parameters = prior_draws(model, 50)
    sums = sampler.codes.draw(parameters)

    def residuals(parameters, sums):
        offset = (parameters.loc - sampler.statistics.mean).unsqueeze(-1)
        coefficients = torch.cat([parameters.loadings, offset], -1)
        return sums.squared_residuals(sampler.codes.squares, coefficients)

    moved, g, accepted = sampler.moves.move(parameters, sums.total)
    torch.testing.assert_close(
        residuals(moved, sums.transform(g)), residuals(parameters, sums), rtol=1e-8, atol=1e-8
    )
    assert 0.1 < float(accepted.mean()) < 1
    assert not torch.allclose(moved.loadings, parameters.loadings)
    assert not torch.allclose(moved.loc, parameters.loc)


@pytest.mark.parametrize("missing", [False, True])
def test_sums_are_those_of_drawn_rows(missing):
    """A slow definition: z of each row from its own posterior, many times."""
    torch.manual_seed(0)
    model = proper_model(3, 2, "diagonal", "normal")
    x = torch.randn(14, 3).double()
    mask = torch.ones(14, 3).bool()
    if missing:
        mask[:6, 0] = mask[3, 2] = False
    table = torch.where(mask, x, torch.nan)
    statistics = TableStatistics.of(table)
    loadings, loc, scale, _ = (None if part is None else part[0] for part in prior_draws(model, 1))
    number = 40_000
    parameters = ParameterDraws(
        *(part.expand(number, *part.shape) for part in (loadings, loc, scale)), None
    )
    found = GibbsSampler(statistics, ConjugatePriors.of(model)).codes.draw(parameters)
    total, gram, cross = torch.zeros(3, 3), torch.zeros(3, 3, 3), torch.zeros(3, 3)
    for row, known in zip(x, mask, strict=True):
        part, noise = loadings[known], scale[known].square()
        precision = torch.eye(2).double() + part.mT @ (part / noise[:, None])
        mean = torch.linalg.solve(precision, part.mT @ ((row - loc)[known] / noise))
        second = torch.linalg.inv(precision) + mean[:, None] * mean
        v = torch.cat([mean, torch.ones(1).double()])
        block = torch.ones(3, 3).double()
        block[:2, :2], block[2, :2], block[:2, 2] = second, mean, mean
        total = total + block
        gram = gram + known[:, None, None] * block
        cross = cross + torch.where(known, row - statistics.mean, 0.0)[:, None] * v
    for name, exact in {"total": total, "gram": gram, "cross": cross}.items():
        drawn = getattr(found, name)
        error = drawn.std(0) / math.sqrt(number) + 1e-9
        z = (drawn.mean(0) - exact) / error
        assert z.abs().max() < oracles.z_limit(z.numel()), name


def test_normal_draws_have_the_stated_precision():
    torch.manual_seed(0)
    root = torch.randn(3, 3).double()
    gram, base = root @ root.mT, torch.tensor([1.0, 2.0, 0.3]).double()
    weight, strength = torch.tensor([2.0, 0.5]).double(), torch.tensor([0.7, 3.0]).double()
    score = torch.randn(2, 3).double()
    precision = weight[:, None, None] * gram + strength[:, None, None] * base.diag()
    number = 100_000
    draws = [
        draw_normal(precision.expand(number, 2, 3, 3), score.expand(number, 2, 3)),
        draw_normals_of_one_gram(
            gram.expand(number, 3, 3),
            base,
            weight.expand(number, 2),
            strength,
            score.expand(number, 2, 3),
        ),
    ]
    for drawn in draws:
        mean = torch.linalg.solve(precision, score.unsqueeze(-1)).squeeze(-1)
        z = (drawn.mean(0) - mean) / (drawn.std(0) / math.sqrt(number))
        assert z.abs().max() < oracles.z_limit(6)
        quadratic = ((drawn - mean).unsqueeze(-2) @ precision).squeeze(-2)
        products = quadratic.unsqueeze(-1) * (drawn - mean).unsqueeze(-2)
        error = products.std(0) / math.sqrt(number)
        z = (products.mean(0) - torch.eye(3)) / error
        assert z.abs().max() < oracles.z_limit(18)


@pytest.mark.parametrize(("noise", "missing"), [("isotropic", 0.0), ("diagonal", 0.3)])
def test_posterior_means_equal_those_of_importance_sampling(noise, missing):
    """D = 2, K = 1: the prior is wide enough a proposal for eight rows."""
    model = proper_model(2, 1, noise, "normal")
    rng = np.random.default_rng(3)
    x = rng.normal(size=(8, 1)) @ [[1.0, -0.5]] + 0.5 * rng.normal(size=(8, 2))
    x = oracles.with_missing_values(x, missing, 0) if missing else x
    torch.manual_seed(0)
    draws = prior_draws(model, 50_000)
    log_p = densities(x, draws)
    weights = (log_p - log_p.max()).exp()
    weights = weights / weights.sum()
    samples = sample_gibbs(
        model,
        x,
        settings=ChainSettings(num_samples=10, warmup=150, chains=500, seed=0, progress=False),
    )
    chained = samples.parameters()
    for function in (lambda p: p.loadings[:, 0, 0].square(), lambda p: p.column_scale[:, 1]):
        exact = (weights * function(draws)).sum()
        exact_error = (weights * (function(draws) - exact)).norm()
        estimate = function(chained).reshape(500, -1).mean(1)  # one independent mean per chain
        error = (exact_error**2 + estimate.var() / len(estimate)).sqrt()
        assert abs(estimate.mean() - exact) < oracles.z_limit(2) * error


def densities(x, draws):
    """log p(x | draw), from the two-dimensional covariances themselves."""
    covariance = draws.loadings @ draws.loadings.mT
    covariance = covariance + torch.diag_embed(draws.column_scale.square())
    total = torch.zeros(len(draws.loc)).double()
    for row in torch.from_numpy(x):
        observed = (~row.isnan()).nonzero().flatten()
        part = covariance[:, observed][:, :, observed]
        offset = (row - draws.loc)[:, observed].unsqueeze(-1)
        quadratic = (offset * torch.linalg.solve(part, offset)).sum((1, 2))
        total -= 0.5 * (quadratic + torch.linalg.slogdet(part).logabsdet)
    return total


@pytest.mark.parametrize("noise", ["isotropic", "diagonal"])
def test_with_many_rows_the_posterior_is_at_the_maximum_of_the_likelihood(noise):
    num_data, data_dim = 20_000, 5
    x = oracles.simulate_ppca([3.0], 0.5, num_data, data_dim, seed=0)
    model = BayesianPPCA.like(x, 1, noise=noise)
    samples = sample_gibbs(
        model,
        x,
        settings=ChainSettings(num_samples=5, warmup=50, chains=200, seed=0, progress=False),
    )
    covariance = samples.invariants()["covariance"]
    expected = torch.from_numpy(np.cov(x.T, bias=True))  # the maximum has this spectrum
    error = covariance.flatten(2).mT.std(-1).mean() / math.sqrt(200)
    bias = 20 * expected.diagonal().max() / num_data
    assert (covariance.mean((0, 1)) - expected).abs().max() < oracles.z_limit(15) * error + bias


def test_the_work_of_a_sweep_does_not_depend_on_the_number_of_rows():
    rng = np.random.default_rng(0)
    sizes = {len(TableStatistics.of(rng.normal(size=(n, 6))).rows) for n in (100, 10_000)}
    assert sizes == {7}


def test_draws_repeat_and_leave_the_generators_alone():
    x = np.random.default_rng(0).normal(size=(20, 3))
    model = BayesianPPCA.like(x, 1)
    state = torch.get_rng_state()
    first, second = (
        sample_gibbs(
            model, x, settings=ChainSettings(num_samples=5, warmup=5, seed=3, progress=False)
        )
        for _ in "ab"
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first.draws[k], second.draws[k]) for k in first.draws)
    assert first.draws["loadings"].shape == (4, 5, 3, 1)
    assert first.draws["noise_scale"].dtype == torch.float64


def test_blocks_of_rows_and_memory_maps_give_the_draws_of_the_table(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 3))
    model = BayesianPPCA.like(x, 1, noise="diagonal")
    mapped = np.memmap(tmp_path / "x", mode="w+", dtype=float, shape=x.shape)
    mapped[:] = x
    draws = [
        sample_gibbs(
            model, data, settings=ChainSettings(num_samples=5, warmup=0, seed=0, progress=False)
        ).draws
        for data in (x, [x[:20], x[20:]], mapped, iter([x[:20], x[20:]]))
    ]
    for other in draws[1:]:
        for name, value in draws[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("priors", "named"),
    [
        ({"loadings_prior": dist.Laplace(0.0, 1.0)}, "loadings_prior of the model is not"),
        ({"loadings_prior": dist.Normal(1.0, 1.0)}, "loadings_prior of the model is not"),
        (
            {"noise_prior": dist.HalfNormal(1.0), "loc_prior": dist.StudentT(3.0)},
            "loc_prior, noise_prior of the model are not",
        ),
    ],
)
def test_priors_that_are_not_conjugate_are_named(priors, named):
    x = np.random.default_rng(0).normal(size=(20, 3))
    with pytest.raises(ValueError, match=f"{named}.*use sampler='nuts'"):
        sample_gibbs(BayesianPPCA(3, 1, **priors), x)


def test_models_that_do_not_fit_the_data_are_refused():
    x = np.random.default_rng(0).normal(size=(20, 3))
    with pytest.raises(ValueError, match="x must have 4 columns, as the model has; it has 3"):
        sample_gibbs(BayesianPPCA(4, 1), x)
    with pytest.raises(ValueError, match="latent_dim must be smaller than data_dim, 3"):
        sample_gibbs(BayesianPPCA(3, 3), x)
    with pytest.raises(ValueError, match=r"columns with nothing observed: \[1\]"):
        sample_gibbs(BayesianPPCA(3, 1), np.where([True, False, True], x, np.nan))


def notes(model, x):
    samples = sample_gibbs(
        model, x, settings=ChainSettings(num_samples=4, warmup=0, seed=0, progress=False)
    )
    assert all(value.isfinite().all() for value in samples.draws.values())
    return " ".join(samples.notes)


def test_caveats_are_noted():
    x = np.random.default_rng(0).normal(size=(20, 4))
    assert notes(BayesianPPCA(4, 1), x) == ""
    assert "not smaller than the rank of the centred data" in notes(BayesianPPCA(4, 3), x[:3])
    constant = np.where([True, True, True, False], x, 2.0)
    for noise in ("isotropic", "diagonal"):
        assert "constant columns: 3" in notes(BayesianPPCA(4, 1, noise=noise), constant)


def test_priors_in_other_units_than_the_data_are_noted():
    x = np.random.default_rng(0).normal(size=(20, 4))
    large = notes(BayesianPPCA(4, 1), 1e4 * x)
    assert "loadings_prior contradicts the units of the data" in large
    assert "noise_prior contradicts the units of the data" in large
    assert "loc_prior contradicts" in notes(BayesianPPCA(4, 1), x + 1e4)
    narrow = x * [1, 1, 1, 1e-4]  # a column that varies little, of the same unit as the others
    assert notes(BayesianPPCA(4, 1), narrow) == ""
    assert "in column 3 its scale" in notes(BayesianPPCA(4, 1, noise="diagonal"), narrow)
    assert notes(BayesianPPCA.like(1e4 * x + 1e6, 1), 1e4 * x + 1e6) == ""


def judged_data(name):
    from sklearn.datasets import load_iris, load_wine
    from sklearn.preprocessing import scale

    if name == "a million rows":
        rng = np.random.default_rng(0)
        z, loadings = rng.normal(size=(1_000_000, 5)), rng.normal(size=(5, 20))
        return z @ loadings + 0.5 * rng.normal(size=(1_000_000, 20)), 5
    return (load_iris().data, 2) if name == "iris" else (scale(load_wine().data), 3)


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["normal", "ard"])
@pytest.mark.parametrize(
    ("name", "missing"),
    [("iris", 0.0), ("iris", 0.1), ("wine", 0.0), ("wine", 0.1), ("a million rows", 0.0)],
)
def test_chains_mix(name, missing, prior):
    x, latent_dim = judged_data(name)
    x = oracles.with_missing_values(x, missing, 0) if missing else x
    model = BayesianPPCA.like(x, latent_dim, prior=prior)
    samples = sample_gibbs(
        model, x, settings=ChainSettings(num_samples=2000, seed=0, progress=False)
    )
    found = samples.diagnostics(max_elements=None)
    assert float(found.r_hat.max()) < 1.005
    assert float(torch.minimum(found.ess_bulk, found.ess_tail).min()) > 1000
