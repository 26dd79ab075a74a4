"""Fits whose process is killed at any moment: the resumed fit equals the uninterrupted one."""

import itertools
import random
import signal
import time

import numpy as np
import pyro
import pytest
import torch

import oracles
from killed import completed, killed_after, killed_at_event
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.models.vae import VAE

X = oracles.simulate_ppca((4.0, 2.0), 1.0, 48, 5, seed=0)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def fit(checkpoint, steps, capture):
    """A fit with minibatches, dropout-like noise of the draws, validation rows and a scheduler."""
    vae = VAE.mlp(5, 2, hidden=(6,), seed=0).double()
    fit_svi(
        vae.model,
        vae.guide,
        X,
        x_val=X[:9] + 0.1,
        steps=steps,
        batch_size=8,
        lr=0.01,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR,
        seed=1,
        capture=capture,
        checkpoint=checkpoint,
        progress=False,
    )
    return [p.detach().clone() for p in vae.parameters()]


class Interrupted:
    """A fit in child processes, each of which resumes from what the last one left.

    Args:
        folder: for the checkpoint and the result.
        steps, capture: those of the fit.
    """

    def __init__(self, folder, steps, capture):
        self.steps, self.capture = steps, capture
        self.checkpoint, self.result = folder / "fit.pt", folder / "result.pt"

    def work(self):
        torch.save(fit(self.checkpoint, self.steps, self.capture), self.result)

    def finish(self):
        """Let the last process run to its end; returns the parameters."""
        assert completed(self.work) == 0
        names = sorted(path.name for path in self.checkpoint.parent.iterdir())
        assert names == ["fit.pt", "result.pt"]
        return torch.load(self.result)


def assert_equal(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_kills_at_operations_on_files(tmp_path):
    """Before, inside and after the writing of a checkpoint."""
    whole = fit(None, 90, False)  # first, so that its imports are made before the forks
    interrupted, rng = Interrupted(tmp_path, 90, False), random.Random(0)
    killed = [killed_at_event(interrupted.work, rng.randrange(3, 14)) for _ in range(4)]
    assert sum(killed) > 2
    assert_equal(interrupted.finish(), whole)


@pytest.mark.slow
def test_kills_at_each_operation_on_files_of_the_first_checkpoint(tmp_path):
    whole = fit(None, 10, False)
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        interrupted = Interrupted(folder, 10, False)
        if not killed_at_event(interrupted.work, number) or number > 9:
            break
        assert_equal(interrupted.finish(), whole)
    assert number > 5


def random_kills(interrupted, number, seconds, rng):
    """Interrupt by signals at random moments; returns the number of processes that were ended."""
    ended = 0
    for _ in range(number):
        chosen = rng.choice(SIGNALS)
        status = killed_after(interrupted.work, rng.uniform(0.0, seconds), chosen)
        assert status in (0, 130, -chosen)
        ended += status != 0
    return ended


def timed_fit(steps, capture):
    start = time.perf_counter()
    return fit(None, steps, capture), time.perf_counter() - start


def test_signals_at_random_moments(tmp_path):
    whole, seconds = timed_fit(120, False)
    interrupted = Interrupted(tmp_path, 120, False)
    assert random_kills(interrupted, 4, 0.6 * seconds, random.Random(0)) > 0
    assert_equal(interrupted.finish(), whole)


@pytest.mark.slow
@pytest.mark.parametrize("capture", [False, True], ids=["eager", "captured"])
def test_a_hundred_signals_at_random_moments(capture, tmp_path, uncompiled):
    whole, seconds = timed_fit(240, capture)
    rng, ended = random.Random(0), 0
    for number in itertools.count():
        folder = tmp_path / str(number)
        folder.mkdir()
        interrupted = Interrupted(folder, 240, capture)
        ended += random_kills(interrupted, rng.randrange(1, 9), 0.7 * seconds, rng)
        assert_equal(interrupted.finish(), whole)
        if ended >= 100:
            break


def test_a_checkpoint_that_cannot_be_written_is_found_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    steps = []
    vae = VAE.mlp(5, 2, seed=0).double()
    with pytest.raises(OSError, match=r"it cannot be written: .*fit\.pt"):
        fit_svi(
            vae.model,
            vae.guide,
            X,
            steps=30,
            checkpoint=tmp_path / "file" / "fit.pt",
            progress=lambda step, value: steps.append(step),
        )
    assert steps == []


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def report_growth(what, used, steps_between=1):
    """Print the growth of the resident memory: the slope of a line through its values."""
    number = np.arange(len(used)) * steps_between
    slope = np.polyfit(number, used, 1)[0]
    first, last = used[0] / 2**20, used[-1] / 2**20
    print(f"\nresident memory: {slope:.0f} bytes per {what}, {first:.1f} MiB to {last:.1f} MiB")


@pytest.mark.slow
def test_memory_does_not_grow_with_steps_and_evaluations(tmp_path):
    """20,000 steps with 500 evaluations and checkpoints; the first quarter fills caches."""
    used = []
    vae = VAE.mlp(5, 2, hidden=(6,), seed=0).double()
    fit_svi(
        vae.model,
        vae.guide,
        X.repeat(40, 0)[: 40 * 8],
        x_val=X,
        steps=20_000,
        batch_size=8,
        seed=0,
        capture=False,
        checkpoint=tmp_path / "fit.pt",
        progress=lambda step, value: used.append(resident_bytes()),
    )
    assert len(used) == 500
    # The first quarter fills caches. Values and times of each step are kept, about 100 bytes a
    # step, and written with each checkpoint.
    report_growth("a step with validation and checkpoints", used[125:], steps_between=40)
    assert max(used[-50:]) - max(used[100:150]) < 16 * 2**20


@pytest.mark.slow
def test_memory_does_not_grow_with_evaluations_and_models():
    """500 evaluations of one pair, and 200 pairs that are fitted, sampled and evaluated."""
    used, vae = [], VAE.mlp(5, 2, hidden=(6,), seed=0).double()
    for _ in range(500):
        log_likelihood(vae.model, vae.guide, X, num_samples=50, seed=0)
        used.append(resident_bytes())
    for seed in range(200):
        other = VAE.mlp(5, 2, hidden=(6,), seed=seed).double()
        fit_svi(other.model, other.guide, X, steps=3, seed=0, progress=False)
        log_likelihood(other.model, other.guide, other.sample(9, seed=0), num_samples=9, seed=0)
        other.reconstruct(X)
        used.append(resident_bytes())
    report_growth("evaluation", used[50:500])
    report_growth("pair that is fitted, sampled and evaluated", used[520:])
    assert max(used[450:500]) - max(used[50:100]) < 4 * 2**20
    assert max(used[-50:]) - max(used[520:570]) < 4 * 2**20
    assert len(pyro.get_param_store()) == 0
