"""Reference log weights of a pair, by explicit loops over draws and data."""

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample


class Recorder(Messenger):
    """Records every latent value drawn in the context, in order; replayed values count once.

    Attributes:
        values: the drawn tensors of each site.
        data_dims: for each site, the dimension of its value (counted from the right) that runs
            over data.
    """

    def __init__(self):
        super().__init__()
        self.values, self.data_dims = {}, {}

    def _pyro_post_sample(self, msg):
        if msg["is_observed"] or site_is_subsample(msg):
            return
        drawn = self.values.setdefault(msg["name"], [])
        if not any(msg["value"] is value for value in drawn):
            drawn.append(msg["value"])
        (dim,) = (f.dim for f in msg["cond_indep_stack"] if f.name == "data")
        self.data_dims[msg["name"]] = dim - msg["fn"].event_dim

    def draws(self, num_samples):
        """One dictionary of values per draw, whether a run had one draw or all."""
        return [
            {name: self._draw(name, s, num_samples) for name in self.values}
            for s in range(num_samples)
        ]

    def _draw(self, name, s, num_samples):
        values = self.values[name]
        if len(values) == num_samples:  # one run per draw
            return values[s]
        (value,) = values
        if value.dim() + self.data_dims[name] == 0:  # one run on repeated rows
            return value.unflatten(0, (num_samples, -1))[s]
        assert len(value) == num_samples  # one run under a plate of samples
        return value[s]

    def row(self, draw, n):
        """The values of one datum, as a batch of size one."""
        return {k: v.narrow(self.data_dims[k], n, 1) for k, v in draw.items()}


def log_joint(program, values, x, **kwargs):
    """The sum of a program's unscaled log densities, its latent sites conditioned on values."""
    with pyro.get_param_store().scope(pyro.get_param_store().get_state()):
        trace = poutine.trace(poutine.condition(program, data=values)).get_trace(x, **kwargs)
        trace.compute_log_prob()
        sites = [s for s in trace.nodes.values() if s["type"] == "sample"]
        return sum(s["unscaled_log_prob"].sum() for s in sites if not site_is_subsample(s))


def slow_log_joints(program, x, recorder, num_samples):
    """A program's log density at the recorded draws, one draw and one datum at a time, (S, N)."""
    draws = recorder.draws(num_samples)
    rows = [[(recorder.row(draw, n), x[n : n + 1]) for n in range(len(x))] for draw in draws]
    return torch.stack(
        [torch.stack([log_joint(program, z, x_n) for z, x_n in row]) for row in rows]
    )


def slow_log_weights(model, guide, x, recorder, num_samples):
    """log p(x_n, z_sn) - log q(z_sn | x_n) from the recorded draws, (S, N)."""
    joint, q = (slow_log_joints(p, x, recorder, num_samples) for p in (model, guide))
    return joint - q


def slow_joint_log_weights(model, guide, x, recorder, num_samples):
    """The sum of the log weights over data, (S,): for programs with one table row per datum."""
    draws = recorder.draws(num_samples)
    return torch.stack([log_joint(model, z, x) - log_joint(guide, z, x) for z in draws])
