"""Importance sampling of log p(x) by several ways: the package's, and loops written by hand.

Each contender is a function of (x, draws, hidden) that makes a function which estimates log p of
every row of x from this number of draws.
"""

import math

import torch
from contenders import HandWritten, vae_of, wait

from ppl_vae import log_likelihood
from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.evaluation.marginal_likelihood.batching import (
    DRAWS_AT_ONCE,
    LogWeightSampler,
    block_size,
)
from ppl_vae.evaluation.marginal_likelihood.call_runner import CallRunner


def package(capture):
    """``log_likelihood`` without what it computes of the weights afterwards (k-hat, errors)."""

    def make(x, draws, hidden):
        vae = vae_of(hidden, x.device).requires_grad_(False)
        pair = Pair(vae.model, vae.guide)
        sampler = LogWeightSampler(CallRunner(capture, 10**9))
        blocks = x.split(block_size(x, draws, refined=False))

        def run():
            values = [torch.logsumexp(sampler(pair, Batch(b), draws), 0) for b in blocks]
            wait(x.device)
            return torch.cat(values) - math.log(draws)

        return run

    return make


def whole(x, draws, hidden):
    """``log_likelihood`` as a user calls it, its verdicts (k-hat a datum) included."""
    vae = vae_of(hidden, x.device)

    def run():
        return log_likelihood(vae.model, vae.guide, x, draws, seed=0, capture=False).value

    return run


def by_hand(compiled):
    """A loop over blocks of draws with the decoder and the densities written out."""

    def make(x, draws, hidden):
        vae = HandWritten(hidden).to(x.device).requires_grad_(False)

        def weights(rows, loc, log_var):
            noise = torch.randn(DRAWS_AT_ONCE, *loc.shape, device=loc.device)
            z = loc + (0.5 * log_var).exp() * noise
            flat = vae.decoder(z.flatten(0, 1)).view(*z.shape[:2], -1)
            error = ((rows - flat) * (-vae.log_scale).exp()).square()
            log_p = -(0.5 * error + vae.log_scale + 0.5 * math.log(2 * math.pi)).sum(-1)
            log_prior = -0.5 * z.square().sum(-1)
            log_q = -0.5 * (noise.square() + log_var).sum(-1)
            return (log_p + log_prior - log_q).double()

        step = torch.compile(weights, dynamic=False) if compiled else weights
        blocks = x.split(block_size(x, draws, refined=False))

        def run():
            values = []
            with torch.no_grad():
                for rows in blocks:
                    loc, log_var = vae.encoder(rows).chunk(2, -1)
                    parts = [step(rows, loc, log_var) for _ in range(draws // DRAWS_AT_ONCE)]
                    values.append(torch.logsumexp(torch.cat(parts), 0))
            wait(x.device)
            return torch.cat(values) - math.log(draws)

        return run

    return make


REFERENCE = "by hand, torch.compile"
IMPORTANCE = {
    REFERENCE: by_hand(compiled=True),
    "by hand, eager": by_hand(compiled=False),
    "log weights, eager": package(False),
    "log weights, compiled": package(True),
    "log_likelihood, eager, with verdicts": whole,
}
