"""Captured code in users' own training loops and in evaluation, and its parts."""

import warnings

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

import oracles
import user_pairs
from ppl_vae import ELBO, IWAE, VAE, CapturedSVI, Gaussian, fit_svi, log_likelihood, mlp
from ppl_vae.capture.compiled import MAX_SIGNATURES, CompiledFunction, GraphReplay
from ppl_vae.capture.graph import CaptureError, capture_graph
from ppl_vae.capture.matmul import select_fastest_matmul
from ppl_vae.core.batch import Batch
from ppl_vae.core.introspection import filter_kwargs, modules_of
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import isolated_store, precision, seeded, train_mode
from ppl_vae.evaluation.marginal_likelihood.batching import LogWeightSampler
from ppl_vae.evaluation.marginal_likelihood.call_runner import CallRunner
from ppl_vae.evaluation.marginal_likelihood.local_vi import LocalVI
from ppl_vae.inference.svi.batches.minibatch import MinibatchObjective, WeightedObjective
from ppl_vae.inference.svi.batches.schedule import Schedule
from ppl_vae.inference.svi.parameters import find_parameters
from ppl_vae.inference.svi.settings import Optimization
from ppl_vae.inference.svi.steps.capture_policy import StepPolicy
from ppl_vae.inference.svi.steps.captured_step import CapturedSteps
from ppl_vae.inference.svi.steps.optimizer_step import OptimizerStep


def external_pair(name):
    model, guide, x = user_pairs.PAIRS[name]()
    for module in modules_of(model, guide):
        module.double()
    return model, guide, torch.as_tensor(x).double()


def parameters_of(model, guide):
    bare = [v for _, v in sorted(pyro.get_param_store().items())]
    own = [p for module in modules_of(model, guide) for p in module.parameters()]
    return [p.detach().clone() for p in (*own, *bare)]


# Users' own training loops


def own_loop(kind, name, loss, optimizer, **options):
    """Losses, parameters and the optimizer's state after some steps on batches."""
    pyro.clear_param_store()
    model, guide, x = external_pair(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pyro's, of frozen parameters
        svi = kind(model, guide, optimizer(), loss, **options)
        generator = torch.Generator().manual_seed(0)
        losses = []
        with seeded(3):
            for _ in range(5):
                rows = torch.randperm(len(x), generator=generator)[:8]
                # Stock SVI passes each keyword to both programs.
                batch = Batch(x).rows(rows)
                keywords = filter_kwargs(model, filter_kwargs(guide, batch.keywords))
                losses.append(svi.step(batch.x, **keywords))
            losses += [svi.evaluate_loss(x) for _ in range(3)]
    state = {n: s.get("optimizer", s)["state"] for n, s in svi.optim.get_state().items()}
    found = losses, parameters_of(model, guide), state
    pyro.clear_param_store()
    return found, svi


# Pyro's SVI trains what pyro.module or pyro.param registers; these pairs register nothing.
UNREGISTERED = {"functions", "two_level", "normalized_over_dim_one", "positive_latent"}
REGISTERED = [name for name in user_pairs.PAIRS if name not in UNREGISTERED]


@pytest.mark.parametrize(("compiled", "execution"), [(False, "recorded"), (True, "compiled")])
@pytest.mark.parametrize(
    "name",
    [n if n in REGISTERED[::6] else pytest.param(n, marks=pytest.mark.slow) for n in REGISTERED],
)
def test_captured_svi_equals_pyros(name, compiled, execution, float64, uncompiled):
    optimizer = lambda: pyro.optim.SGD({"lr": 1e-4, "momentum": 0.9})  # noqa: E731
    (losses, ours, state), _ = own_loop(SVI, name, Trace_ELBO(), optimizer)
    (other, theirs, later), svi = own_loop(
        CapturedSVI, name, Trace_ELBO(), optimizer, compiled=compiled
    )
    assert svi.execution == execution
    assert other == pytest.approx(losses, rel=1e-9)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert state.keys() == later.keys()
    for key, held in state.items():
        torch.testing.assert_close(held, later[key], rtol=1e-6, atol=1e-9)


def test_unregistered_parameters_are_the_reason_in_the_warning(float64):
    model, guide, x = external_pair("functions")
    optimizer = pyro.optim.Adam({"lr": 1e-3})
    with pytest.warns(UserWarning, match="Pyro has found no parameters: pyro.module registers"):
        svi = CapturedSVI(model, guide, optimizer, Trace_ELBO(), compiled=False)
        for _ in range(3):
            svi.step(x)


@pytest.mark.parametrize(
    ("loss", "optimizer"),
    [
        (TraceMeanField_ELBO, lambda: pyro.optim.Adam({"lr": 1e-2})),
        pytest.param(
            ELBO, lambda: pyro.optim.AdamW({"lr": 1e-2, "weight_decay": 0.1}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda: IWAE(3), lambda: pyro.optim.Adam({"lr": 1e-2}), marks=pytest.mark.slow
        ),
        (Trace_ELBO, lambda: pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "gamma": 0.5})),
    ],
)  # fmt: skip
def test_other_losses_and_optimizers(loss, optimizer, float64):
    name = "tutorial"
    (losses, ours, _), _ = own_loop(SVI, name, loss(), optimizer)
    (other, theirs, _), svi = own_loop(CapturedSVI, name, loss(), optimizer, compiled=False)
    assert svi.execution == "recorded" and other == pytest.approx(losses, rel=1e-9)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_steps_take_masks(float64):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double()
    masks = [torch.rand(8, 6, generator=torch.Generator().manual_seed(s)) < 0.7 for s in range(5)]
    losses = {}
    for kind, options in ((SVI, {}), (CapturedSVI, {"compiled": False})):
        pyro.clear_param_store()
        vae = VAE.mlp(6, 2, hidden=(5,), missing="zeros+mask", seed=0).double()
        svi = kind(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(), **options)
        with seeded(1):
            losses[kind] = [svi.step(torch.where(m, x, 0.0), mask=m) for m in masks]
            losses[kind].append(svi.evaluate_loss(x, mask=masks[0]))
    assert svi.execution == "recorded"
    assert losses[CapturedSVI] == pytest.approx(losses[SVI], rel=1e-9)
    pyro.clear_param_store()


def test_several_particles_are_captured_too(float64):
    vae = VAE.mlp(6, 2, hidden=(5,), seed=0).double()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double()
    svi = CapturedSVI(
        vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(4), compiled=False
    )
    assert all(svi.step(x) > 0 for _ in range(4)) and svi.execution == "recorded"


OTHER_OPTIMIZERS = [
    (lambda: pyro.optim.RMSprop({"lr": 1e-3}), "RMSprop is none of Adam"),
    (lambda: pyro.optim.ClippedAdam({"lr": 1e-3}), "ClippedAdam is none of Adam"),
    (lambda: pyro.optim.Adam({"lr": 1e-3}, {"clip_norm": 1.0}), "are clipped"),
    (
        lambda: pyro.optim.Adam(lambda name: {"lr": 1e-2 if "weight" in name else 1e-3}),
        "several optimizers or learning rates",
    ),
]


@pytest.mark.parametrize(("optimizer", "match"), OTHER_OPTIMIZERS)
def test_steps_of_any_optimizer_are_recorded(optimizer, match, float64):
    (losses, ours, _), _ = own_loop(SVI, "tutorial", ELBO(), optimizer)
    for compiled in (False, True):
        (other, theirs, _), svi = own_loop(
            CapturedSVI, "tutorial", ELBO(), optimizer, compiled=compiled
        )
        assert other == losses and all(map(torch.equal, ours, theirs))
        assert svi.execution.startswith("recorded") and (match in svi.execution) == compiled


def test_why_steps_cannot_be_compiled_is_said_once(float64):
    vae = VAE.mlp(6, 2, hidden=(5,), seed=0).double()
    svi = CapturedSVI(
        vae.model, vae.guide, pyro.optim.RMSprop({"lr": 1e-3}), ELBO(), compiled=True
    )
    with pytest.warns(UserWarning, match="could not be compiled, so it runs as it was") as caught:
        assert len({svi.step(torch.zeros(8, 6).double()) for _ in range(5)}) == 5
    assert len([w for w in caught if "could not be compiled" in str(w.message)]) == 1
    pyro.clear_param_store()


def test_losses_that_pyro_must_compute_warn_once(float64):
    vae = VAE.mlp(6, 2, hidden=(5,), seed=0).double()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double()
    pyro.clear_param_store()
    match = "TraceGraph_ELBO is none of the"
    with pytest.warns(UserWarning, match=match) as caught:
        svi = CapturedSVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), TraceGraph_ELBO())
        losses = [svi.step(x) for _ in range(5)]
    assert len([w for w in caught if "could not be captured" in str(w.message)]) == 1
    assert match in svi.execution and len(set(losses)) == 5
    pyro.clear_param_store()


def test_numbers_that_change_between_steps_warn(float64):
    def model(x, weight=1.0):
        vae.model(x)

    vae = VAE.mlp(6, 2, hidden=(5,), seed=0).double()
    guide = lambda x, weight=1.0: vae.guide(x)  # noqa: E731
    x = torch.zeros(8, 6).double()
    svi = CapturedSVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), ELBO(), compiled=False)
    with pytest.warns(UserWarning, match="a number that changes from step to step must be a ten"):
        for step in range(10):
            svi.step(x, weight=step / 10)
    pyro.clear_param_store()


@pytest.mark.slow
def test_modes_and_shapes_are_distinguished(float64):
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4)).double()
    shape = {"data_dim": 6, "latent_dim": 2, "likelihood": Gaussian("shared")}
    vae = VAE(decoder=mlp(2, 6, (5,), seed=0), encoder=net, **shape).double()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double()
    found = {}
    for kind, options in ((SVI, {}), (CapturedSVI, {"compiled": False})):
        pyro.clear_param_store()
        optim = pyro.optim.Adam({"lr": 1e-12})
        svi = kind(vae.model, vae.guide, optim, TraceMeanField_ELBO(), **options)
        with seeded(1):
            losses = []
            for training in (True, True, False, False, True):
                for rows in (slice(0, 8), slice(0, 5)):
                    with train_mode(vae.model, vae.guide, training=training):
                        losses.append(svi.step(x[rows]))
        found[kind] = losses
    assert found[CapturedSVI] == pytest.approx(found[SVI], rel=1e-8)
    pyro.clear_param_store()


# Evaluation

REFINED_BY_DEFAULT = ("two_level",)


def with_missing_values():
    vae = VAE.mlp(6, 2, hidden=(5,), missing="zeros+mask", seed=0).double()
    return vae.model, vae.guide, vae.sample(24, seed=0)


@pytest.mark.parametrize(
    "name",
    [
        n if n in REFINED_BY_DEFAULT else pytest.param(n, marks=pytest.mark.slow)
        for n in (*user_pairs.PAIRS, "missing")
    ],
)
def test_recorded_weights_and_refined_guides_equal_eager_ones(name, float64, monkeypatch):
    model, guide, x = external_pair(name) if name != "missing" else with_missing_values()
    mask = None if name != "missing" else x < x.mean(0) + 0.5 * x.std(0)
    monkeypatch.setattr(
        "ppl_vae.evaluation.marginal_likelihood.batching.ROWS_AT_ONCE",
        {"cpu": 40, "accelerator": 40},
    )
    pair, data, results = Pair(model, guide), Batch(x, mask), []
    with isolated_store(), pair.eval_mode():
        for capture in (False, "recorded"):
            runners = [CallRunner(capture, 9) for _ in range(3)]
            sampler, refined_sampler = LogWeightSampler(runners[0]), LogWeightSampler(runners[1])
            local_vi = LocalVI(steps=4, covariance="diagonal", num_samples=2, runner=runners[2])
            with seeded(5), torch.no_grad():
                tensors = []
                for batch in data.split(torch.arange(len(x)), 12):
                    tensors.append(sampler(pair, batch, 12))
                    try:
                        refined = local_vi(pair, batch)
                    except ValueError as error:  # a guide without a density to refine
                        assert "no density that can be refined" in str(error)
                        continue
                    tensors += [p.detach() for p in refined.guide.parameters()]
                    tensors.append(refined_sampler(refined, batch, 12))
            results.append(tensors)
            name = "recorded" if capture else "eager"
            assert runners[0].execution == f"{name}: as requested"
            # They agree, too, if the guide cannot be refined and neither runs.
            assert runners[1].execution == runners[2].execution
    assert all(map(torch.equal, *results))


@pytest.mark.slow
def test_a_compiled_estimate_equals_the_eager_one():
    vae = VAE.mlp(16, 3, hidden=(12,), seed=0)
    x = vae.sample(70, seed=1)
    found = [
        log_likelihood(vae.model, vae.guide, x, 400, seed=0, capture=capture)
        for capture in (False, True, "auto")
    ]
    assert [f.execution.split(":")[0] for f in found] == ["eager", "compiled", "eager"]
    assert "too few calls" in found[2].execution
    torch.testing.assert_close(found[0].value, found[1].value, rtol=0, atol=1e-5)
    assert torch.equal(found[0].value, found[2].value)


def test_models_that_cannot_be_captured_are_estimated_eagerly(float64):
    vae = VAE.mlp(6, 2, hidden=(5,), seed=0).double()
    x = vae.sample(10, seed=1)

    def model(x=None, **keywords):
        vae.model(x, **keywords)
        assert float(x.sum()) != 1e9

    with pytest.warns(UserWarning, match="could not be captured, so it runs eagerly: it cannot"):
        found = log_likelihood(model, vae.guide, x, 50, seed=0, capture=True)
    plain = log_likelihood(model, vae.guide, x, 50, seed=0, capture=False)
    assert torch.equal(found.value, plain.value) and found.execution.startswith(
        "eager: it could not"
    )


# Graphs, shapes and precision


def test_a_replayed_graph_copies_its_inputs():
    calls = []

    def run(flat):
        calls.append(None)
        return [flat[0] * 2 + flat[1], flat[1] + torch.rand(2)]

    replay = GraphReplay(run, [torch.zeros(2), torch.ones(2)], lambda call: call)
    first = [t.clone() for t in replay([torch.ones(2), torch.full((2,), 3.0)])]
    second = [t.clone() for t in replay([torch.ones(2), torch.full((2,), 3.0)])]
    assert torch.equal(first[0], torch.full((2,), 5.0)) and torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_shapes_are_cached_and_too_many_raise():
    shapes = []

    def double(x):
        shapes.append(x.shape)
        return 2 * x

    twice = CompiledFunction(lambda x: capture_graph(double, (x,), (x + 1,)), compiled=False)
    for size in range(1, MAX_SIGNATURES + 1):
        for _ in range(2):
            assert torch.equal(twice(torch.ones(size)), torch.full((size,), 2.0))
    assert len(shapes) == 2 * MAX_SIGNATURES  # each recorded twice, and run never again
    with pytest.raises(CaptureError, match="already been compiled for 8 combinations of shapes"):
        twice(torch.ones(3, dtype=torch.float64))


def test_both_matrix_products_give_the_same_result(monkeypatch):
    def products(x, w, b, e):
        return torch.addmm(b, x, w.t()), e.t() @ x, e @ w, x.double() @ w.double().t()

    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(s, generator=generator) for s in ((32, 48), (24, 48), (24,), (32, 24))]
    recorded, _ = capture_graph(products, tuple(args), tuple(a + 1 for a in args))
    expected = recorded(*args)
    for faster in (True, False):
        monkeypatch.setattr(
            "ppl_vae.capture.matmul._onednn_is_faster", lambda *_, answer=faster: answer
        )
        again, _ = capture_graph(products, tuple(args), tuple(a + 1 for a in args))
        code = select_fastest_matmul(again).code
        assert ("ppl_vae.onednn_matmul" in code) == faster and "aten.mm" in code
        for a, b in zip(expected, again(*args), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_bfloat16_rounds_factors_only():
    a, b = torch.full((2, 3), 1 + 2**-9), torch.full((3, 2), 1.0)
    a.requires_grad_()
    with precision("bf16", a.device):
        product = a @ b
        product.sum().backward()
        total = a.detach().sum()
    assert product.dtype == torch.float32 and torch.equal(product, torch.full((2, 2), 3.0))
    assert a.grad is not None and a.grad.dtype == torch.float32
    assert float(total) == pytest.approx(6 + 6 * 2**-9)
    with precision("bf16", a.device):
        exact = a.detach().double() @ b.double()
    assert float(exact.sum()) == pytest.approx(12 * (1 + 2**-9))


def test_an_unsupported_precision_raises():
    with pytest.raises(ValueError, match="'tf32' is a format of NVIDIA's GPUs"):
        fit_svi(*tiny(), steps=1, device="cpu", precision="tf32")
    with pytest.raises(ValueError, match="precision must be one of"):
        fit_svi(*tiny(), steps=1, precision="half")


def tiny():
    vae = VAE.mlp(6, 2, hidden=(5,), seed=0)
    return vae.model, vae.guide, vae.sample(40, seed=1)


def test_auto_captures_long_fits_and_estimates(uncompiled, monkeypatch):
    monkeypatch.setattr("ppl_vae.capture.policy.RECORDING_CALLS", -100)
    monkeypatch.setattr("ppl_vae.capture.policy.COMPILING_PER_RECORDING", 0.0)
    model, guide, x = tiny()
    fit = fit_svi(model, guide, x, steps=100, batch_size=20, lr=1e-2, seed=0)
    assert fit.execution.startswith("compiled, ") and fit.steps == 100
    assert "compiled in the background" in fit.execution
    monkeypatch.setattr(
        "ppl_vae.evaluation.marginal_likelihood.batching.ROWS_AT_ONCE",
        {"cpu": 20, "accelerator": 20},
    )
    found = log_likelihood(model, guide, x, 50, seed=0)
    eager = log_likelihood(model, guide, x, 50, seed=0, capture=False)
    assert found.execution.startswith("recorded: about ")
    assert torch.equal(found.value, eager.value)


@pytest.mark.slow
def test_a_captured_fit_resumes_from_a_checkpoint(uncompiled, tmp_path):
    ends = []
    for stop in (False, True):
        vae = VAE.mlp(6, 2, hidden=(5,), seed=0).double()
        x = vae.sample(60, seed=1)

        def halt(step, value, stop=stop):
            if stop and step == 54:  # the checkpoint is of step 27
                raise KeyboardInterrupt

        options = {"steps": 100, "batch_size": 25, "lr": 1e-2, "seed": 0, "capture": True}
        options["checkpoint"] = tmp_path / f"{stop}.pt"
        if stop:
            with pytest.raises(KeyboardInterrupt):
                fit_svi(vae.model, vae.guide, x, progress=halt, **options)
            vae = VAE.mlp(6, 2, hidden=(5,), seed=0).double()
        fit = fit_svi(vae.model, vae.guide, x, **options)
        ends.append(fit.objective)
    assert fit.execution.startswith("compiled") and fit.execution.endswith("as requested")
    torch.testing.assert_close(*ends, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_captured_bfloat16_steps_equal_eager_ones(uncompiled):
    fits = {}
    for name, capture in (("bf16", False), ("bf16", True), ("float32", True)):
        fit = fit_svi(
            *tiny(), steps=13, lr=1e-2, seed=0, batch_size=20, capture=capture, precision=name
        )
        fits[name, capture] = fit.objective
        assert fit.execution.startswith("compiled" if capture else "eager")
    eager, captured, full = fits.values()
    torch.testing.assert_close(eager, captured, rtol=0, atol=1e-4)
    assert 1e-5 < float((captured - full).abs().max()) < 0.5


def test_auto_measures_steps_that_are_read_together():
    """On a GPU fifty steps are read at once, so that only every fiftieth has a time of its own."""
    policy = StepPolicy("auto", lambda: None, lambda unroll: None, Schedule(1000, 100, 100_000))
    policy.observe(50, [2.0] * 50, None)
    assert policy.mode == "auto"
    policy.observe(100, [2.0] * 50 + [2.5] * 50, None)
    assert policy.reason == "recorded: about 999.0 s of eager work were left"


@pytest.mark.slow
def test_dead_units_leave_no_denormal_numbers():
    vae = VAE.mlp(6, 2, hidden=(50,), seed=0)
    x = vae.sample(64, seed=1)
    with torch.no_grad():
        vae.decoder[0].bias[:25] = -100.0  # dead
    optimizers = []

    def adam(parameters, lr):
        optimizers.append(torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.9)))
        return optimizers[0]

    fit = fit_svi(
        vae.model, vae.guide, x, steps=1000, optimizer=adam, lr=1e-6, seed=0, capture=True
    )
    assert fit.execution.startswith("compiled")
    tiny_number = torch.finfo(torch.float32).tiny
    for state in optimizers[0].state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            size = state[name].abs()
            assert not bool(((size > 0) & (size < tiny_number)).any())


@pytest.mark.slow
def test_draws_of_the_compiler_have_the_right_mean(float64):
    vae = VAE.mlp(6, 2, hidden=(5,), seed=0).double()
    x = vae.sample(40, seed=1)
    weighted = WeightedObjective(ELBO(kl="sampled"), None)
    batch = MinibatchObjective(Pair(vae.model, vae.guide), weighted, x, None)
    named = find_parameters(batch.pair, lambda: batch.value(None, 1))
    update = OptimizerStep(named, [vae], Optimization(lr=1e-12, optimizer=torch.optim.SGD))
    with isolated_store(), seeded(0):
        eager = torch.stack([batch.value(None, 1).detach() for _ in range(2000)])
        fast = CapturedSteps(batch, update, named, 8, options={"fallback_random": False})
        captured = torch.cat([fast.run_steps([None] * 8, 0) for _ in range(250)])
    error = (eager.var() / len(eager) + captured.var() / len(captured)).sqrt()
    assert abs(float((eager.mean() - captured.mean()) / error)) < oracles.z_limit()
    assert len(set(captured.tolist())) == len(captured)
    assert float(eager.var() / captured.var()) == pytest.approx(1, abs=0.2)
