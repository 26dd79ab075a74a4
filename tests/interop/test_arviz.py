"""Export to ArviZ: exact for PPCA, correct for any pair, usable, and unchanged by files."""

import ast
import contextlib
import inspect
import math
import warnings
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_stats.base.array import array_stats
from pyro import poutine

import oracles
import ppl_vae
import user_pairs
from ppl_vae import PPCA, VAE, Bernoulli, ExactGuide, PerDatumGuide, log_likelihood, run_lineage
from ppl_vae.core.installed_arviz import installed_arviz
from ppl_vae.core.pair import Pair
from ppl_vae.evaluation.marginal_likelihood import batching
from ppl_vae.evaluation.marginal_likelihood.compare import compare
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood, exact_result
from ppl_vae.evaluation.marginal_likelihood.reliability import k_hat
from ppl_vae.interop import arviz as interop
from ppl_vae.interop.arviz import (
    compare_elpds,
    elpd,
    lineage_to_arviz,
    read_netcdf,
    to_arviz,
    write_netcdf,
)
from ppl_vae.lineage import Lineage
from ppl_vae.lineage.problem import LineageSettings


@contextlib.contextmanager
def without_warnings():
    """Ignore deprecation warnings from within ArviZ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


with without_warnings():
    az = installed_arviz()

matplotlib.use("Agg")
NEW = not hasattr(az, "from_datatree")
GROUPS = {
    "posterior",
    "posterior_predictive",
    "prior_predictive",
    "observed_data",
    "log_likelihood",
    "sample_stats",
}
N, D, K = 24, 5, 2
LOADINGS = np.random.default_rng(0).normal(size=(D, K))
LOC, NOISE = np.arange(D) / 2, 0.7**2


def make_ppca():
    return PPCA.from_parameters(torch.tensor(LOADINGS), torch.tensor(LOC), math.sqrt(NOISE))


def make_x(seed=1):
    covariance = oracles.ppca_covariance(LOADINGS, NOISE)
    return np.random.default_rng(seed).multivariate_normal(LOC, covariance, size=N)


def make_per_datum_guide():
    """One q per datum, each with its own means and scales."""
    guide = PerDatumGuide(N, K).double()
    with torch.no_grad():
        guide.loc.copy_(user_pairs.draw(N, K, seed=2))
        guide.unconstrained_scale.copy_(0.3 * user_pairs.draw(N, K, seed=3) - 1)
    return guide


def groups(data):
    """The datasets by group, for either version of ArviZ."""
    if NEW:
        return {name: node.to_dataset() for name, node in data.children.items()}
    return {name: data[name] for name in data.groups()}


def flat(variable):
    """(S, ...): chains concatenated."""
    return variable.values.reshape(-1, *variable.shape[2:])


def assert_moments(samples, mean, covariance, num_tests):
    """Sample mean and covariance of (S, D) Gaussian draws; Var c_ij = (C_ii C_jj + C_ij^2) / S."""
    limit = oracles.z_limit(num_tests * (len(mean) + len(mean) ** 2))
    variance = np.diag(covariance)
    z = (samples.mean(0) - mean) / np.sqrt(variance / len(samples))
    assert np.abs(z).max() < limit
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / len(samples))
    centred = samples - mean
    assert np.abs((centred.T @ centred / len(samples) - covariance) / error).max() < limit


# All groups of one pair


@pytest.fixture(scope="module")
def exact():
    ppca = make_ppca()
    return to_arviz(ppca.model, ExactGuide(ppca), make_x(), num_samples=4000, rows=[7, 3], seed=0)


def test_groups_dims_and_attributes(exact):
    found = groups(exact)
    assert found.keys() == GROUPS
    each = {"chain": 4, "draw": 1000, "datum": 2}
    assert dict(found["posterior"]["z"].sizes) == each | {"z_dim_0": K}
    assert dict(found["posterior_predictive"]["x"].sizes) == each | {"column": D}
    assert dict(found["prior_predictive"]["x"].sizes) == {"chain": 4, "draw": 1000, "column": D}
    assert dict(found["observed_data"]["x"].sizes) == {"datum": 2, "column": D}
    assert dict(found["log_likelihood"]["x"].sizes) == {"chain": 1, "draw": 1, "datum": 2}
    assert list(found["sample_stats"]) == ["log_weight", "lp"]
    assert all(dict(v.sizes) == each for v in found["sample_stats"].values())
    for dataset in found.values():
        assert set(dataset.coords) == set(dataset.dims)
        assert dataset.attrs["inference_library"] == "pyro"
        assert dataset.attrs["creation_library"] == "ppl_vae"
    assert exact.attrs["inference_library_version"] == pyro.__version__
    assert found["posterior"]["datum"].values.tolist() == [7, 3]
    assert found["posterior"].attrs["about"].startswith("independent draws of the guide")
    assert found["log_likelihood"].attrs["about"].startswith("marginal")
    assert found["log_likelihood"].attrs["units"] == "nats"
    assert found["log_likelihood"]["x"].attrs["num_reliable"] == 2


def test_draws_have_the_exact_moments(exact):
    found, x = groups(exact), make_x()[[7, 3]]
    means, covariances = oracles.posterior(x, LOC, LOADINGS, NOISE)
    z, again = flat(found["posterior"]["z"]), flat(found["posterior_predictive"]["x"])
    for row in range(2):
        assert_moments(z[:, row], means[row], covariances[row], 5)
        spread = LOADINGS @ covariances[row] @ LOADINGS.T + NOISE * np.eye(D)
        assert_moments(again[:, row], LOADINGS @ means[row] + LOC, spread, 5)
    marginal = oracles.ppca_covariance(LOADINGS, NOISE)
    assert_moments(flat(found["prior_predictive"]["x"]), LOC, marginal, 5)


def test_chains_are_independent(exact):
    z = groups(exact)["posterior"]["z"].values
    assert all(np.isin(z[0], z[k]).sum() == 0 for k in (1, 2, 3))
    with without_warnings():
        assert float(az.rhat(exact)["z"].max()) < 1.02


def test_densities_are_exact(exact):
    found, x = groups(exact), make_x()[[7, 3]]
    log_p = oracles.log_density(x, LOC, LOADINGS, NOISE)
    assert np.abs(found["sample_stats"]["log_weight"] - log_p).max() < 1e-6
    assert np.abs(found["log_likelihood"]["x"] - log_p).max() < 1e-6
    z = flat(found["posterior"]["z"])
    given = torch.distributions.Normal(torch.tensor(z @ LOADINGS.T + LOC), math.sqrt(NOISE))
    prior = torch.distributions.Normal(0.0, 1.0)
    lp = given.log_prob(torch.tensor(x)).sum(-1) + prior.log_prob(torch.tensor(z)).sum(-1)
    np.testing.assert_allclose(flat(found["sample_stats"]["lp"]), lp, atol=1e-9)


def test_a_per_datum_guide_finds_rows_by_position():
    ppca, guide, rows = make_ppca(), make_per_datum_guide(), torch.tensor([20, 4, 11])
    found = groups(to_arviz(ppca.model, guide, make_x(), num_samples=4000, rows=rows, seed=0))
    z = flat(found["posterior"]["z"])
    q = guide.distribution(make_x()[rows], rows)
    for row in range(3):
        scale = q.base_dist.scale[row].detach().numpy()
        assert_moments(z[:, row], q.mean[row].detach().numpy(), np.diag(scale**2), 3)
    assert np.array_equal(found["observed_data"]["x"], make_x()[rows])


@pytest.mark.parametrize("masked", [False, True])
def test_missing_values_are_nan_in_the_data_and_drawn_in_the_predictive(masked):
    ppca, guide = make_ppca(), make_per_datum_guide()
    x = oracles.with_missing_values(make_x(), 0.3, seed=4)
    missing, mask = np.isnan(x), None
    if masked:
        x, mask = np.where(missing, 99.0, x), ~missing
    row = int(missing.sum(1).argmax())
    data = to_arviz(ppca.model, guide, x, num_samples=4000, mask=mask, rows=[row], seed=0)
    found = groups(data)
    observed = found["observed_data"]["x"].values[0]
    assert np.array_equal(np.isnan(observed), missing[row]) and missing[row].any()
    assert np.array_equal(observed[~missing[row]], x[row][~missing[row]])
    q = guide.distribution(x, torch.arange(N))
    mean, scale = (v[row].detach().numpy() for v in (q.mean, q.base_dist.scale))
    spread = (LOADINGS * scale**2) @ LOADINGS.T + NOISE * np.eye(D)
    again = flat(found["posterior_predictive"]["x"])[:, 0]
    assert_moments(again, LOADINGS @ mean + LOC, spread, 2)
    value = log_likelihood(ppca.model, guide, x, 4000, mask=mask, rows=torch.tensor([row]), seed=0)
    assert found["log_likelihood"]["x"].values.item() == value.value.item()


def test_a_bernoulli_vae():
    vae = VAE.mlp(D, K, hidden=(8,), likelihood=Bernoulli(), seed=0)
    x = make_x() > 0.5
    found = groups(to_arviz(vae.model, vae.guide, x, num_samples=40, seed=0))
    for group in ("posterior_predictive", "prior_predictive"):
        assert set(np.unique(found[group]["x"])) == {0, 1}
    assert np.array_equal(found["observed_data"]["x"], x)
    with pytest.raises(ValueError, match="outside"):
        to_arviz(vae.model, vae.guide, make_x(), num_samples=8, log_likelihood=np.zeros(N))


# External pairs


@pytest.mark.parametrize("name", user_pairs.PAIRS)
def test_external_pairs(name):
    model, guide, x = user_pairs.PAIRS[name]()
    found = groups(to_arviz(model, guide, x, num_samples=6, num_chains=2, seed=0))
    (site,) = found["observed_data"]
    assert list(found["log_likelihood"]) == [site]
    each = {"chain": 2, "draw": 3, "datum": len(x)}
    assert found["posterior_predictive"][site].sizes == each | {"column": x.shape[1]}
    assert found["prior_predictive"][site].dims == ("chain", "draw", "column")
    assert np.array_equal(found["observed_data"][site], x)
    for dataset in found.values():
        for variable in dataset.values():
            assert np.isfinite(variable).all(), variable.name
    assert_joint(model, x, found)


def assert_joint(model, x, found):
    """lp of each draw agrees with ``poutine.trace``, so draws and data are in the right order."""
    owner = getattr(model, "__self__", model)
    if isinstance(owner, torch.nn.Module):
        owner.eval()
    plain = poutine.trace(model).get_trace(x)
    for draw in range(6):
        latent = {
            site: torch.tensor(flat(z)[draw]).reshape(plain.nodes[site]["value"].shape)
            for site, z in found["posterior"].items()
        }
        trace = poutine.trace(poutine.condition(model, data=latent)).get_trace(x)
        lp = flat(found["sample_stats"]["lp"])[draw].sum()
        assert lp == pytest.approx(trace.log_prob_sum().item(), rel=1e-5)


def test_several_sites_plates_and_shapes():
    """Two observed sites with other shapes than x, a scoped name, a factor, a discrete latent."""

    def model(x):
        with pyro.plate("data", len(x)):
            scale = pyro.sample("a/scale", dist.LogNormal(torch.zeros(2), 0.1).to_event(1))
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.factor("weight", torch.zeros(len(x)))
            images = x[:, :4].reshape(-1, 2, 2)
            mean = k[..., None, None].expand(*k.shape, 2, 2)
            pyro.sample("image", dist.Normal(mean, scale[..., None]).to_event(2), obs=images)
            pyro.sample("last", dist.Normal(k, 1.0), obs=x[:, 4])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a/scale", dist.LogNormal(torch.zeros(2), 0.1).to_event(1))
            pyro.sample("k", dist.Bernoulli(0.5))

    x = user_pairs.draw(N, D, seed=1)
    found = groups(to_arviz(model, guide, x, num_samples=8, seed=0))
    assert set(found["posterior"]) == {"a.scale", "k"}
    assert found["posterior"]["a.scale"].dims == ("chain", "draw", "datum", "a.scale_dim_0")
    assert found["posterior"]["k"].dims == ("chain", "draw", "datum")
    observed = found["observed_data"]
    assert observed["image"].dims == ("datum", "image_dim_0", "image_dim_1")
    assert observed["last"].dims == ("datum",)
    assert np.array_equal(observed["image"].values.reshape(N, 4), x[:, :4])
    assert set(found["posterior_predictive"]) == {"image", "last"}
    assert list(found["log_likelihood"]) == ["log_p"]
    with pytest.raises(ValueError, match="takes no keyword 'mask'"):
        to_arviz(model, guide, x.where(x < 2, torch.nan), num_samples=8)

    def with_mask(x, mask=None):
        model(x)

    with pytest.raises(ValueError, match=r"'image' has shape \(2, 2\) per datum where x has 5"):
        to_arviz(with_mask, guide, x.where(x < 1, torch.nan), num_samples=8)


def test_results_are_reproducible_and_global_state_is_unchanged():
    model, guide, x = user_pairs.regularized()
    module = model.__self__
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    buffers = [b.clone() for b in module.buffers()]
    first, again, other = (
        to_arviz(model, guide, x, num_samples=8, seed=seed) for seed in (3, 3, 4)
    )
    for name, dataset in groups(first).items():
        assert dataset.identical(groups(again)[name])
    assert not groups(first)["posterior"].equals(groups(other)["posterior"])
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert all(part.training for part in module.modules())
    assert all(torch.equal(a, b) for a, b in zip(buffers, module.buffers(), strict=True))
    assert (
        not groups(first)["posterior"]["z"].values.flags["W"] or len(pyro.get_param_store()) == 0
    )


@pytest.mark.parametrize("name", ["functions", "naive_conv"])
def test_blocks_limit_memory_and_change_no_results(name, monkeypatch):
    model, guide, x = user_pairs.PAIRS[name]()
    monkeypatch.setattr(batching, "ROWS_AT_ONCE", dict.fromkeys(batching.ROWS_AT_ONCE, 30))
    at_once = []

    run = Pair.run

    def recorded(pair, batch, *, num_samples=1, dim=None):
        if num_samples == 1 or pair._sample_dim:  # not in the search for this dimension
            at_once.append(len(batch) * num_samples)
        return run(pair, batch, num_samples=num_samples, dim=dim)

    monkeypatch.setattr(Pair, "run", recorded)
    found = groups(to_arviz(model, guide, x, num_samples=6, num_chains=2, seed=0))
    assert max(at_once) <= 30 and len(at_once) > 6
    assert np.array_equal(found["observed_data"]["x"], x)
    assert_joint(model, x, found)
    monkeypatch.setattr(batching, "ROWS_AT_ONCE", dict.fromkeys(batching.ROWS_AT_ONCE, 10))
    if name == "functions":  # whose programs take the index of their rows
        found = groups(to_arviz(model, guide, x, num_samples=6, num_chains=2, seed=0))
        assert np.array_equal(found["observed_data"]["x"], x)
        assert_joint(model, x, found)


# Given names and log-likelihoods


def test_names_of_rows_and_columns():
    ppca, names = make_ppca(), list("vwxyz")
    frame = pd.DataFrame(make_x(), columns=names, index=[f"row {n}" for n in range(N)])
    pair = ppca.model, ExactGuide(ppca)
    export = partial(to_arviz, *pair, frame, num_samples=8, rows=np.array([5, 2]), seed=0)
    found = export()
    for dataset in groups(found).values():
        if "datum" in dataset.dims:
            assert dataset["datum"].values.tolist() == ["row 5", "row 2"]
        if "column" in dataset.dims:
            assert dataset["column"].values.tolist() == names
    row_names = range(100, 100 + N)
    other = export(columns=range(D), row_names=row_names)
    assert groups(other)["observed_data"]["datum"].values.tolist() == [105, 102]
    assert groups(other)["observed_data"]["column"].values.tolist() == [0, 1, 2, 3, 4]


def test_a_given_log_likelihood_is_exported():
    ppca, x = make_ppca(), make_x()
    export = partial(to_arviz, ppca.model, ExactGuide(ppca), x, num_samples=8, seed=0)
    values = np.linspace(-3, -1, N)
    found = groups(export(log_likelihood=values))["log_likelihood"]["x"]
    assert np.array_equal(found.values[0, 0], values)
    assert found.attrs["method"] == "exact" and found.attrs["num_reliable"] == N
    series = pd.Series(values, index=range(100, 100 + N))
    assert found.equals(groups(export(log_likelihood=series))["log_likelihood"]["x"])
    estimate = log_likelihood(ppca.model, make_per_datum_guide(), x, 100, seed=0)
    found = groups(export(log_likelihood=estimate))["log_likelihood"]["x"]
    assert np.array_equal(found.values[0, 0], estimate.value)
    assert found.attrs["num_reliable"] == int(estimate.reliable.sum())
    assert found.attrs["num_samples"] == 100 and found.attrs["method"] == "importance"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 10}, "multiple of num_chains; got 10 and 4"),
        ({"num_samples": 0}, "num_samples must be a whole number >= 1"),
        ({"num_chains": 0}, "num_chains must be a whole number >= 1"),
        ({"rows": [0, 24]}, r"rows must lie in 0..23; they range from 0 to 24"),
        ({"rows": [-1]}, "rows must lie in"),
        ({"rows": []}, "rows must be a list of row indices"),
        ({"rows": [0.5]}, "rows must be a list of row indices"),
        ({"columns": ["a"]}, "columns must hold 5 names; it holds 1"),
        ({"row_names": ["a"]}, "row_names must hold 24 names; it holds 1"),
        ({"log_likelihood": [1.0], "rows": [1, 2]}, r"one value for each of the 2 rows.*\(1,\)"),
        ({"x": np.full((2, D), np.nan)}, "rows with nothing observed"),
    ],
)
def test_bad_arguments(arguments, message):
    ppca = make_ppca()
    with pytest.raises(ValueError, match=message):
        to_arviz(ppca.model, ExactGuide(ppca), **({"x": make_x(), "num_samples": 8} | arguments))


def test_a_model_that_observes_nothing():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))

    with pytest.raises(ValueError, match="the model observes nothing"):
        to_arviz(model, model, make_x(), num_samples=8)


# Functions of ArviZ


def test_arviz_summarizes_and_plots(exact):
    with without_warnings():
        summary = az.summary(exact)
        assert len(summary) == 2 * K
        plot = az.plot_dist if NEW else az.plot_posterior
        assert plot(exact, var_names=["z"]) is not None
        if NEW:
            az.plot_ppc_dist(exact, num_samples=5)
        else:
            az.plot_ppc(exact, num_pp_samples=5)
    matplotlib.pyplot.close("all")


def compared(elpds):
    exact = {"round_to": "none"} if "round_to" in inspect.signature(az.compare).parameters else {}
    with without_warnings():
        table = az.compare(elpds, **exact)
        assert az.plot_compare(table) is not None
    matplotlib.pyplot.close("all")
    return table.rename(columns={"elpd_loo": "elpd"})


@pytest.mark.parametrize("source", ["each", "comparison"])
def test_arviz_compares(source):
    rng = np.random.default_rng(0)
    common = 3 * rng.normal(size=150)
    values = {name: common + rng.normal(size=150) - k for k, name in enumerate("abc")}
    ours = compare(values)
    if source == "each":
        table = compared({name: elpd(value) for name, value in values.items()})
    else:
        table = compared(compare_elpds(ours))
    assert tuple(table.index) == ours.names
    np.testing.assert_allclose(table["elpd"], 150 * ours.mean)
    np.testing.assert_allclose(table["elpd_diff"].abs(), -150 * ours.difference)
    # ArviZ's standard errors are those of a sum, with N in place of N - 1.
    scale = 150 * math.sqrt(149 / 150)
    np.testing.assert_allclose(table["se"], scale * ours.error)
    np.testing.assert_allclose(table["dse"], scale * ours.difference_error)
    assert table["p" if NEW else "p_loo"].isna().all()
    assert table["weight"].sum() == pytest.approx(1)


def test_elpd_marks_unreliable_estimates():
    value = torch.linspace(-3, -1, 30, dtype=torch.float64)
    good = torch.arange(30) > 3
    k_hat = torch.where(good, 0.1, 0.9).double()
    k_hat[0] = torch.nan
    limit = torch.full_like(value, 0.6)
    fields = value, value, value, k_hat, good, 1000, "importance", 0
    estimate = LogLikelihood(*fields, tail_index=k_hat, limit=limit)
    found = elpd(estimate)
    assert found["warning"] and not elpd(value)["warning"]
    assert found["n_samples"] == 1000 and found["n_data_points"] == 30
    assert (np.asarray(found["pareto_k"]) > found["good_k"]).sum() == 4
    assert found["good_k"] == pytest.approx(0.6)
    assert "-60.00" in repr(found) and "There has been a warning" in repr(found)
    assert "-60.00" in repr(elpd(exact_result(value)))
    shares = compare({"sure": value, "unsure": estimate})
    assert {k: v["warning"] for k, v in compare_elpds(shares).items()} == {
        "sure": False,
        "unsure": True,
    }
    compared({"sure": elpd(value), "unsure": found})
    with pytest.raises(ValueError, match="NaN or infinite for 1 of 2"):
        elpd([1.0, math.nan])


# Files


def assert_identical(ours, theirs):
    assert ours.attrs == theirs.attrs and type(ours) is type(theirs)
    ours, theirs = groups(ours), groups(theirs)
    assert ours.keys() == theirs.keys()
    for name, dataset in ours.items():
        assert dataset.identical(theirs[name]), name
        for variable in dataset.variables:
            assert dataset[variable].dtype == theirs[name][variable].dtype, (name, variable)


def test_files_preserve_the_data(tmp_path):
    ppca, x = make_ppca(), oracles.with_missing_values(make_x(), 0.3, seed=4)
    data = to_arviz(
        ppca.model,
        make_per_datum_guide(),
        x,
        num_samples=8,
        columns=["ä", "b c", "d", "", "e"],
        row_names=[f"r{n}" for n in range(N)],
        seed=0,
    )
    path = tmp_path / "deep" / "data.nc"
    for _ in range(2):  # the second time over the first
        write_netcdf(data, path)
    again = read_netcdf(path)
    assert_identical(again, data)
    assert np.isnan(groups(again)["observed_data"]["x"]).any()
    write_netcdf(again, tmp_path / "copy.nc")
    assert_identical(read_netcdf(tmp_path / "copy.nc"), data)
    theirs = az.from_netcdf(path)
    assert theirs["posterior"]["z"].equals(data["posterior"]["z"])
    theirs.close()
    assert [p.name for p in path.parent.iterdir()] == ["data.nc"]


def test_a_failed_write_leaves_the_file_unchanged(tmp_path):
    class Broken:
        def to_netcdf(self, path, engine):
            with open(path, "w") as file:
                file.write("half")
            raise OSError("disk full")

    path = tmp_path / "data.nc"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"):
        write_netcdf(Broken(), path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError):
        read_netcdf(tmp_path / "none.nc")
    with pytest.raises(OSError):
        read_netcdf(path)


# The lineage


@pytest.fixture(scope="module")
def lineage():
    x = 0.2 * oracles.simulate_ppca((16, 8), 1, 200, 6, seed=0) + 1
    ppca = PPCA.like(x, K, seed=0)
    model, guide, _ = user_pairs.two_level()
    extra = {"mine": (model, guide), "a ppca": (ppca.model, ExactGuide(ppca))}
    return run_lineage(
        x,
        latent_dim=K,
        stages=["px-em", "per-datum-svi", "linear-amortized", "vae"],
        extra=extra,
        columns=list("abcdef"),
        settings=LineageSettings(
            steps=25, batch_size=64, lr=2e-2, patience=3, num_samples=100, refine=15
        ),
        seed=1,
    )


DRAWN = ("px-em", "linear-amortized", "vae", "a ppca")


def test_a_lineage_has_one_variable_per_stage(lineage):
    data = lineage_to_arviz(lineage)
    found = groups(data)
    assert found.keys() == GROUPS
    assert set(found["posterior"]) == {*DRAWN, "mine z1", "mine z2"}
    for group in ("posterior_predictive", "prior_predictive", "observed_data"):
        assert set(found[group]) == {*DRAWN, "mine"}
    names = {f"{stat} {stage}" for stat in ("lp", "log_weight") for stage in (*DRAWN, "mine")}
    assert set(found["sample_stats"]) == names
    assert set(found["log_likelihood"]) == {*DRAWN, "mine", "per-datum-svi"}
    assert data.attrs["left_out"].startswith("per-datum-svi: no draws")
    rows = lineage.data.test_rows
    assert np.array_equal(found["posterior"]["datum"], rows[:8])
    assert np.array_equal(found["log_likelihood"]["datum"], rows)
    assert found["observed_data"]["column"].values.tolist() == list("abcdef")
    assert found["posterior"]["vae"].dims == ("chain", "draw", "datum", "vae_dim_0")
    assert dict(found["posterior"].sizes)["chain"] == 4 and found["posterior"].sizes["draw"] == 100
    for dataset in found.values():
        for variable in dataset.values():
            assert np.isfinite(variable).all()
    for stage, values in found["observed_data"].items():
        np.testing.assert_allclose(values, lineage.data.test[:8], rtol=1e-5, err_msg=stage)


def test_a_lineage_is_in_the_units_of_the_data(lineage):
    found = groups(lineage_to_arviz(lineage, num_samples=2000))
    log_p, stats = found["log_likelihood"], found["sample_stats"]
    for row in lineage.rows:
        assert np.array_equal(log_p[row.stage].values[0, 0], row.held_out.value)
        assert log_p[row.stage].attrs["num_reliable"] == int(row.held_out.reliable.sum())
    test = lineage.data.test[:8]
    for stage in ("px-em", "a ppca"):  # with an exact guide
        value = log_p[stage].values[0, 0, :8]
        assert np.abs(stats[f"log_weight {stage}"] - value).max() < 1e-5, stage
    # The mean weight of other stages estimates the same density; the units change it by 5 nats.
    for stage in ("linear-amortized", "vae"):
        weights = torch.tensor(flat(stats[f"log_weight {stage}"]))
        estimate = (torch.logsumexp(weights, 0) - math.log(2000)).numpy()
        assert np.abs(estimate - log_p[stage].values[0, 0, :8]).max() < 1, stage
    ppca, units = lineage.pairs["px-em"][0].__self__, lineage.units
    inside = ppca.marginal()
    mean = (inside.mean * units.scale + units.loc).detach().numpy()
    covariance = (inside.covariance_matrix * units.scale**2).detach().numpy()
    assert_moments(flat(found["prior_predictive"]["px-em"]), mean, covariance, 9)
    z = torch.tensor(flat(found["posterior"]["px-em"]))
    sd = (ppca.noise_scale * units.scale).detach()
    centre = (z @ ppca.loadings.mT * units.scale).detach() + torch.tensor(mean)
    given = torch.distributions.Normal(centre, sd)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    lp = given.log_prob(test).sum(-1) + prior
    np.testing.assert_allclose(flat(stats["lp px-em"]), lp, atol=1e-8)
    q = ppca.posterior(units.apply(test))
    w = (ppca.loadings * units.scale).detach().numpy()
    for row in range(8):
        centre = w @ q.mean[row].detach().numpy() + mean
        spread = w @ q.covariance_matrix[row].detach().numpy() @ w.T
        spread = spread + np.eye(6) * float(sd) ** 2
        again = flat(found["posterior_predictive"]["px-em"])[:, row]
        assert_moments(again, centre, spread, 9)


@pytest.mark.parametrize(
    ("largest", "num_data", "num_draws"), [(20_000, 1, 100), (90_000, 7, 100), (500, 1, 4)]
)
def test_the_size_of_a_lineage_is_limited(lineage, monkeypatch, largest, num_data, num_draws):
    monkeypatch.setattr(interop, "MAX_GROUP_SIZE", largest)
    found = groups(lineage_to_arviz(lineage))
    for name in GROUPS - {"log_likelihood", "observed_data"}:
        assert sum(v.size for v in found[name].values()) <= largest, name
    assert found["posterior"].sizes["datum"] == num_data
    assert found["posterior"].sizes["draw"] == num_draws
    assert found["log_likelihood"].sizes["datum"] == len(lineage.data.test)


def test_a_lineage_is_reproducible_and_preserved_by_files(lineage, tmp_path):
    before = torch.get_rng_state()
    data = lineage_to_arviz(lineage, num_data=2, num_samples=8)
    assert torch.equal(before, torch.get_rng_state())
    assert_identical(lineage_to_arviz(lineage, num_data=2, num_samples=8), data)
    write_netcdf(data, tmp_path / "lineage.nc")
    assert_identical(read_netcdf(tmp_path / "lineage.nc"), data)
    with without_warnings():
        assert len(az.summary(data, var_names=["vae", "mine z1"])) == 2 * (K + 3)


def test_a_lineage_without_pairs_is_rejected(lineage):
    with pytest.raises(ValueError, match="no pairs to draw from"):
        lineage_to_arviz(Lineage.from_dict(lineage.to_dict()))
    with pytest.raises(ValueError, match="multiple of num_chains; got 10 and 4"):
        lineage_to_arviz(lineage, num_samples=10)
    with pytest.raises(ValueError, match="num_data must be a whole number"):
        lineage_to_arviz(lineage, num_data=0)


def test_arviz_is_imported_only_when_it_is_used():
    """The import takes seconds, which ``import ppl_vae`` must not."""
    for path in Path(ppl_vae.__file__).parent.rglob("*.py"):
        at_import = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import)]
        assert all(name.name != "arviz" for node in at_import for name in node.names), path


def test_the_two_functions_for_k_hat_take_opposite_signs():
    """A page states them; weights exp(0.7 e) with e exponential have the tail index 0.7."""
    log_weights = 0.7 * np.random.default_rng(0).exponential(size=20_000)
    own = float(k_hat(torch.as_tensor(log_weights)[:, None]))
    # Two standard deviations (1 + k) / sqrt(M), with M = 3 sqrt(S) = 424 weights in the tail.
    assert own == pytest.approx(0.7, abs=0.17)
    assert float(array_stats.psislw(-log_weights)[1]) == pytest.approx(own, abs=1e-6)
    assert float(array_stats.psislw(log_weights)[1]) < 0
    if not NEW:
        assert float(az.psislw(log_weights)[1]) == pytest.approx(own, abs=0.01)
        assert float(az.psislw(-log_weights)[1]) < 0
