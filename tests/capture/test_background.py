"""Code that another process compiles while recorded steps go on."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

import oracles
from ppl_vae import ELBO, VAE, CapturedSVI, fit_svi, log_likelihood
from ppl_vae.capture import background, policy
from ppl_vae.capture.background import BackgroundCompilation, lift_constants
from ppl_vae.capture.compile_worker import (
    MEASURED,
    build_graph,
    describe_graph,
    measured_time,
    note_measured_time,
)
from ppl_vae.capture.graph import CompilationError, capture_graph
from ppl_vae.core.state import seeded
from waiting import wait_until

SLEEPING = """
import subprocess, sys, pathlib
child = subprocess.Popen(["sleep", "600"])
(pathlib.Path(sys.argv[1]) / "child").write_text(str(child.pid))
child.wait()
"""
FAILING = """
import sys, pathlib
(pathlib.Path(sys.argv[1]) / "failure.txt").write_text("RuntimeError: no compiler")
sys.exit(1)
"""


def function(x, y):
    """With a constant and random draws."""
    noise = torch.randn(3, 3, dtype=torch.float64)
    return torch.relu(x @ y) + noise, x + torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


@pytest.fixture
def graph():
    arguments = [torch.ones(3, 3).double(), torch.eye(3).double()]
    return capture_graph(function, tuple(arguments), tuple(a + 1 for a in arguments))[0], arguments


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """Replaces the program that compiles."""

    def replace(text):
        (tmp_path / "worker.py").write_text(text)
        monkeypatch.setattr(background, "WORKER", str(tmp_path / "worker.py"))

    return replace


def same_draws(run, other, arguments):
    found = []
    for each in (run, other):
        with seeded(0):
            found.append(each(arguments))
    return found


def test_a_described_graph_is_the_same_function(graph):
    recorded, arguments = graph
    lifted, constants = lift_constants(recorded)
    rebuilt = build_graph(describe_graph(lifted))
    first, second = same_draws(
        lambda a: recorded(*a), lambda a: rebuilt(*a, *constants), arguments
    )
    assert len(constants) == 1 and all(map(torch.equal, first, second))
    assert not torch.equal(first[0], rebuilt(*arguments, *constants)[0])  # draws remain draws


def is_running(number):
    try:
        state = Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_what_is_abandoned_leaves_neither_processes_nor_files(graph, worker):
    worker(SLEEPING)
    compilation = BackgroundCompilation(*graph, {})
    folder = compilation._folder
    wait_until(lambda: (folder / "child").is_file() and (folder / "child").read_text())
    child = int((folder / "child").read_text())
    assert not compilation.is_ready and is_running(child)
    start = time.monotonic()
    compilation.abandon()
    assert time.monotonic() - start < 3.0
    wait_until(lambda: not is_running(child))
    assert not is_running(compilation._process.pid) and not folder.exists()
    compilation.abandon()


def test_the_reason_of_a_failure_is_reported(graph, worker):
    worker(FAILING)
    compilation = BackgroundCompilation(*graph, {})
    wait_until(lambda: compilation.is_ready)
    with pytest.raises(CompilationError, match="RuntimeError: no compiler"):
        compilation.load()
    assert not compilation._folder.exists()


def test_the_time_that_compiling_took_is_kept_beside_its_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert measured_time() is None
    note_measured_time(23.456)
    assert measured_time() == 23.5 and [path.name for path in tmp_path.iterdir()] == [MEASURED]
    (tmp_path / MEASURED).write_text("")
    assert measured_time() is None


@pytest.mark.slow
def test_only_what_is_not_found_in_the_cache_is_measured(graph, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    first = BackgroundCompilation(*graph, {}, recording_seconds=0.01)
    first.load()
    assert 0 < measured_time() <= first.seconds / 0.01 + 1
    (tmp_path / MEASURED).unlink()
    BackgroundCompilation(*graph, {}, recording_seconds=0.01).load()
    assert measured_time() is None


@pytest.fixture
def eager_to_compile(monkeypatch):
    """Compile as soon as something is recorded."""
    monkeypatch.setattr(policy, "RECORDING_CALLS", -100)
    monkeypatch.setattr(policy, "COMPILING_PER_RECORDING", 1e-9)


def pair(seed=0):
    vae = VAE.mlp(6, 2, hidden=(5,), seed=seed).double()
    return (
        vae.model,
        vae.guide,
        torch.from_numpy(oracles.simulate_ppca((3, 2), 0.5, 60, 6, seed=1)),
    )


def fit(capture, **settings):
    model, guide, x = pair()
    settings = {"steps": 120, "batch_size": 20, "lr": 1e-2, "seed": 0, **settings}
    return fit_svi(model, guide, x, capture=capture, progress=False, **settings)


def workers():
    """The folders of compilations."""
    return set(Path(os.environ.get("TMPDIR", "/tmp")).glob("ppl_vae_compile_*"))


def test_a_fit_that_ends_first_abandons_the_compiler(worker, eager_to_compile):
    worker(SLEEPING)
    before, eager = workers(), fit(False)
    found = fit("auto")
    assert found.execution.startswith("recorded: about ")
    assert torch.equal(found.objective, eager.objective)
    assert workers() == before


@pytest.mark.slow
def test_an_interrupted_fit_abandons_the_compiler(worker, eager_to_compile):
    worker(SLEEPING)
    before, started = workers(), []

    def interrupt(step, value):
        started.append(len(workers() - before))
        if step >= 100:
            raise KeyboardInterrupt

    model, guide, x = pair()
    with pytest.raises(KeyboardInterrupt):
        fit_svi(model, guide, x, steps=200, batch_size=20, seed=0, progress=interrupt)
    assert started[-1] == 1 and workers() == before


@pytest.fixture
def wait_until_ready(monkeypatch):
    """Fits wait for the compiler, so that the step at which it ends does not depend on time."""
    ready = background.BackgroundCompilation.is_ready.fget
    waiting = property(lambda self: bool(self._process.wait() is not None and ready(self)))
    monkeypatch.setattr(background.BackgroundCompilation, "is_ready", waiting)


def test_a_compiler_that_fails_leaves_a_recorded_fit(worker, eager_to_compile, wait_until_ready):
    worker(FAILING)
    eager, found = fit(False), fit("auto")
    assert found.execution.startswith("recorded: ") and "no compiler" in found.execution
    assert torch.equal(found.objective, eager.objective)


@pytest.mark.slow
def test_an_evaluation_that_ends_first_abandons_the_compiler(
    worker, eager_to_compile, monkeypatch
):
    worker(SLEEPING)
    at_once = {"cpu": 20, "accelerator": 20}
    monkeypatch.setattr("ppl_vae.evaluation.marginal_likelihood.batching.ROWS_AT_ONCE", at_once)
    model, guide, x = pair()
    before = workers()
    found = log_likelihood(model, guide, x, 50, refine=5, seed=0)
    eager = log_likelihood(model, guide, x, 50, refine=5, seed=0, capture=False)
    assert found.execution.startswith("recorded: about ")
    assert torch.equal(found.value, eager.value) and workers() == before


def resumed_fit(file, stop, steps):
    """A fit that is interrupted after these steps and resumed."""

    def interrupt(step, value):
        if step >= stop:
            raise KeyboardInterrupt

    model, guide, x = pair()
    settings = {"steps": steps, "batch_size": 20, "lr": 1e-2, "seed": 0}
    with pytest.raises(KeyboardInterrupt):
        fit_svi(model, guide, x, progress=interrupt, checkpoint=file, **settings)
    return fit("auto", steps=steps, checkpoint=file)


def test_a_fit_that_was_compiled_in_background_resumes_bit_for_bit(
    uncompiled, eager_to_compile, tmp_path
):
    found = resumed_fit(tmp_path / "fit.pt", 100, 160)
    whole = fit("auto", steps=160)
    assert "as before the checkpoint" in found.execution
    assert torch.equal(found.objective, whole.objective)


def resident_memory():
    """The bytes of memory that this process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_recorded_steps_hold_no_memory_that_grows_with_their_number():
    found = {}

    def measure(step, value):
        found[step] = resident_memory()

    model, guide, x = pair()
    settings = {"steps": 700, "batch_size": 20, "seed": 0, "capture": "recorded"}
    fit_svi(model, guide, x, progress=measure, **settings)
    early = max(held for step, held in found.items() if 150 <= step <= 250)
    # An objective and a time are kept for each step.
    assert found[700] - early < 100 * 500 + 2**18


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_recorded_steps_of_own_loops_hold_no_memory():
    model, guide, x = pair()
    pyro.clear_param_store()
    svi = CapturedSVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), ELBO(), compiled=False)
    held = []
    for _ in range(5):
        for _ in range(150):
            svi.step(x)
        held.append(resident_memory())
    # Memory that is held for each step grows in every interval; other allocations do not.
    assert min(np.diff(held)) < 2**16
    assert svi.execution == "recorded"
    pyro.clear_param_store()


# With the compiler


@pytest.mark.slow
def test_another_process_compiles_the_same_function(graph):
    recorded, arguments = graph
    compilation = BackgroundCompilation(recorded, arguments, {"fallback_random": True})
    wait_until(lambda: compilation.is_ready, 300)
    run = compilation.load()
    first, second = same_draws(lambda a: recorded(*a), run, arguments)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not compilation._folder.exists()


@pytest.mark.slow
def test_compiled_steps_take_over_and_resume_bit_for_bit(
    wait_until_ready, eager_to_compile, tmp_path
):
    resumed = resumed_fit(tmp_path / "fit.pt", 120, 300)
    whole = fit("auto", steps=300)
    assert (
        whole.execution.startswith("compiled, ")
        and "compiled in the background" in whole.execution
    )
    assert torch.equal(resumed.objective, whole.objective)
    eager = fit(False, steps=300)
    torch.testing.assert_close(whole.objective, eager.objective, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_a_compiler_ends_with_the_process_that_started_it(tmp_path):
    program = """
        import os, signal, torch
        from ppl_vae.capture.background import BackgroundCompilation
        from ppl_vae.capture.graph import capture_graph
        x = torch.ones(3)
        graph, _ = capture_graph(torch.exp, (x,), (x + 1,))
        compilation = BackgroundCompilation(graph, [x], {})
        print(compilation._process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert found.returncode == -signal.SIGKILL
    number = int(found.stdout)
    wait_until(lambda: not is_running(number), 60)
    wait_until(lambda: not list(tmp_path.glob("ppl_vae_compile_*")))
