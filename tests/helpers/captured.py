"""The same steps eagerly and captured, for tests that compare the two."""

import pyro
import pytest
import torch

from ppl_vae import ELBO
from ppl_vae.core.introspection import modules_of
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import isolated_store, seeded, train_mode, validation
from ppl_vae.inference.svi.batches.minibatch import MinibatchObjective, WeightedObjective
from ppl_vae.inference.svi.parameters import find_parameters
from ppl_vae.inference.svi.settings import Optimization
from ppl_vae.inference.svi.steps.captured_step import CapturedSteps
from ppl_vae.inference.svi.steps.optimizer_step import OptimizerStep

B = 12
OPTIMIZERS = {
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "adam, decay": lambda p, lr: torch.optim.Adam(p, lr=lr, weight_decay=0.1, betas=(0.8, 0.99)),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr / 10),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr / 10, momentum=0.9, dampening=0.1),
    "nesterov": lambda p, lr: torch.optim.SGD(p, lr=lr / 10, momentum=0.9, nesterov=True),
}


class Steps:
    """The steps of a fit, eager or captured, from given initial values and a fixed seed."""

    def __init__(
        self, model, guide, x, objective=None, optimizer="adam", clip=None, warmup=None, mask=None
    ):
        self.pair = model, guide
        weighted = WeightedObjective(objective or ELBO(), warmup)
        self.minibatch = MinibatchObjective(Pair(model, guide), weighted, x, mask)
        rows = torch.arange(B)
        self.named = find_parameters(self.minibatch.pair, lambda: self.minibatch.value(rows, 1))
        settings = Optimization(lr=1e-2, optimizer=OPTIMIZERS[optimizer], grad_clip=clip)
        self.update = OptimizerStep(self.named, modules_of(model, guide), settings)
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
                    value = self.minibatch.value(some, start + begin + place + 1)
                    values.append(float(value.detach()))
                    self.update.apply(value, some)
        return values


def both_fits(make, x, steps=4, unroll=1, *, compiled=False, size=B, **settings):
    """Objectives, tensors and optimizers after eager and after captured steps."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(len(x), generator=generator)[:size] for _ in range(steps)]
    found = []
    for capture in (False, True):
        pyro.clear_param_store()  # it keeps the trained bare parameters
        with isolated_store():
            with seeded(7):
                model, guide = make()
                run = Steps(model, guide, x, **settings)
            with train_mode(model, guide, training=True):
                values = run.run(rows[:1])
                if capture:
                    captured = CapturedSteps(
                        run.minibatch, run.update, run.named, unroll, compiled=compiled
                    )
                    values += run.run(rows, captured, unroll, start=1)
                else:
                    values += run.run(rows, start=1)
                state = [t.detach().clone() for t in run.update.state]
                found.append((values, state, run.update))
    return found


def assert_equal(found, tolerance=1e-10):
    (eager, tensors, update), (captured, others, other) = found
    assert max(abs(a - b) for a, b in zip(eager, captured, strict=True)) < tolerance
    assert (
        max(float((a - b).abs().max()) for a, b in zip(tensors, others, strict=True)) < tolerance
    )
    states = [list(u.optimizer.state.values()) for u in (update, other)]
    assert len(states[0]) == len(states[1])
    for first, second in zip(*states, strict=True):
        assert first.keys() == second.keys()
        for key, value in first.items():
            if isinstance(value, torch.Tensor):
                assert float((value - second[key]).abs().max()) < tolerance, key
    assert update.scheduler.get_last_lr() == pytest.approx(other.scheduler.get_last_lr())
