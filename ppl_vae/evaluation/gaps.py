"""Where the ELBO loses its nats: log p - ELBO = approximation gap + amortization gap."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_vae.arguments import ArrayLike, at_least, choose_option
from ppl_vae.evaluation.best import POINTS, Bounds, Search
from ppl_vae.evaluation.compare import FEW_RELIABLE
from ppl_vae.evaluation.likelihood import LogLikelihood, collect, estimate
from ppl_vae.evaluation.local import family_of
from ppl_vae.evaluation.rails import Refiner, block_size, rows_at_once
from ppl_vae.evaluation.weighable import check_weighable
from ppl_vae.families import COVARIANCES
from ppl_vae.objectives import batch_keywords
from ppl_vae.program import ProgramLike, as_observed, notes_of
from ppl_vae.results import Result
from ppl_vae.state import evaluating, isolated_store, seeded

ELBO_DRAWS = 200
"""Draws a datum, about, for each ELBO."""
ROWS = 8
"""Times as many rows go together here as elsewhere, as in the search of a :class:`Refiner`."""
Z = 1.96


@dataclass(frozen=True, repr=False)
class Gaps(Result):
    """log p - ELBO of each datum, split in two.

    With q* the member of the guide's family that is best for each datum,
    log p - ELBO[q] = (log p - ELBO[q*]) + (ELBO[q*] - ELBO[q]).

    Each part has an error of either sign, and may be off to one side: where the search for q*
    left something to gain, as much belongs to the amortization gap instead of the approximation
    gap; where log p is no more than a lower bound, so is the approximation gap.

    Attributes:
        log_likelihood: log p(x_n), exact if it was given, else estimated, in nats.
        elbo: the guide's, in nats.
        best_elbo: ELBO[q*], in nats.
        covariance: the family of q*.
        estimate: how log p was estimated; None if it was given.
        approximation_noise: Monte Carlo standard error of log p(x_n) - ELBO[q*] of each datum,
            of both, in nats.
        amortization_noise: the same of ELBO[q*] - ELBO[q], whose draws are common.
        gained: by each datum in the last block of the search, in nats; a block that lost on
            average was undone. On average less than ``tolerance`` unless the search ended after 20
            blocks. 0 if the best guide was given, NaN if no block was asked for
            (``tolerance=None``).
    """

    log_likelihood: Float[Tensor, " N"]
    elbo: Float[Tensor, " N"]
    best_elbo: Float[Tensor, " N"]
    covariance: str
    estimate: LogLikelihood | None
    approximation_noise: Float[Tensor, " N"]
    amortization_noise: Float[Tensor, " N"]
    gained: Float[Tensor, " N"]

    @property
    def approximation(self) -> float:
        """Mean of log p - ELBO[q*]: what the family costs, in nats a datum."""
        return float((self.log_likelihood - self.best_elbo).mean())

    @property
    def amortization(self) -> float:
        """Mean of ELBO[q*] - ELBO[q]: what reading q off a network costs, in nats a datum."""
        return float((self.best_elbo - self.elbo).mean())

    @property
    def approximation_error(self) -> float:
        """Standard error of :attr:`approximation`: over the data, Monte Carlo part included.

        Draws are independent from datum to datum, so that the spread over data holds theirs.
        """
        return _error(self.log_likelihood - self.best_elbo, self.approximation_noise)

    @property
    def amortization_error(self) -> float:
        """Standard error of :attr:`amortization`: over the data, Monte Carlo part included."""
        return _error(self.best_elbo - self.elbo, self.amortization_noise)

    @property
    def approximation_monte_carlo(self) -> float:
        """The part of :attr:`approximation_error` that more draws would take away."""
        return _of_mean(self.approximation_noise)

    @property
    def amortization_monte_carlo(self) -> float:
        """The part of :attr:`amortization_error` that more draws would take away."""
        return _of_mean(self.amortization_noise)

    @property
    def remaining(self) -> float:
        """How many nats a datum the last block of the search moved ELBO[q*].

        About as much may be left to gain: the approximation gap may be too large by it, and the
        amortization gap too small.
        """
        return abs(float(self.gained.mean()))

    @property
    def approximation_range(self) -> tuple[float, float]:
        """From the lowest to the highest that is plausible: 1.96 errors, and what is one-sided.

        The search may have left something; and with log p reliable for less than 85 % of the
        data there is no highest.
        """
        width, left = Z * self.approximation_error, _known(self.remaining)
        bound = self.estimate is not None and self.estimate.share_reliable < FEW_RELIABLE
        highest = math.inf if bound else self.approximation + width
        return self.approximation - width - left, highest

    @property
    def amortization_range(self) -> tuple[float, float]:
        """From the lowest to the highest that is plausible: 1.96 errors, and what was left."""
        width, left = Z * self.amortization_error, _known(self.remaining)
        return self.amortization - width, self.amortization + width + left

    def __repr__(self) -> str:
        how = "given" if self.estimate is None else "estimated"
        return "\n".join(
            [
                f"Gaps in nats a datum: log p {self.log_likelihood.mean():.3f} ({how}), "
                f"ELBO {self.elbo.mean():.3f}",
                f"  approximation {self.approximation:.3f} +- {self.approximation_error:.3f} "
                f"(best {self.covariance} q a datum)",
                f"  amortization  {self.amortization:.3f} +- {self.amortization_error:.3f}",
                *(f"  {line}" for line in self._notes()),
            ]
        )

    def _notes(self) -> Iterator[str]:
        parts = self.approximation_monte_carlo, self.amortization_monte_carlo
        yield "of these errors Monte Carlo: {:.2g} and {:.2g}".format(*parts)
        if self.remaining > 0:
            yield (
                f"the search's last block moved it by {self.remaining:.2g}: about so much of the "
                "approximation gap may belong to the amortization gap"
            )
        if self.approximation_range[1] == math.inf:
            yield "log p is a lower bound for many data, and so is the approximation gap"
        if self.estimate is not None:
            yield from (f"note: {note}" for note in self.estimate.notes)


def _error(values: Tensor, noise: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else _of_mean(noise)


def _known(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _of_mean(noise: Tensor) -> float:
    return float(noise.square().sum().sqrt() / len(noise))


def gaps(
    model: ProgramLike,
    guide: ProgramLike,
    x: ArrayLike,
    *,
    log_p: Float[Tensor, " N"] | None = None,
    best: ProgramLike | None = None,
    covariance: str | None = None,
    steps: int = 300,
    num_samples: int = 1000,
    tolerance: float | None = 1e-3,
    mask: ArrayLike | None = None,
    rows: Int[Tensor, " R"] | None = None,
    seed: int | None = None,
) -> Gaps:
    """Split log p - ELBO of a pair into approximation and amortization gap.

    Both ELBOs are estimated at the same points, so that their difference is less noisy; see
    :class:`ppl_vae.evaluation.best.Points`. Where log p(x, z) is quadratic in z and q Gaussian,
    with at most 16 latent dimensions, they are exact.

    Args:
        model, guide: any pair under the contract.
        x: the whole data, (N, D).
        log_p: exact log p(x_n) of the rows looked at, if it is known; else it is estimated by
            importance sampling with a full-covariance Gaussian refined from q*.
        best: a guide known to be the best of the family for each datum; else it is sought.
        covariance: the family; by default the guide's own.
        steps: of the search for q*, and of the further refinement.
        num_samples: draws a datum for log p.
        tolerance: the search goes on, in blocks of 50 steps, until one gains less than this, in
            nats a datum (or for 20 blocks); ``gained`` and ``remaining`` say what the last one
            gained. None: not at all.
        mask: True where x is observed; NaN in x says the same.
        rows: look at these rows of x only; by default at all.
        seed: of the draws.

    Raises:
        ValueError: as :func:`~ppl_vae.evaluation.likelihood.log_likelihood`; a tolerance that is
            not positive.

    References:
        Cremer, Li, Duvenaud: Inference suboptimality in variational autoencoders (2018).
    """
    x, mask = as_observed(x, mask, model=model, guide=guide)
    at_least("steps", steps)
    at_least("num_samples", num_samples)
    rows = torch.arange(len(x)) if rows is None else rows
    _check(log_p, len(rows), tolerance)
    size = min(block_size(x, num_samples, refined=True), max(1, ROWS * rows_at_once(x) // POINTS))
    parts, weighed = [], []
    with isolated_store(), seeded(seed), evaluating(model, guide):
        blocks = rows.to(x.device).split(size)
        first = x[blocks[0]], batch_keywords(x, mask, blocks[0])
        check_weighable(model, guide, *first)
        family = covariance or family_of(model, guide, *first)
        choose_option("covariance", family, COVARIANCES)
        search = Search(model, steps=steps, covariance=family, tolerance=tolerance)
        widen = Refiner(model, steps=steps, covariance="full")
        for block_rows in blocks:
            block = x[block_rows], batch_keywords(x, mask, block_rows)
            if best is None:
                optimum, gained = search(guide, *block)
            else:
                optimum, gained = best, torch.zeros(len(block_rows)).double()
            parts.append((*_elbos(model, (guide, optimum), *block), gained))
            if log_p is None:
                weighed.append(estimate(model, widen(optimum, *block), *block, num_samples))
    estimated = None
    if weighed:
        found = collect(weighed, num_samples, "importance", steps)
        estimated = replace(found, notes=notes_of(model, guide))
    value = (
        torch.as_tensor(log_p if estimated is None else estimated.value).detach().double().cpu()
    )
    ours, top, best_noise, noise, gained = (torch.cat(part) for part in zip(*parts, strict=True))
    log_p_noise = 0.0 if estimated is None else estimated.standard_error.double()
    noises = (best_noise.square() + log_p_noise**2).sqrt(), noise
    return Gaps(value.detach().double().cpu(), ours, top, family, estimated, *noises, gained)


def _check(log_p: Any, number: int, tolerance: float | None) -> None:
    if log_p is not None and torch.as_tensor(log_p).shape != (number,):
        raise ValueError(
            f"log_p must have one value for each of {number} rows; its shape is "
            f"{tuple(torch.as_tensor(log_p).shape)}"
        )
    if tolerance is not None and not tolerance > 0:
        raise ValueError(
            f"tolerance must be positive, in nats a datum; got {tolerance}. None: search once"
        )


@torch.no_grad()
def _elbos(
    model: ProgramLike, guides: tuple[ProgramLike, ...], x: Tensor, keywords: dict[str, Any]
) -> tuple[Float[Tensor, " B"], ...]:
    # Of the guide and of the best one, and the errors of the latter and of their difference. The
    # KL is sampled too: where q is close to the posterior the log weights hardly vary, and a
    # closed-form KL would.
    bounds = Bounds(model, guides, x, keywords)
    looks = -(-ELBO_DRAWS // bounds.points().number)
    values = torch.cat([bounds.at(bounds.points()) for _ in range(looks)], 1).cpu()
    ours, top = values
    root = math.sqrt(len(ours))
    return ours.mean(0), top.mean(0), top.std(0) / root, (top - ours).std(0) / root
