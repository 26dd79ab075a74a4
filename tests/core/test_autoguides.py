"""Pyro's automatic guides: those with one q per datum are right in batches; others refused."""

import functools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import block_autoregressive, iterated
from pyro.infer import Trace_ELBO, autoguide
from pyro.infer.autoguide import initialization
from torch.optim.lr_scheduler import CosineAnnealingLR

import oracles
from ppl_vae.core.autoguides import RowCheck, plate_of_rows
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.guides.guides import PerDatumGuide
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.inference.svi.steps.captured_svi import CapturedSVI
from ppl_vae.models.ppca import PPCA
from ppl_vae.objectives.bounds import ELBO, elbo, log_weights

N, D, K = 30, 5, 2
NOISE = 0.8


@pytest.fixture
def x():
    return torch.as_tensor(oracles.simulate_ppca((9.0, 4.0), 1.0, N, D, seed=0))


@pytest.fixture
def ppca(x):
    """Held, with loadings that are not on principal axes, so that a diagonal q has its price."""
    loadings = np.random.default_rng(1).normal(size=(D, K))
    loadings[:, 1] += loadings[:, 0]
    model = PPCA.from_parameters(torch.as_tensor(loadings), x.mean(0), NOISE)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def optima(ppca, x):
    """log p, the best diagonal q's ELBO, and log p(x, z) at its mode in z, per datum."""
    W, mu = ppca.loadings.numpy(), ppca.loc.numpy()
    log_p = oracles.log_density(x.numpy(), mu, W, NOISE**2)
    log_det = np.linalg.slogdet(W.T @ W / NOISE**2 + np.eye(K))[1]
    # p(x, z) = p(x) p(z | x), and the posterior's density at its mean.
    mode = log_p + 0.5 * (log_det - K * np.log(2 * np.pi))
    return log_p, log_p - oracles.best_q_gap(W, NOISE**2, "diagonal"), mode


RIGHT = {
    "normal": (lambda m: autoguide.AutoNormal(m, create_plates=plate_of_rows), "diagonal"),
    "delta": (lambda m: autoguide.AutoDelta(m, create_plates=plate_of_rows), "mode"),
    "messenger": (autoguide.AutoNormalMessenger, "diagonal"),
    "hierarchical": (autoguide.AutoHierarchicalNormalMessenger, "diagonal"),
    "regressive": (autoguide.AutoRegressiveMessenger, "diagonal"),
    "list": (lambda m: listed(m, create_plates=plate_of_rows), "diagonal"),
}
WHOLE_ONLY = {
    "normal, no plates": (autoguide.AutoNormal, "diagonal"),
    "delta, no plates": (autoguide.AutoDelta, "mode"),
    "list, no plates": (lambda m: listed(m), "diagonal"),
    "structured delta": (lambda m: autoguide.AutoStructured(m, conditionals="delta"), "mode"),
}


def listed(model, **options):
    guides = autoguide.AutoGuideList(model, **options)
    guides.append(autoguide.AutoNormal(model))
    return guides


def trained(ppca, guide, x, batch_size, **options):
    steps = 250 if batch_size is None else 450
    options = {"lr": 0.1, "scheduler": CosineAnnealingLR, "capture": False, "seed": 0} | options
    options = {"objective": ELBO(10)} | options
    return fit_svi(ppca.model, guide, x, steps=steps, batch_size=batch_size, **options)


def assert_known_optimum(kind, ppca, guide, x):
    """ELBO per datum within 0.02 of the optimum, which is known, and never above it; read at once
    and in batches alike.
    """
    log_p, diagonal, mode = optima(ppca, x)
    best = {"diagonal": diagonal, "mode": mode}[kind]
    found = elbo(ppca.model, guide, x, num_samples=300, seed=0).numpy()
    error = log_weights(ppca.model, guide, x, 300, seed=0).std(0).mean().item() / (300 * N) ** 0.5
    assert best.mean() - 0.02 < found.mean() < best.mean() + oracles.z_limit() * error + 1e-9
    assert np.abs(found - best).max() < 0.5
    if kind == "diagonal":
        value = log_likelihood(ppca.model, guide, x, 500, seed=0).value.numpy()
        assert np.abs(value - log_p).mean() < 0.1


def some(names, at_once):
    """The others are slow."""
    marks = {name: () if name in at_once else pytest.mark.slow for name in names}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


@pytest.mark.parametrize("name", some(RIGHT | WHOLE_ONLY, ("messenger",)))
def test_on_all_rows_they_reach_the_known_optimum(name, ppca, x):
    make, kind = (RIGHT | WHOLE_ONLY)[name]
    guide = make(ppca.model)
    trained(ppca, guide, x, None)
    assert_known_optimum(kind, ppca, guide, x)


@pytest.mark.parametrize("name", some(RIGHT, ("normal",)))
def test_in_batches_they_reach_the_known_optimum(name, ppca, x):
    make, kind = RIGHT[name]
    guide = make(ppca.model)
    trained(ppca, guide, x, 10)
    assert_known_optimum(kind, ppca, guide, x)
    values = elbo(ppca.model, guide, x, num_samples=300, batch_size=7, seed=0)
    whole = elbo(ppca.model, guide, x, num_samples=300, seed=0)
    torch.testing.assert_close(values, whole, atol=0.3, rtol=0)


@pytest.mark.parametrize("name", WHOLE_ONLY)
@pytest.mark.parametrize("objective", [None, Trace_ELBO()], ids=["ours", "Pyro's"])
def test_in_batches_others_are_refused(name, objective, ppca, x):
    guide = WHOLE_ONLY[name][0](ppca.model)
    kind = type(guide).__name__
    match = f"{kind} (without create_plates subsamples rows of its own|cannot be used in batches)"
    with pytest.raises(ValueError, match=match) as refused:
        trained(ppca, guide, x, 10, objective=objective)
    assert "create_plates=ppl_vae.core.autoguides.plate_of_rows" in str(refused.value)
    with pytest.raises(ValueError, match=match):
        index = torch.arange(3, 13)
        log_weights(ppca.model, guide, x[index], 2, index=index, num_data=N)


def test_an_evaluation_in_batches_is_refused_too(ppca, x):
    guide = autoguide.AutoNormal(ppca.model)
    guide(x)
    with pytest.raises(
        ValueError, match="AutoNormal without create_plates subsamples rows of its own"
    ):
        elbo(ppca.model, guide, x, batch_size=7)


JOINT = {
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoIAFNormal": lambda m: autoguide.AutoIAFNormal(m, hidden_dim=[70]),
    "AutoNormalizingFlow": lambda m: autoguide.AutoNormalizingFlow(
        m, functools.partial(iterated, 1, block_autoregressive)
    ),
    "AutoLaplaceApproximation": autoguide.AutoLaplaceApproximation,
    "AutoGaussianDense": autoguide.AutoGaussian,
    "AutoStructured": autoguide.AutoStructured,
}


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("start", ["init_to_median", "init_to_sample", "init_to_feasible"])
def test_one_site_for_all_data_is_refused(name, start, ppca, x):
    make = JOINT[name]
    if name in ("AutoDiagonalNormal", "AutoMultivariateNormal"):
        make = functools.partial(make, init_loc_fn=getattr(initialization, start))
    elif start != "init_to_median":
        pytest.skip("other starts are tried with two of them")
    match = (
        f"{name} draws the latent variables of all data as one site.*AutoNormal.model.*PerDatum"
    )
    for use in (
        lambda guide: trained(ppca, guide, x, None),
        lambda guide: log_weights(ppca.model, guide, x, 3),
        lambda guide: elbo(ppca.model, guide, x),
        lambda guide: log_likelihood(ppca.model, guide, x, 50),
        lambda guide: ELBO().loss(ppca.model, guide, x),
    ):
        with pytest.raises(ValueError, match=match):
            use(make(ppca.model))
    with pytest.raises(ValueError, match=f"{name} cannot be used in batches"):
        trained(ppca, make(ppca.model), x, 10, objective=Trace_ELBO())


def test_a_joint_guide_trains_on_all_rows_with_the_objective_of_pyro(ppca, x):
    guide = autoguide.AutoDiagonalNormal(ppca.model)
    objective = Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    fit = trained(ppca, guide, x, None, objective=objective)
    assert fit.objective[-50:].mean() == pytest.approx(optima(ppca, x)[1].mean(), abs=0.05)


def test_a_model_that_is_not_given_its_rows(x):
    """A tutorial's ``model(x)``: what AutoNormal holds are the rows of one batch."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    for make in (autoguide.AutoNormal, autoguide.AutoNormalMessenger):
        match = f"{make.__name__} cannot be used in batches: its model takes no keyword 'index'"
        with pytest.raises(ValueError, match=match):
            fit_svi(model, make(model), x, steps=3, batch_size=10)
        fit_svi(model, make(model), x, steps=3)


def test_a_discrete_guide(x):
    """A guide of a mixture is right on all rows with a score gradient, and refused in batches."""

    def model(x, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            c = pyro.sample("c", dist.Categorical(x.new_tensor([0.3, 0.7])))
            loc = x.new_tensor([-1.0, 1.0])[c].unsqueeze(-1)
            px = dist.Normal(loc.expand(*loc.shape[:-1], D), 2.0)
            pyro.sample("x", px.to_event(1), obs=x)

    def fit(**options):
        guide = autoguide.AutoDiscreteParallel(model)
        options |= {"objective": ELBO(20, gradient="score-loo"), "capture": False, "seed": 0}
        fit_svi(model, guide, x, lr=0.1, scheduler=CosineAnnealingLR, **options)
        return guide

    guide = fit(steps=150)
    densities = dist.Normal(x.new_tensor([-1.0, 1.0]), 2.0).log_prob(x.unsqueeze(-1)).sum(1)
    joint = densities + x.new_tensor([0.3, 0.7]).log()
    found = elbo(model, guide, x, num_samples=500, seed=0).mean()
    assert joint.logsumexp(1).mean() == pytest.approx(float(found), abs=0.02)
    with pytest.raises(ValueError, match="AutoDiscreteParallel cannot be used in batches"):
        fit(steps=5, batch_size=10)


LOOPS = {"normal": autoguide.AutoNormal, "messenger": autoguide.AutoNormalMessenger}


def own_loop(model, guide, batches):
    with pyro.get_param_store().scope():
        optimizer = pyro.optim.Adam({"lr": 0.01})
        svi = CapturedSVI(model, guide, optimizer, Trace_ELBO(), compiled=False)
        for args, kwargs in batches:
            svi.step(*args, **kwargs)
    return svi.execution


@pytest.mark.parametrize("name", LOOPS)
def test_batches_without_an_index_are_refused_in_own_loops(x, name):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    make = LOOPS[name]
    match = f"{make.__name__} has one q per row of the first step, and this step is called with"
    with pytest.raises(ValueError, match=match):
        own_loop(model, make(model), [((x[:10],), {}), ((x[10:20],), {})])
    x = x.clone()
    x[0] = torch.nan  # missing values do not make the same rows others
    assert RowCheck(make(model))((x,), {}) is None
    assert own_loop(model, make(model), 3 * [((x.nan_to_num(),), {})]) == "recorded"


def test_batches_with_an_index_run_in_own_loops(ppca, x):
    rows = torch.arange(30).split(10)
    batches = [((x[part],), {"index": part, "num_data": 30}) for part in rows]
    guide = autoguide.AutoNormal(ppca.model, create_plates=plate_of_rows)
    with pytest.warns(UserWarning, match="could not be captured"):  # rows differ in their steps
        assert own_loop(ppca.model, guide, batches).startswith("eager: ")
    with pytest.raises(ValueError, match="AutoNormal without create_plates subsamples rows"):
        own_loop(ppca.model, autoguide.AutoNormal(ppca.model), batches)


def test_new_data_are_refused(ppca, x):
    guide = autoguide.AutoNormal(ppca.model, create_plates=plate_of_rows)
    guide(x)
    match = "AutoNormal has one q per datum for the 30 rows of its first run, and this run has"
    with pytest.raises(ValueError, match=match):
        elbo(ppca.model, guide, x[:9])
    for make in (autoguide.AutoNormal, autoguide.AutoDelta, autoguide.AutoNormalMessenger):
        with pytest.raises(
            ValueError, match=f"x_val needs .* {make.__name__} has one q per datum"
        ):
            fit_svi(ppca.model, make(ppca.model), x, x_val=x, steps=2)


def test_missing_values_and_a_named_dim(ppca, x):
    plates = functools.partial(plate_of_rows, dim=-1)
    guide = autoguide.AutoNormal(ppca.model, create_plates=plates)
    x = x.clone()
    x[::3, 0] = torch.nan
    trained(ppca, guide, x, 10)
    found = elbo(ppca.model, guide, x, num_samples=300, seed=0).mean()
    exact = ppca.log_likelihood(x).mean()
    assert exact - 0.5 < found < exact


# Hand-written guides in batches


def pair_of(read, plate=None):
    """A model with one parameter, and a guide whose means are ``read(number of rows, index)``."""

    def model(x, index=None, num_data=None):
        W = pyro.param("W", torch.eye(K, D, dtype=torch.float64))
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W, 1.0).to_event(1), obs=x)

    def guide(x, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        whole = num_data or len(x)
        if plate == "own":
            made = pyro.plate("data", whole, subsample_size=len(x))
        else:
            made = pyro.plate("data", whole, subsample=rows)
        with made as drawn:
            loc = read(x, drawn if plate == "own" else rows)
            pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    return model, guide


def table(rows, width=K):
    shape = (rows, width) if width else (rows,)
    return pyro.param("loc", torch.zeros(shape, dtype=torch.float64))


BY_PLACE = {
    "the first rows": lambda x, rows: table(N)[: len(x)],
    "the last rows": lambda x, rows: table(N)[-len(x) :],
    "as many as a batch": lambda x, rows: table(len(x)),
    "in one vector": lambda x, rows: table(N * K, 0).reshape(N, K)[: len(x)],
    "more than data": lambda x, rows: table(99)[: len(x)],
    "by place in disguise": lambda x, rows: table(N)[torch.arange(len(x)).flip(0)],
}
BY_INDEX = {
    "looked up": lambda x, rows: table(N)[rows],
    "looked up in one vector": lambda x, rows: table(N * K, 0).reshape(N, K)[rows],
    "shared": lambda x, rows: table(K, 0).expand(len(x), K),
    "amortized": lambda x, rows: x @ table(D),
    "by group": lambda x, rows: table(3)[(x[:, 0] > 0).long() + (x[:, 1] > 0)],
}


@pytest.mark.parametrize("batch_size", [2, 3, 10, 28])
def test_parameters_of_places_in_a_batch_are_refused(batch_size, x):
    for read in BY_PLACE.values():
        pyro.clear_param_store()
        with pytest.raises(
            ValueError, match="parameter 'loc' has entries for each position in a bat"
        ):
            fit_svi(*pair_of(read), x, steps=2, batch_size=batch_size)
    for read in BY_INDEX.values():
        pyro.clear_param_store()
        fit_svi(*pair_of(read), x, steps=2, batch_size=batch_size, capture=False)
    pyro.clear_param_store()
    fit_svi(*pair_of(BY_PLACE["the first rows"]), x, steps=2, capture=False)
    pyro.clear_param_store()


def test_a_plate_that_draws_rows_of_its_own(x):
    pyro.clear_param_store()
    with pytest.raises(
        ValueError, match="parameter 'loc' has entries for each datum, but different"
    ):
        fit_svi(*pair_of(BY_INDEX["looked up"], "own"), x, steps=2, batch_size=10)
    pyro.clear_param_store()
    fit_svi(*pair_of(BY_INDEX["amortized"], "own"), x, steps=2, batch_size=10, capture=False)
    pyro.clear_param_store()


def test_a_table_of_all_rows_in_a_batch_names_the_index(x):
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="Shape mismatch inside plate") as refused:
        fit_svi(*pair_of(lambda x, rows: table(N)), x, steps=2, batch_size=10)
    assert "read by the keyword index, as loc[index]" in refused.value.__notes__[-1]
    pyro.clear_param_store()


def test_tables_of_ours_are_looked_up(ppca, x):
    guide = PerDatumGuide(N, K).double()
    before = guide.loc.detach().clone()
    fit_svi(ppca.model, guide, x, steps=4, batch_size=10, seed=0)
    assert not (guide.loc == before).all(1).any()  # an epoch has every row once
