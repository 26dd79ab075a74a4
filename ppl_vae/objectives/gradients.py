"""Estimators of a bound's gradient other than plain reparameterization.

A bound depends on the parameters of a pair in three ways: through the density of the model,
through that of the guide, and through the draws, which are functions of the guide's parameters.
Estimators combine these three parts of the gradient differently. Here the draws are detached from
the graph, so that each part can be computed alone; the model and the guide may share parameters.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vae.core.traces import PairTraces, global_sites, log_prob, per_draw, sites
from ppl_vae.objectives.divergences import is_delta


class DetachedSamples(Messenger):
    """A context in which draws are detached: downstream sites see leaf tensors.

    A point mass (``Delta``) keeps its gradient, and so do replayed values.

    Attributes:
        pathwise: by site, in order, the draws as functions of the parameters.
        detached: by site, the leaf tensors that programs and traces see in their place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pathwise: dict[str, Tensor] = {}
        self.detached: dict[str, Tensor] = {}
        self._drawing: set[str] = set()
        self._overwritten = False

    def _pyro_sample(self, msg: Any) -> None:
        given = msg["done"] or msg["is_observed"] or site_is_subsample(msg)
        if not given and not is_delta(msg["fn"]):
            self._drawing.add(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        # This context is the outermost: it acts before the trace records the value.
        name, value = msg["name"], msg["value"]
        if name in self._drawing:
            self._drawing.remove(name)
            leaf = value.detach()
            leaf = leaf.requires_grad_() if leaf.is_floating_point() else leaf
            self._overwritten = self._overwritten or name in self.detached
            self.pathwise[name], self.detached[name] = value, leaf
            msg["value"] = leaf

    def log_q(self, run: PairTraces) -> Float[Tensor, "#S #B"]:
        """The guide's log density of all detached local draws, in nats; 0 without any."""
        local = [site for name, site in run.drawn.items() if name in self.detached]
        return _total([run.per_datum(site, log_prob(site)) for site in local], run, (1, 1))

    def global_log_q(self, run: PairTraces) -> Float[Tensor, "#S"]:
        """The guide's log density of all detached global draws, in nats; 0 without any."""
        found = global_sites(run.guide)
        of_globals = [site for name, site in found.items() if name in self.detached]
        return _total([per_draw(site, log_prob(site)) for site in of_globals], run, (1,))

    def pathwise_surrogate(self, total: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """A scalar whose gradient is the part of ``total``'s that passes through the draws.

        Its value is arbitrary. Draws that depend on earlier draws pass their gradients on to
        these.

        Raises:
            ValueError: if the pair was run once per draw, as one whose programs read global
                variables in a way that does not allow a plate of samples.
        """
        if self._overwritten:
            raise ValueError(
                "this estimator of the gradient needs a pair that can be run under a plate of "
                "samples, and this one is run once per draw of its global variables (a network "
                "that reads its weights as one matrix?); use gradient='reparameterized'"
            )
        detached, pathwise = list(self.detached.values()), list(self.pathwise.values())
        gradients = _gradients(total, detached, None)
        for place in reversed(range(1, len(pathwise))):
            further = _gradients(pathwise[place], detached[:place], gradients[place])
            for earlier, gradient in enumerate(further):
                gradients[earlier] = gradients[earlier] + gradient
        pairs = zip(gradients, pathwise, strict=True)
        parts = [(gradient * value).sum() for gradient, value in pairs]
        return torch.stack(parts).sum() if parts else torch.zeros_like(total)


def _total(terms: Sequence[Tensor], run: PairTraces, shape: tuple[int, ...]) -> Tensor:
    if not terms:
        return next(iter(sites(run.model).values()))["value"].new_zeros(shape)
    return torch.stack(torch.broadcast_tensors(*terms)).sum(0)


def _gradients(output: Tensor, inputs: Sequence[Tensor], weights: Tensor | None) -> list[Tensor]:
    if not inputs or not output.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    found = torch.autograd.grad(output, inputs, weights, retain_graph=True, allow_unused=True)
    pairs = zip(found, inputs, strict=True)
    return [
        torch.zeros_like(tensor) if gradient is None else gradient for gradient, tensor in pairs
    ]


def check_reparameterized(run: PairTraces) -> None:
    """Check that each site of the guide has a gradient through its draws.

    Raises:
        ValueError: naming the site and the way out.
    """
    for name, site in sites(run.guide).items():
        if not site["fn"].has_rsample:
            raise ValueError(
                f"site {name!r} of the guide has no reparameterized gradient "
                f"({type(site['fn']).__name__}); use ELBO(num_samples, gradient='score-loo') or "
                "pyro.infer.TraceGraph_ELBO for it, or a continuous relaxation"
            )


def replace_gradient(value: Float[Tensor, ""], source: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """A value with the gradient of another scalar."""
    return value.detach() + (source - source.detach())


def score_function(
    terms: Float[Tensor, "*#S"],
    log_q: Float[Tensor, "*#S"],
    *,
    leave_one_out: bool,
    signal: Float[Tensor, "*#S"] | None = None,
) -> Float[Tensor, ""]:
    """A scalar with the score-function gradient of E_q[terms].

    The gradient is E[d terms + (terms - baseline) d log q] at fixed draws, so that no draw needs a
    pathwise gradient.

    Args:
        terms: at detached draws, which are the first dimension.
        log_q: the log density under q of the draws.
        leave_one_out: the baseline of a draw is the mean of the datum's other terms.
        signal: all terms that depend on the draws, where they are more than ``terms``.

    References:
        Ranganath, Gerrish, Blei: Black box variational inference (2014); Mnih, Rezende:
        Variational inference for Monte Carlo objectives (2016), for the baseline.
    """
    weight = (terms if signal is None else signal).detach()
    terms, log_q, weight = torch.broadcast_tensors(terms, log_q, weight)
    if leave_one_out:
        weight = weight - (weight.sum(0) - weight) / (len(weight) - 1)
    return (terms + weight * log_q).mean()


def sticking_the_landing(
    value: Float[Tensor, ""],
    log_q: Float[Tensor, ""],
    draws: DetachedSamples,
    beta: float | Tensor,
) -> Float[Tensor, ""]:
    """A scalar with the gradient of E_q[terms] less the guide's score, whose mean is zero.

    At the exact posterior the gradient in the guide's parameters is zero for every draw.

    It applies to any guide, at the price of a second backward pass through the draws. Guides that
    can build their distributions from detached parameters need none:
    ``ppl_vae.evaluation.local_guides.local_guide.StickTheLanding``.

    Args:
        value: the mean of log p(x | z) + beta (log p(z) - log q(z | x)), at detached draws.
        log_q: the mean of log q(z | x) in it.
        draws: their record.
        beta: the weight of log q in the terms.

    References:
        Roeder, Wu, Duvenaud: Sticking the landing (2017).
    """
    return value + beta * log_q + draws.pathwise_surrogate(value)


def doubly_reparameterized(
    log_weights: Float[Tensor, "S B"], log_q: Float[Tensor, "#S #B"], draws: DetachedSamples
) -> Float[Tensor, ""]:
    """A scalar with the doubly reparameterized gradient of the importance-weighted bound.

    With normalised weights v_s = w_s / sum_t w_t and draws z_s(phi), the gradient of
    E log (1/S sum_s w_s) is, in the model's parameters theta,

        E[sum_s v_s d log p(x, z_s) / d theta],

    and in the guide's parameters phi, instead of E[sum_s v_s d log w_s / d phi],

        E[sum_s v_s^2 (d log w_s / d z_s) (d z_s / d phi)],

    which has the same mean and, unlike it, a signal-to-noise ratio that grows with S.

    Args:
        log_weights: at detached draws.
        log_q: the log density under q of the draws.
        draws: their record.

    References:
        Tucker, Lawson, Gu, Maddison: Doubly reparameterized gradient estimators for Monte Carlo
        objectives (2019).
    """
    normalised = torch.softmax(log_weights.detach(), 0)
    of_model = (normalised * (log_weights + log_q)).sum(0).mean()
    return of_model + draws.pathwise_surrogate((normalised.square() * log_weights).sum(0).mean())
