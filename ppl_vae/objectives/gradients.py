"""Estimators of a bound's gradient other than plain reparameterization.

A bound depends on the parameters of a pair in three ways: by the densities of the model, by that
of the guide, and by the draws, which are made from the guide's parameters. Estimators differ in
what they make of each. A guide's draws are cut here from what made them, so that each way can be
had alone; which parameters belong to which program is never asked, and they may share some.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vae.core.traces import PairTraces, log_prob, sites
from ppl_vae.objectives.divergences import is_delta


class DetachedSamples(Messenger):
    """A context in which draws are cut: programs go on with values that come from nowhere.

    A point (``Delta``) is no draw: it goes on with its gradient. Replayed values are none either.

    Attributes:
        made: by site, in order, the draws as they were made, with their gradients.
        seen: by site, the cut ones, which is what programs and traces see; they are leaves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}
        self._drawing: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        given = msg["done"] or msg["is_observed"] or site_is_subsample(msg)
        if not given and not is_delta(msg["fn"]):
            self._drawing.add(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        # This context is the outermost: it acts before the trace takes the value down.
        name, value = msg["name"], msg["value"]
        if name in self._drawing:
            self._drawing.remove(name)
            cut = value.detach()
            cut = cut.requires_grad_() if cut.is_floating_point() else cut
            self.made[name], self.seen[name] = value, cut
            msg["value"] = cut

    def log_q(self, run: PairTraces) -> Float[Tensor, "S B"]:
        """The guide's log density of all cut draws, in nats."""
        guide = sites(run.guide)
        terms = [run.per_datum(guide[name], log_prob(guide[name])) for name in self.seen]
        if not terms:
            return next(iter(sites(run.model).values()))["value"].new_zeros(1, 1)
        return torch.stack(torch.broadcast_tensors(*terms)).sum(0)

    def along(self, total: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """A scalar whose gradient is that of ``total`` by way of the draws alone.

        The value means nothing. Draws made from earlier draws hand their slopes on to them.
        """
        seen, made = list(self.seen.values()), list(self.made.values())
        slopes = _slopes(total, seen, None)
        for place in reversed(range(1, len(made))):
            further = _slopes(made[place], seen[:place], slopes[place])
            for earlier, slope in enumerate(further):
                slopes[earlier] = slopes[earlier] + slope
        parts = [(slope * value).sum() for slope, value in zip(slopes, made, strict=True)]
        return torch.stack(parts).sum() if parts else torch.zeros_like(total)


def _slopes(output: Tensor, inputs: Sequence[Tensor], weights: Tensor | None) -> list[Tensor]:
    if not inputs or not output.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    found = torch.autograd.grad(output, inputs, weights, retain_graph=True, allow_unused=True)
    pairs = zip(found, inputs, strict=True)
    return [torch.zeros_like(tensor) if slope is None else slope for slope, tensor in pairs]


def replace_gradient(value: Float[Tensor, ""], source: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """A value with the gradient of another scalar."""
    return value.detach() + (source - source.detach())


def score(
    terms: Float[Tensor, "#S B"], log_q: Float[Tensor, "#S #B"], *, leave_one_out: bool
) -> Float[Tensor, ""]:
    """What has the score-function gradient of E_q[terms], at cut draws.

    It is E[d terms + (terms - baseline) d log q], d at the draws; no draw needs a gradient.

    Args:
        terms: what is averaged, with its gradient.
        log_q: of the draws.
        leave_one_out: for each draw the mean of the datum's other terms is its baseline.

    References:
        Ranganath, Gerrish, Blei: Black box variational inference (2014); Mnih, Rezende:
        Variational inference for Monte Carlo objectives (2016), of the baseline.
    """
    terms, log_q = torch.broadcast_tensors(terms, log_q)
    learned = terms.detach()
    if leave_one_out:
        learned = learned - (learned.sum(0) - learned) / (len(learned) - 1)
    return (terms + learned * log_q).mean()


def sticking_the_landing(
    terms: Float[Tensor, "#S B"],
    log_q: Float[Tensor, "#S #B"],
    draws: DetachedSamples,
    beta: float | Tensor,
) -> Float[Tensor, ""]:
    """What has the gradient of E_q[terms] without the guide's score, which is zero in the mean.

    At the exact posterior every draw has the same gradient, zero in the guide's parameters.

    Args:
        terms: log p(x | z) + beta (log p(z) - log q(z | x)), at cut draws.
        log_q: of the draws.
        draws: that were cut.
        beta: the weight of log q in the terms.

    References:
        Roeder, Wu, Duvenaud: Sticking the landing (2017).
    """
    return (terms + beta * log_q).mean() + draws.along(terms.mean())


def doubly_reparameterized(
    log_weights: Float[Tensor, "S B"], log_q: Float[Tensor, "#S #B"], draws: DetachedSamples
) -> Float[Tensor, ""]:
    """What has the doubly reparameterized gradient of the importance-weighted bound.

    With w~ the weights over their sum: E[sum_s w~_s d log p(x, z_s)], d at the draws, and by way
    of the draws E[sum_s w~_s^2 d log w_s / dz_s dz_s].

    Args:
        log_weights: at cut draws.
        log_q: of the draws.
        draws: that were cut.

    References:
        Tucker, Lawson, Gu, Maddison: Doubly reparameterized gradient estimators for Monte Carlo
        objectives (2019).
    """
    shares = torch.softmax(log_weights.detach(), 0)
    of_model = (shares * (log_weights + log_q)).sum(0).mean()
    return of_model + draws.along((shares.square() * log_weights).sum(0).mean())
