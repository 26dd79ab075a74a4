"""Captured steps equal eager ones, and steps that cannot be captured run eagerly with a reason."""

import itertools
import random
import re
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import oracles
import user_pairs
from captured import OPTIMIZERS, B, Steps, assert_equal, both_fits
from ppl_vae import ELBO, IWAE, PPCA, VAE, AmortizedGuide, ExactGuide, PerDatumGuide, fit_svi, mlp
from ppl_vae.capture.functional_optim import functional_optimizer
from ppl_vae.core.introspection import modules_of
from ppl_vae.core.state import isolated_store, seeded
from ppl_vae.guides.families import num_scale_outputs
from ppl_vae.inference.svi.batches.schedule import Schedule
from ppl_vae.inference.svi.steps.capture_policy import StepPolicy, best_unroll
from ppl_vae.inference.svi.steps.captured_step import CapturedSteps
from ppl_vae.inference.svi.steps.recorded_gradient import RecordedGradient
from ppl_vae.likelihoods import Bernoulli, Gaussian

N, D, K = 48, 8, 3


@pytest.fixture(scope="module")
def data():
    return torch.from_numpy(oracles.simulate_ppca((16, 8, 4), 1, N, D, seed=0))


def pair_of(guide, likelihood="gaussian"):
    """A pair in float64 with the same initial values at every call."""
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


def data_for(likelihood, data):
    return (data > data.mean()).double() if likelihood == "bernoulli" else data


PAIRS = [
    ("exact", "gaussian"),
    *((g, p) for g in ("per-datum", "diagonal", "full") for p in ("gaussian", "bernoulli")),
]
# By default each guide, likelihood and objective is tested in one combination; slow, in all.
QUICK = {
    ("per-datum", "gaussian", "iwae"),
    ("full", "bernoulli", "elbo"),
}
MATRIX = [
    pytest.param(
        *pair,
        objective,
        id=f"{pair[0]}, {pair[1]}, {name}",
        marks=() if (*pair, name) in QUICK else pytest.mark.slow,
    )
    for pair in PAIRS
    for name, objective in (("elbo", ELBO()), ("iwae", IWAE(3)))
]


@pytest.mark.parametrize(("guide", "likelihood", "objective"), MATRIX)
def test_captured_steps_equal_eager_steps(guide, likelihood, objective, data):
    x = data_for(likelihood, data)
    assert_equal(both_fits(lambda: pair_of(guide, likelihood), x, objective=objective))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize(
    ("guide", "likelihood", "objective"), [case.values for case in MATRIX], ids=repr
)
def test_a_hundred_captured_steps_equal_eager_steps(guide, likelihood, objective, optimizer, data):
    assert_equal(
        both_fits(
            lambda: pair_of(guide, likelihood), data_for(likelihood, data), steps=100, unroll=4,
            objective=objective, optimizer=optimizer,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("guide", "optimizer"),
    [
        ("diagonal", "adamw"),
        ("per-datum", "momentum"),
        *(pytest.param("diagonal", n, marks=pytest.mark.slow) for n in OPTIMIZERS if n != "adamw"),
        *(pytest.param("per-datum", n, marks=pytest.mark.slow) for n in ("adamw", "nesterov")),
    ],
)
def test_captured_steps_of_every_optimizer(optimizer, guide, data):
    assert_equal(both_fits(lambda: pair_of(guide), data, optimizer=optimizer))


@pytest.mark.parametrize(
    "settings",
    [
        {"clip": 0.1, "unroll": 2},
        {"objective": ELBO(2, beta=0.3, gradient="score-loo"), "warmup": 3},
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in (
                {"objective": ELBO(2, beta=0.3, kl="sampled"), "warmup": 10},
                {"objective": ELBO(free_bits=0.2)},
                {"clip": 0.1},
                {"warmup": 10},
                {"unroll": 2},
                {"unroll": 4},
                {"objective": ELBO(2, beta=0.3)},
                {"objective": ELBO(kl="sampled")},
            )
        ),
    ],
    ids=str,
)
def test_captured_steps_with_other_settings(settings, data):
    assert_equal(both_fits(lambda: pair_of("diagonal"), data, **settings))


# A bias before batch norm has a gradient of rounding errors only, which Adam would amplify.
ROUNDING = {"regularized": "sgd"}


def external_pair(name):
    def make():
        model, guide, _ = user_pairs.PAIRS[name]()
        for module in modules_of(model, guide):
            module.double()
        return model, guide

    return make


# Bare parameters, dropout and batch norm, and two levels; slow, all.
QUICK_PAIRS = {"param_only", "regularized", "two_level"}


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param(name, steps, marks=() if quick else pytest.mark.slow)
        for name in user_pairs.PAIRS
        for steps, quick in ((4, name in QUICK_PAIRS), (100, False))
    ],
)
def test_captured_steps_of_external_pairs(name, steps, float64):
    _, _, x = user_pairs.PAIRS[name]()
    x = torch.as_tensor(x).double()

    optimizer = ROUNDING.get(name, "adam")
    assert_equal(both_fits(external_pair(name), x, steps, size=8, optimizer=optimizer))


@pytest.mark.parametrize("name", ["two_level", pytest.param("naive_conv", marks=pytest.mark.slow)])
def test_captured_steps_of_external_pairs_with_dreg(name, float64):
    _, _, x = user_pairs.PAIRS[name]()
    assert_equal(both_fits(external_pair(name), x, size=8, objective=IWAE(2, gradient="dreg")))


OBJECTIVES = {"ELBO": ELBO(), "IWAE": IWAE(3), "Trace_ELBO": pyro.infer.Trace_ELBO()}
# By default one guide and objective; slow, in all combinations.
QUICK_MISSING = {("zeros+mask", "IWAE")}
MISSING = [
    pytest.param(*case, marks=() if case in QUICK_MISSING else pytest.mark.slow)
    for case in itertools.product(("zeros", "zeros+mask", "exact"), OBJECTIVES)
]


@pytest.mark.parametrize(("guide", "objective"), MISSING)
def test_captured_steps_with_missing_values(guide, objective, data):
    mask = torch.from_numpy(~np.isnan(oracles.with_missing_values(data.numpy(), 0.3, seed=0)))
    x, objective = torch.where(mask, data, 0.0), OBJECTIVES[objective]
    found = both_fits(lambda: pair_of(guide), x, steps=6, unroll=2, objective=objective, mask=mask)
    assert_equal(found)
    with isolated_store(), seeded(7):
        complete = Steps(*pair_of(guide), x, objective).run([torch.arange(B)])
    assert abs(complete[0] - found[1][0][0]) > 0.1  # the mask has an effect


def test_draws_differ_between_the_steps_of_a_call(data):
    with isolated_store():
        model, guide = pair_of("diagonal")
        run = Steps(model, guide, data, optimizer="sgd")
        for group in run.update.optimizer.param_groups:
            group["lr"] = 1e-12
        run.update.scheduler = None
        captured = CapturedSteps(run.minibatch, run.update, run.named, 2, compiled=False)
        values = run.run([torch.arange(B)] * 4, captured, 2)
        assert len(set(values)) == 4


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

    return model, user_pairs.normal_guide(encode)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("branch", "it reads a value of a tensor"),
        ("item", "it reads a value of a tensor"),
        ("numpy", "change from run to run"),
        ("python", "change from run to run"),
        ("parameter", "belongs to neither model nor guide"),
    ],
)
def test_steps_that_cannot_be_captured_run_eagerly_with_the_reason(kind, match, data):
    results = []
    for capture in (False, True):
        torch.manual_seed(0)
        model, guide = hand_written(data, kind)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit = fit_svi(
                model, guide, data, steps=12, batch_size=B, lr=1e-2, seed=0, capture=capture
            )
        results.append(fit.objective)
        warned = [w for w in caught if "could not be captured, so it runs" in str(w.message)]
        assert len(warned) == int(capture)
        assert all(re.search(match, str(w.message)) for w in warned)
        reason = "eager: it could not" if capture else "eager: as requested"
        assert fit.execution.startswith(reason)
    assert torch.equal(*results)


def test_objectives_of_pyro_with_an_equivalent_are_captured(data):
    # Trace_ELBO is one of the objectives above.
    objective = pyro.infer.TraceMeanField_ELBO()
    assert_equal(both_fits(lambda: pair_of("diagonal"), data, objective=objective))


def test_objectives_of_pyro_without_an_equivalent_run_eagerly(data):
    class Mine(pyro.infer.Trace_ELBO):
        pass

    model, guide = pair_of("diagonal")
    with pytest.warns(UserWarning, match="Mine is none of the objectives that can be captured"):
        fit_svi(model, guide, data, objective=Mine(), steps=12, batch_size=B, capture=True, seed=0)


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (lambda p, lr: torch.optim.RMSprop(p, lr=lr), "RMSprop is none of Adam, AdamW, SGD"),
        (lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True), "Adam has amsgrad set"),
        (lambda p, lr: torch.optim.SGD([{"params": [q]} for q in p], lr=lr), "several groups"),
    ],
)
def test_optimizers_without_a_functional_counterpart_run_eagerly(optimizer, reason, data):
    model, guide = pair_of("diagonal")
    with pytest.warns(UserWarning, match=reason):
        fit = fit_svi(
            model, guide, data, steps=4, batch_size=B, optimizer=optimizer, capture=True, seed=0
        )
    assert reason in fit.execution and fit.steps == 4


def test_schedulers_that_change_more_than_the_learning_rate_run_eagerly(data):
    model, guide = pair_of("diagonal")

    def scheduler(optimizer, steps):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps + 1)

    with pytest.warns(UserWarning, match="changes more than the learning rate"):
        fit = fit_svi(
            model, guide, data, steps=20, batch_size=B, capture=True, scheduler=scheduler, seed=0
        )
    assert fit.steps == 20


def test_compiled_steps_equal_eager_steps_and_short_fits_are_not_compiled(data):
    x = data[:36]
    model, guide = pair_of("diagonal")
    short = fit_svi(model, guide, x, steps=30, batch_size=B, lr=1e-2, seed=0, capture="auto")
    assert short.execution.startswith("eager: ") and "too little to pay" in short.execution
    assert_equal(both_fits(lambda: pair_of("diagonal"), data, steps=2, compiled=True))


@pytest.mark.slow
def test_a_captured_fit_interrupted_in_its_warmup_is_resumed(data, tmp_path, uncompiled):
    file, objective = tmp_path / "fit.pt", ELBO(2, beta=2.0)

    def fit(progress, **more):
        model, guide = pair_of("diagonal")
        return fit_svi(
            model, guide, data, objective=objective, warmup=60, steps=80, batch_size=24, lr=1e-2,
            seed=0, capture=True, progress=progress, **more,
        )  # fmt: skip

    def interrupt(step, value):
        if step > 40:
            raise KeyboardInterrupt

    whole = fit(False)
    with pytest.raises(KeyboardInterrupt):
        fit(interrupt, checkpoint=file)
    resumed = fit(False, checkpoint=file)
    assert whole.execution == resumed.execution and whole.execution.startswith("compiled")
    assert torch.equal(whole.objective, resumed.objective)


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["exact", "per-datum", "diagonal", "full"])
def test_a_hundred_compiled_steps_equal_eager_steps(guide, data):
    assert_equal(both_fits(lambda: pair_of(guide), data, steps=100, unroll=4, compiled=True))


@pytest.mark.slow
def test_captured_and_eager_fits_converge_to_the_same_objective(data):
    ends = []
    for capture in (False, True):
        model, guide = pair_of("diagonal")
        fit = fit_svi(
            model, guide, data, steps=1500, batch_size=B, lr=1e-2, seed=0, capture=capture
        )
        assert fit.execution.startswith("compiled, 7 steps" if capture else "eager: as requested")
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
def test_the_number_of_steps_per_call_leaves_few_eager_steps(schedule, unroll):
    assert best_unroll(schedule) == unroll


class Compilation(CapturedSteps):
    """What stands for captured code in tests of the policy, of which some takes time."""

    def __init__(self, unroll, compiled=True, waits=False):
        self.unroll, self.compiled, self.waits = unroll, compiled, waits
        self.run, self.compilation, self.seconds = self, self, 7.0
        self.is_ready = self.abandoned = self.finished = False
        self.failure = None

    def start(self, rows, start):
        self.started_at = start

    def finish(self):
        self.finished = True

    def abandon(self):
        self.abandoned = True


def policy_of(mode, schedule, recording_seconds=1.0, **options):
    recorded = object.__new__(RecordedGradient)
    recorded.run = type("Run", (), {"recording_seconds": recording_seconds})()
    return StepPolicy(mode, lambda: recorded, Compilation, schedule, **options)


@pytest.mark.parametrize(
    ("steps", "seconds", "mode"),
    [(300, 0.005, False), (1000, 0.005, "recorded"), (200, 0.5, False)],
)
def test_auto_records_where_the_remaining_steps_save_more_than_recording_costs(
    steps, seconds, mode
):
    policy = policy_of("auto", Schedule(1000, 100, steps))
    policy.observe(10, [seconds * k for k in range(10)], None)
    assert policy.mode == "auto"
    policy.observe(30, [seconds * k for k in range(30)], None)
    assert policy.mode == mode
    assert (policy.recorded is not None) == (mode == "recorded")
    left = float(policy.reason.split("about ")[1].split()[0])
    assert left == pytest.approx(seconds * (steps - 30), abs=0.06)
    assert policy.reason.startswith(mode or "eager")


def test_auto_compiles_in_background_long_fits_one_step_per_call_first():
    policy = policy_of("auto", Schedule(1000, 100, 100_000), in_background=True)
    times = [0.005 * k for k in range(200)]
    rows = torch.arange(100)
    policy.observe(30, times[:30], rows)
    assert policy.mode == "recorded" and policy.pending is None
    policy.observe(60, times[:60], rows)
    first = policy.pending
    assert (first.unroll, first.compiled, first.started_at) == (1, "background", 60)
    policy.observe(61, times[:61], rows)
    assert policy.compiled is None and policy.mode == "recorded"
    first.is_ready = True
    policy.observe(100, times[:100], rows)
    assert policy.compiled is first and first.finished and policy.mode is True
    assert policy.recorded is not None  # for batches of other sizes
    assert policy.reason == (
        "compiled, 1 step per call from step 101 on: compiled in the background in 7 s"
    )
    assert policy.content == [True, policy.reason, 1, True]
    second = policy.pending
    assert second.unroll == best_unroll(policy.schedule) == 6
    policy.close()
    assert second.abandoned and policy.pending is None


def test_fits_that_end_before_a_compiler_are_not_compiled():
    policy = policy_of("auto", Schedule(1000, 100, 8000), in_background=True)
    for steps in (30, 60, 100):
        policy.observe(steps, [0.005 * k for k in range(steps)], None)
    assert policy.mode == "recorded" and policy.pending is None


def test_what_another_process_cannot_compile_runs_recorded():
    policy = policy_of("auto", Schedule(1000, 100, 100_000), in_background=True)
    for steps in (30, 60):
        policy.observe(steps, [0.005 * k for k in range(steps)], None)
    policy.pending.is_ready, policy.pending.failure = True, "there is no compiler"
    policy.observe(61, [0.005 * k for k in range(61)], None)
    assert policy.mode == "recorded" and policy.compiled is None and policy.pending is None
    assert policy.reason.endswith("; there is no compiler")


def test_resumed_fits_wait_for_the_steps_that_they_had():
    policy = policy_of("auto", Schedule(1000, 100, 100_000), in_background=True)
    policy.resume(True, "compiled", 1, True)
    assert policy.compiled.unroll == 1 and policy.compiled.compiled == "background"
    assert policy.compiled.waits and policy.reason.endswith("as before the checkpoint")


def test_without_another_process_long_fits_wait_for_the_compiler():
    policy = policy_of("auto", Schedule(1000, 100, 100_000))
    for steps in (30, 60):
        policy.observe(steps, [0.005 * k for k in range(steps)], None)
    assert policy.compiled.unroll == 6 and policy.compiled.compiled is True
    assert "s of recorded work were left" in policy.reason


def test_unknown_ways_to_run_are_refused():
    with pytest.raises(ValueError, match=r"capture must be one of .*'recorded'.*; got 'on'"):
        policy_of("on", Schedule(1000, 100, 100_000))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_functional_optimizers_equal_those_of_torch(name):
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(5, generator=generator).double())
    optimizer = OPTIMIZERS[name]([parameter], 0.1)
    functional = functional_optimizer(optimizer)
    lr = optimizer.param_groups[0]["lr"]
    value = parameter.detach().clone()
    state = tuple(torch.zeros_like(value) for _ in functional.state_keys)
    for step in range(1, 6):
        gradient = torch.randn(5, generator=generator).double()
        parameter.grad = gradient.clone()
        optimizer.step()
        coefficients = torch.tensor(functional.coefficients(step, lr), dtype=torch.float64)
        value, state = functional.update(value, gradient, state, coefficients)
        torch.testing.assert_close(value, parameter.detach(), rtol=1e-12, atol=1e-14)
    for key, values in zip(functional.state_keys, state, strict=True):
        torch.testing.assert_close(values, optimizer.state[parameter][key])


def test_functional_optimizers_have_the_settings_of_torch():
    parameter = nn.Parameter(torch.zeros(2))
    adamw = functional_optimizer(
        torch.optim.AdamW([parameter], lr=0.1, betas=(0.7, 0.8), eps=1e-3)
    )
    assert adamw.decoupled and adamw.betas == (0.7, 0.8) and adamw.eps == 1e-3
    assert functional_optimizer(torch.optim.SGD([parameter], lr=0.1)).state_keys == ()


@pytest.mark.parametrize("capture", [True, "recorded"])
def test_a_fit_states_what_ran(capture, uncompiled):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    for steps, ran in ((1, "eager: after the first step"), (2, None), (5, None), (11, None)):
        vae = VAE.mlp(data_dim=4, latent_dim=2, hidden=[3], seed=0)
        fit = fit_svi(
            vae.model, vae.guide, x, steps=steps, batch_size=8, capture=capture, seed=0,
            progress=False,
        )  # fmt: skip
        expected = ran or ("recorded" if capture == "recorded" else "compiled, ")
        assert fit.execution.startswith(expected), fit.execution
