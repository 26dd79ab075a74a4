"""Captured steps are the eager ones, bit for bit when recorded; what cannot be says so."""

import functools
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import foreign
import oracles
from ppl_vae import (
    ELBO,
    IWAE,
    PPCA,
    VAE,
    AmortizedGuide,
    Bernoulli,
    ExactGuide,
    Gaussian,
    PerDatumGuide,
    fit_svi,
    mlp,
)
from ppl_vae.capture.functional_optim import functional_optimizer
from ppl_vae.capture.graph import CaptureError
from ppl_vae.core.program import modules_of
from ppl_vae.core.state import isolated_store, mode, seeded, validation
from ppl_vae.guides.families import num_scale_outputs
from ppl_vae.inference.svi import fit as svi
from ppl_vae.inference.svi.capture_policy import CapturePolicy, best_unroll
from ppl_vae.inference.svi.captured_step import CapturedSteps
from ppl_vae.inference.svi.minibatch import MinibatchObjective, WeightedObjective
from ppl_vae.inference.svi.optimizer_step import OptimizerStep
from ppl_vae.inference.svi.parameters import find_parameters
from ppl_vae.inference.svi.schedule import Schedule

N, D, K, B = 48, 8, 3, 12
OPTIMIZERS = {
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "adam, decay": lambda p, lr: torch.optim.Adam(p, lr=lr, weight_decay=0.1, betas=(0.8, 0.99)),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr / 10),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr / 10, momentum=0.9, dampening=0.1),
    "nesterov": lambda p, lr: torch.optim.SGD(p, lr=lr / 10, momentum=0.9, nesterov=True),
}


@pytest.fixture(scope="module")
def grey():
    return torch.from_numpy(oracles.simulate_ppca((16, 8, 4), 1, N, D, seed=0))


def pair_of(guide, likelihood="gaussian"):
    """A pair in float64, the same at every call."""
    if guide in ("zeros", "zeros+mask"):
        vae = VAE.mlp(D, K, hidden=(10,), missing=guide, seed=0).double()
        return vae.model, vae.guide
    if guide == "exact":
        x = torch.from_numpy(oracles.simulate_ppca((16, 8, 4), 1, N, D, seed=0))
        ppca = PPCA.like(x, K, seed=0)
        return ppca.model, ExactGuide(ppca)
    decoder = Gaussian("shared") if likelihood == "gaussian" else Bernoulli()
    shape = {"likelihood": decoder, "data_dim": D, "latent_dim": K}
    if guide == "per-datum":
        q = PerDatumGuide(N, K)
    else:
        encoder = mlp(D, K + num_scale_outputs(guide, K), (10,), seed=1)
        q = AmortizedGuide(encoder, K, covariance=guide)
    vae = VAE(decoder=mlp(K, D, (10,), seed=0), guide=q, **shape).double()
    return vae.model, vae.guide


class Steps:
    """The steps of a fit, eager or captured, from one start and one seed."""

    def __init__(
        self, model, guide, x, objective=None, optimizer="adam", clip=None, warmup=None, mask=None
    ):
        self.pair = model, guide
        weighted = WeightedObjective(objective or ELBO(), warmup)
        self.batch = MinibatchObjective(model, guide, weighted, x, mask)
        rows = torch.arange(B)
        self.named = find_parameters(model, guide, lambda: self.batch.value(rows, 1))
        modules = modules_of(model, guide)
        self.update = OptimizerStep(self.named, modules, 1e-2, OPTIMIZERS[optimizer], clip)
        self.update.use_scheduler(torch.optim.lr_scheduler.CosineAnnealingLR, 200)

    def run(self, rows, captured=None, unroll=1, start=0):
        values = []
        with seeded(start), validation(False):
            for begin in range(0, len(rows), unroll):
                chunk = rows[begin : begin + unroll]
                if captured is not None:
                    values += captured.run_steps(chunk, start + begin).tolist()
                    continue
                for place, some in enumerate(chunk):
                    value = self.batch.value(some, start + begin + place + 1)
                    values.append(float(value.detach()))
                    self.update.apply(value, some)
        return values


def both_ways(make, x, steps=4, unroll=1, *, compiled=False, size=B, **how):
    """Objectives and parameters of eager and of captured steps."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(len(x), generator=generator)[:size] for _ in range(steps)]
    found = []
    for capture in (False, True):
        pyro.clear_param_store()  # bare parameters live there, trained
        with isolated_store():
            with seeded(7):
                model, guide = make()
                run = Steps(model, guide, x, **how)
            with mode(model, guide, training=True):
                values = run.run(rows[:1])
                if capture:
                    options = {"fallback_random": True} if compiled else None
                    fast = CapturedSteps(
                        run.batch,
                        run.update,
                        run.named,
                        unroll,
                        compiled=compiled,
                        options=options,
                    )
                    values += run.run(rows, fast, unroll, start=1)
                else:
                    values += run.run(rows, start=1)
                state = [t.detach().clone() for t in run.update.state]
                found.append((values, state, run.update))
    return found


def agree(found, tolerance=1e-10):
    (eager, ours, update), (captured, theirs, other) = found
    assert max(abs(a - b) for a, b in zip(eager, captured, strict=True)) < tolerance
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) < tolerance
    states = [list(u.optimizer.state.values()) for u in (update, other)]
    assert len(states[0]) == len(states[1])
    for first, second in zip(*states, strict=True):
        assert first.keys() == second.keys()
        for key, value in first.items():
            if isinstance(value, torch.Tensor):
                assert float((value - second[key]).abs().max()) < tolerance, key
    assert update.scheduler.get_last_lr() == pytest.approx(other.scheduler.get_last_lr())


def data_for(likelihood, grey):
    return (grey > grey.mean()).double() if likelihood == "bernoulli" else grey


PAIRS = [
    ("exact", "gaussian"),
    *((g, p) for g in ("per-datum", "diagonal", "full") for p in ("gaussian", "bernoulli")),
]
# By default each guide, likelihood and objective comes in some combination; slow, in all.
QUICK = {("exact", "elbo"), ("per-datum", "iwae"), ("diagonal", "elbo"), ("full", "iwae")}
MATRIX = [
    pytest.param(
        *pair,
        objective,
        id=f"{pair[0]}, {pair[1]}, {name}",
        marks=() if (pair[0], name) in QUICK else pytest.mark.slow,
    )
    for pair in PAIRS
    for name, objective in (("elbo", ELBO()), ("iwae", IWAE(3)))
]


@pytest.mark.parametrize(("guide", "likelihood", "objective"), MATRIX)
def test_recorded_steps_are_the_eager_ones(guide, likelihood, objective, grey):
    x = data_for(likelihood, grey)
    agree(both_ways(lambda: pair_of(guide, likelihood), x, objective=objective))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize(
    ("guide", "likelihood", "objective"), [case.values for case in MATRIX], ids=repr
)
def test_a_hundred_recorded_steps_are_the_eager_ones(
    guide, likelihood, objective, optimizer, grey
):
    x, how = data_for(likelihood, grey), {"objective": objective, "optimizer": optimizer}
    agree(both_ways(lambda: pair_of(guide, likelihood), x, steps=100, unroll=4, **how))


@pytest.mark.parametrize(
    ("guide", "optimizer"),
    [
        *(("diagonal", name) for name in OPTIMIZERS),
        ("per-datum", "momentum"),
        *(pytest.param("per-datum", n, marks=pytest.mark.slow) for n in ("adamw", "nesterov")),
    ],
)
def test_every_optimizer(optimizer, guide, grey):
    agree(both_ways(lambda: pair_of(guide), grey, optimizer=optimizer))


@pytest.mark.parametrize(
    "how",
    [
        {"clip": 0.1},
        {"warmup": 10},
        {"objective": ELBO(2, beta=0.3)},
        {"objective": ELBO(free_bits=0.2)},
        {"objective": ELBO(kl="sampled")},
        {"objective": ELBO(2, beta=0.3, gradient="score-loo"), "warmup": 3},
        {"unroll": 2},
        {"unroll": 4},
    ],
    ids=str,
)
def test_what_else_a_step_may_have(how, grey):
    agree(both_ways(lambda: pair_of("diagonal"), grey, **how))


# Where a bias has no gradient but rounding, as before batch norm, Adam makes steps of it.
ROUNDING = {"regularized": "sgd"}


def foreign_pair(name):
    def make():
        model, guide, _ = foreign.PAIRS[name]()
        for module in modules_of(model, guide):
            module.double()
        return model, guide

    return make


@pytest.mark.parametrize("steps", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", foreign.PAIRS)
def test_strangers_pairs(name, steps, float64):
    _, _, x = foreign.PAIRS[name]()
    x = torch.as_tensor(x).double()

    optimizer = ROUNDING.get(name, "adam")
    agree(both_ways(foreign_pair(name), x, steps, size=8, optimizer=optimizer))


@pytest.mark.parametrize("name", ["two_level", pytest.param("naive_conv", marks=pytest.mark.slow)])
def test_strangers_pairs_with_cut_draws(name, float64):
    _, _, x = foreign.PAIRS[name]()
    agree(both_ways(foreign_pair(name), x, size=8, objective=IWAE(2, gradient="dreg")))


@pytest.mark.parametrize(
    "objective",
    [ELBO(), IWAE(3), pyro.infer.Trace_ELBO()],
    ids=["ELBO", "IWAE", "Trace_ELBO"],
)
@pytest.mark.parametrize("guide", ["zeros", "zeros+mask", "exact"])
def test_steps_on_rows_with_holes(guide, objective, grey):
    mask = torch.from_numpy(~np.isnan(oracles.with_holes(grey.numpy(), 0.3, seed=0)))
    x = torch.where(mask, grey, 0.0)
    how = {"steps": 20, "unroll": 2, "objective": objective, "mask": mask}
    found = both_ways(lambda: pair_of(guide), x, **how)
    agree(found)
    complete = both_ways(lambda: pair_of(guide), x, **(how | {"mask": None}))
    assert abs(complete[1][0][0] - found[1][0][0]) > 0.1  # the mask is not for nothing


def test_draws_are_fresh_at_each_step_of_a_call(grey):
    with isolated_store():
        model, guide = pair_of("diagonal")
        run = Steps(model, guide, grey, optimizer="sgd")
        for group in run.update.optimizer.param_groups:
            group["lr"] = 1e-12
        run.update.scheduler = None
        fast = CapturedSteps(run.batch, run.update, run.named, 4, compiled=False)
        rows = [torch.arange(B)] * 8
        values = run.run(rows, fast, 4)
        assert len(set(values)) == 8


def fails(model, guide, x, match, objective=None):
    """The step cannot be captured."""
    with isolated_store():
        run = Steps(model, guide, x, objective)
        run.run([torch.arange(B)])
        fast = CapturedSteps(run.batch, run.update, run.named, 2, compiled=False)
        with pytest.raises(CaptureError, match=match):
            run.run([torch.arange(B)] * 2, fast, 2)


def hand_written(x, kind):
    decode, encode = nn.Linear(K, D).double(), nn.Linear(D, 2 * K).double()
    outside = nn.Parameter(torch.zeros(K).double())

    def model(x=None, *, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(K).double(), 1.0).to_event(1))
            if kind == "parameter":
                z = z + outside
            mean = decode(z)
            if kind == "branch" and mean.mean() > 0:
                mean = mean * 2
            if kind == "item":
                mean = mean * float(z[0, 0].item() > 0)
            if kind == "numpy":
                mean = mean + np.random.normal()
            if kind == "python":
                mean = mean + random.random()
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x=None, *, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            loc, log_scale = encode(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("branch", "it reads a value of a tensor"),
        ("item", "it reads a value of a tensor"),
        ("numpy", "changes? from run to run|other things"),
        ("python", "changes? from run to run|other things"),
        ("parameter", "belongs to neither model nor guide"),
    ],
)
def test_what_cannot_be_captured_runs_eagerly_and_says_why(kind, match, grey):
    fails(*hand_written(grey, kind), grey, match)
    results = []
    for capture in (False, True):
        torch.manual_seed(0)
        model, guide = hand_written(grey, kind)
        settings = {"steps": 12, "batch_size": B, "lr": 1e-2, "seed": 0}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fit = fit_svi(model, guide, grey, capture=capture, **settings)
        results.append(fit.objective)
        warned = [w for w in told if "could not be captured, so it runs eagerly" in str(w.message)]
        assert len(warned) == int(capture)
        assert fit.execution.startswith(
            "eager: the step could not" if capture else "eager: as asked"
        )
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", [pyro.infer.Trace_ELBO, pyro.infer.TraceMeanField_ELBO])
def test_two_of_pyros_own_objectives_have_an_equal_here(kind, grey):
    agree(both_ways(lambda: pair_of("diagonal"), grey, objective=kind()))


def test_others_of_pyros_have_none(grey):
    class Mine(pyro.infer.Trace_ELBO):
        pass

    fails(*pair_of("diagonal"), grey, "Mine is none of the objectives known", Mine())


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        (lambda p, lr: torch.optim.RMSprop(p, lr=lr), "RMSprop is none of Adam, AdamW, SGD"),
        (lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True), "Adam has amsgrad set"),
        (lambda p, lr: torch.optim.SGD([{"params": [q]} for q in p], lr=lr), "several groups"),
    ],
)
def test_other_optimizers_run_eagerly(optimizer, why, grey):
    model, guide = pair_of("diagonal")
    with pytest.warns(UserWarning, match=why):
        fit = fit_svi(
            model, guide, grey, steps=4, batch_size=B, optimizer=optimizer, capture=True, seed=0
        )
    assert why in fit.execution and fit.steps == 4


def test_schedulers_that_move_more_than_the_rate_run_eagerly(grey):
    model, guide = pair_of("diagonal")

    def scheduler(optimizer, steps):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps + 1)

    with pytest.warns(UserWarning, match="moves more than the learning rate"):
        fit = fit_svi(
            model, guide, grey, steps=20, batch_size=B, capture=True, scheduler=scheduler, seed=0
        )
    assert fit.steps == 20


def test_a_compiled_fit_is_the_eager_one_and_auto_knows_when_it_pays(grey):
    x = grey[:36]
    model, guide = pair_of("diagonal")
    plain = fit_svi(model, guide, x, steps=30, batch_size=B, lr=1e-2, seed=0, capture="auto")
    assert plain.execution.startswith("eager: ") and "no more than the 50 s" in plain.execution
    agree(both_ways(lambda: pair_of("diagonal"), grey, steps=8, unroll=2, compiled=True))


@pytest.mark.slow
def test_a_captured_fit_killed_in_its_warmup_is_resumed_where_it_was(grey, tmp_path, monkeypatch):
    monkeypatch.setattr(svi, "CapturedSteps", functools.partial(CapturedSteps, compiled=False))
    file, objective = tmp_path / "fit.pt", ELBO(2, beta=2.0)

    def fit(progress, **more):
        model, guide = pair_of("diagonal")
        how = {"objective": objective, "warmup": 60, "steps": 80, "batch_size": 24, "lr": 1e-2}
        how |= {"seed": 0, "capture": True, "progress": progress}
        return fit_svi(model, guide, grey, **how, **more)

    def kill(step, value):
        if step > 40:
            raise KeyboardInterrupt

    whole = fit(False)
    with pytest.raises(KeyboardInterrupt):
        fit(kill, checkpoint=file)
    resumed = fit(False, checkpoint=file)
    assert (
        whole.execution.startswith("captured") and "as before the checkpoint" in resumed.execution
    )
    assert torch.equal(whole.objective, resumed.objective)


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["exact", "per-datum", "diagonal", "full"])
def test_compiled_steps_are_the_eager_ones(guide, grey):
    agree(both_ways(lambda: pair_of(guide), grey, steps=100, unroll=4, compiled=True))


@pytest.mark.slow
def test_a_captured_fit_ends_where_the_eager_one_does(grey):
    ends = []
    for capture in (False, True):
        model, guide = pair_of("diagonal")
        settings = {"steps": 1500, "batch_size": B, "lr": 1e-2, "seed": 0}
        fit = fit_svi(model, guide, grey, capture=capture, **settings)
        assert fit.execution.startswith("captured, 7 steps" if capture else "eager: as asked")
        assert fit.steps == 1500 and len(fit.elapsed) == 1500
        ends.append(fit.objective[-500:])
    error = (ends[0].var() / 500 + ends[1].var() / 500).sqrt() * 4  # steps are correlated
    assert abs(ends[0].mean() - ends[1].mean()) < oracles.z_limit() * error


@pytest.mark.parametrize(
    ("schedule", "unroll"),
    [
        (Schedule(1000, 100, 10_000), 6),
        (Schedule(1000, 1000, 10_000), 5),
        (Schedule(1348, 256, 1500), 5),
        (Schedule(60_000, 128, 100_000), 8),
        (Schedule(100, 60, 1000), 1),
        (Schedule(1000, 100, 3), 3),
    ],
)
def test_calls_leave_few_steps_over(schedule, unroll):
    assert best_unroll(schedule) == unroll


def test_auto_weighs_what_is_left():
    schedule = Schedule(1000, 100, 100_000)
    choice = CapturePolicy("auto", lambda unroll: type("Fast", (), {"unroll": unroll})(), schedule)
    choice.look(10, [0.01 * k for k in range(10)])
    assert choice.captured is None and choice.wanted == "auto"
    choice.look(25, [0.01 * k for k in range(25)])
    assert choice.unroll > 1 and "about 999.7 s of eager work were left" in choice.why
    with pytest.raises(ValueError, match="capture must be one of True, False, 'auto'; got 'on'"):
        CapturePolicy("on", lambda unroll: None, schedule)


def test_rules_are_those_of_torch():
    parameter = nn.Parameter(torch.zeros(2))
    rule = functional_optimizer(torch.optim.AdamW([parameter], lr=0.1, betas=(0.7, 0.8), eps=1e-3))
    assert rule.decoupled and rule.betas == (0.7, 0.8) and rule.eps == 1e-3
    assert functional_optimizer(torch.optim.SGD([parameter], lr=0.1)).names == ()
