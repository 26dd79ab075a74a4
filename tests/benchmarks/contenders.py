"""Ways to train one and the same VAE: 784-H-20-H-784, Gaussian with a shared scale, Adam.

Each contender is a function of (x, rows, hidden) that makes a function which trains on the batches
``x[rows[0]], x[rows[1]], ...``, one Adam step each, and waits for the last to be done.
"""

import math

import pyro
import torch
from pyro.infer import SVI, JitTrace_ELBO, JitTraceMeanField_ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from ppl_vae import ELBO, VAE, CapturedSVI
from ppl_vae.core.devices.accelerators import synchronize
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import isolated_store, precision, validation
from ppl_vae.inference.svi.batches.minibatch import MinibatchObjective, WeightedObjective
from ppl_vae.inference.svi.parameters import find_parameters
from ppl_vae.inference.svi.settings import Optimization
from ppl_vae.inference.svi.steps.captured_step import CapturedSteps
from ppl_vae.inference.svi.steps.optimizer_step import OptimizerStep
from ppl_vae.inference.svi.steps.recorded_gradient import RecordedGradient

LATENT, RATE = 20, 1e-3


def vae_of(hidden, device):
    return VAE.mlp(784, LATENT, hidden=(hidden,), seed=0).to(device)


def wait(device):
    if device.type != "cpu":
        synchronize()


def stock(loss, checked=False, kind=SVI):
    """``pyro.infer.SVI`` or `CapturedSVI`, with argument checks or without."""

    def make(x, rows, hidden):
        vae = vae_of(hidden, x.device)
        svi = kind(vae.model, vae.guide, pyro.optim.Adam({"lr": RATE}), loss())

        def run():
            with validation(checked):
                for some in rows:
                    svi.step(x[some])

        return run

    return make


def parts_of_a_step(x, rows, hidden):
    """The objective, the parameters by name, and the optimizer's step."""
    vae = vae_of(hidden, x.device)
    pair = Pair(vae.model, vae.guide)
    batch = MinibatchObjective(pair, WeightedObjective(ELBO(), None), x, None)
    named = find_parameters(pair, lambda: batch.value(rows[0], 1))
    return batch, named, OptimizerStep(named, pair.modules, Optimization(lr=RATE))


def recorded(x, rows, hidden):
    """The step of ``fit_svi`` as recorded operations, without compiling."""
    batch, named, update = parts_of_a_step(x, rows, hidden)
    gradient = RecordedGradient(batch, named)

    def run():
        with isolated_store(), validation(False):
            for some in rows:
                gradient.value(some, 1)
                update.update(some)
        wait(x.device)

    return run


def ours(unroll, numbers="float32", compiled=True):
    """The step of ``fit_svi``: eager (0), or compiled with this many steps per call."""

    def make(x, rows, hidden):
        batch, named, update = parts_of_a_step(x, rows, hidden)
        fast = None
        if unroll:
            fast = CapturedSteps(batch, update, named, unroll, compiled=compiled)

        def run():
            with isolated_store(), validation(False), precision(numbers, x.device):
                for start in range(0, len(rows), max(unroll, 1)):
                    if fast is None:
                        update.apply(batch.value(rows[start], 1), rows[start])
                    else:
                        fast.run_steps(rows[start : start + unroll], start)
            wait(x.device)

        return run

    return make


class HandWritten(nn.Module):
    """The same VAE without Pyro, as one writes it by hand."""

    def __init__(self, hidden):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 2 * LATENT)
        )
        self.decoder = nn.Sequential(nn.Linear(LATENT, hidden), nn.ReLU(), nn.Linear(hidden, 784))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        loc, log_var = self.encoder(x).chunk(2, -1)
        z = loc + (0.5 * log_var).exp() * torch.randn_like(loc)
        error = ((x - self.decoder(z)) * (-self.log_scale).exp()).square()
        constant = self.log_scale + 0.5 * math.log(2 * math.pi)
        log_p = -(0.5 * error + constant).sum(-1)
        kl = 0.5 * (log_var.exp() + loc.square() - 1 - log_var).sum(-1)
        return (kl - log_p).mean()


def by_hand(compiled):
    """Plain PyTorch with fused Adam; its loss as it is, or through ``torch.compile``."""

    def make(x, rows, hidden):
        torch.manual_seed(0)
        vae = HandWritten(hidden).to(x.device)
        optimizer = torch.optim.Adam(vae.parameters(), lr=RATE, fused=True)
        loss_of = torch.compile(vae, dynamic=False) if compiled else vae

        def run():
            for some in rows:
                optimizer.zero_grad(set_to_none=True)
                loss_of(x[some]).backward()
                optimizer.step()
            wait(x.device)

        return run

    return make


REFERENCE = "pyro.infer.SVI, Trace_ELBO"
COMPILED_FIT = "fit_svi, compiled, 8 steps per call"
TRAINING = {
    REFERENCE: stock(Trace_ELBO),
    "pyro.infer.SVI, Trace_ELBO, validating": stock(Trace_ELBO, checked=True),
    "pyro.infer.SVI, TraceMeanField_ELBO": stock(TraceMeanField_ELBO),
    "pyro.infer.SVI, TraceMeanField_ELBO, validating": stock(TraceMeanField_ELBO, checked=True),
    "pyro.infer.SVI, JitTrace_ELBO": stock(JitTrace_ELBO),
    "pyro.infer.SVI, JitTraceMeanField_ELBO": stock(JitTraceMeanField_ELBO),
    "by hand, eager, fused Adam": by_hand(compiled=False),
    "by hand, torch.compile, fused Adam": by_hand(compiled=True),
    "fit_svi, eager": ours(0),
    "fit_svi, recorded": recorded,
    "CapturedSVI, Trace_ELBO": stock(Trace_ELBO, kind=CapturedSVI),
    "fit_svi, compiled, 1 step a call": ours(1),
    COMPILED_FIT: ours(8),
}
