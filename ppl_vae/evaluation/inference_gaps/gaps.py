"""Where the ELBO loses its nats: log p - ELBO = approximation gap + amortization gap."""

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike, as_data_and_mask, notes_of
from ppl_vae.core.state import eval_mode, isolated_store, seeded
from ppl_vae.core.validation import ArrayLike, check_int, check_option
from ppl_vae.evaluation.inference_gaps.family import Family, family_of
from ppl_vae.evaluation.inference_gaps.local_optimum import POINTS, CommonNoiseELBO, LocalOptimum
from ppl_vae.evaluation.inference_gaps.result import Gaps, Z, error_of_mean, monte_carlo_error
from ppl_vae.evaluation.marginal_likelihood.batching import LocalVI, block_size, rows_at_once
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.evaluation.marginal_likelihood.importance import collect, estimate
from ppl_vae.evaluation.marginal_likelihood.reliability import WeightSummary
from ppl_vae.guides.families import COVARIANCES
from ppl_vae.objectives.bounds import batch_keywords
from ppl_vae.objectives.divergences import check_importance_samplable

ELBO_DRAWS = 200
"""Draws per datum, about, for each ELBO."""
ROWS = 8
"""Times as many rows go together here as elsewhere, as in the search of a :class:`LocalVI`."""


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

    The family is that of the guide's own q: a Gaussian with one of the covariances of
    :mod:`ppl_vae.guides.families`, or any class of distributions with parameters and
    reparameterized draws, all of whose parameters are then free for each datum (low-rank
    Gaussians, Gamma and Student distributions, Gaussians through affine maps, a product of
    several). The gap is not split, and :attr:`Gaps.unsplit` says why, where the guide's q is none
    of these: a flow with weights that all data share, a site whose q depends on the draw of
    another, auxiliary sites, mixtures and discrete sites.

    All ELBOs are estimated at the same points, so that their difference is less noisy; see
    :class:`ppl_vae.evaluation.inference_gaps.local_optimum.SphericalRadialRule`. Where log p(x, z)
    is quadratic in z and q Gaussian, with at most 16 numbers to draw per datum, they are exact.

    Args:
        model, guide: any pair under the contract.
        x: the whole data, (N, D).
        log_p: exact log p(x_n) of the rows looked at, if it is known; else it is estimated by
            importance sampling with a full-covariance Gaussian refined from q*, or, where q* is
            no such Gaussian, with that or with q* (the guide itself, if none was sought): the
            one with the smaller error, unless the other's mean is higher by more than both errors
            (they are lower bounds in expectation).
        best: a guide known to be the best of the family for each datum; else it is sought.
        covariance: the family, a covariance; by default the guide's own family.
        steps: of the search for q*, and of the further refinement.
        num_samples: draws per datum for log p.
        tolerance: the search goes on, in blocks of 50 steps, until one gains less than this, in
            nats per datum (or for 20 blocks); ``gained`` and ``remaining`` say what the last one
            gained. None: not at all.
        mask: True where x is observed; NaN in x says the same.
        rows: look at these rows of x only; by default at all.
        seed: of the draws.

    Raises:
        ValueError: as :func:`~ppl_vae.evaluation.marginal_likelihood.importance.log_likelihood`; a
            tolerance that is not positive.

    References:
        Cremer, Li, Duvenaud: Inference suboptimality in variational autoencoders (2018).
    """
    x, mask = as_data_and_mask(x, mask, model=model, guide=guide)
    check_int("steps", steps)
    check_int("num_samples", num_samples)
    if covariance is not None:
        check_option("covariance", covariance, COVARIANCES)
    rows = torch.arange(len(x)) if rows is None else rows
    _check(log_p, len(rows), tolerance)
    size = min(block_size(x, num_samples, refined=True), max(1, ROWS * rows_at_once(x) // POINTS))
    with isolated_store(), seeded(seed), eval_mode(model, guide):
        blocks = rows.to(x.device).split(size)
        first = x[blocks[0]], batch_keywords(x, mask, blocks[0])
        check_importance_samplable(Pair(model, guide), Batch(first[0], **first[1]))
        family = family_of(model, guide, *first, covariance)
        work = _Work(model, guide, family, best, steps, num_samples, tolerance)
        for block_rows in blocks:
            work.do(x[block_rows], batch_keywords(x, mask, block_rows), log_p is None)
    return work.result(log_p)


class _Work:
    """The search for q*, the ELBOs and the estimates of log p, block by block.

    Args:
        model, guide: the pair.
        family: of q*.
        best: a guide known to be q*, if there is one.
        steps, num_samples, tolerance: see :func:`gaps`.
    """

    def __init__(
        self,
        model: ProgramLike,
        guide: ProgramLike,
        family: Family,
        best: ProgramLike | None,
        steps: int,
        num_samples: int,
        tolerance: float | None,
    ) -> None:
        self.model, self.guide, self.family, self.best = model, guide, family, best
        self.steps, self.num_samples = steps, num_samples
        self.search = LocalOptimum(model, steps=steps, covariance=family.name, tolerance=tolerance)
        self.widen = LocalVI(model, steps=steps, covariance="full")
        self.sought = best is not None or family.sought
        self.parts: list[tuple[Tensor, ...]] = []
        self.weighed: dict[str, list[WeightSummary]] = {}

    def do(self, x: Tensor, keywords: dict[str, Any], estimating: bool) -> None:
        """All that there is to do for a block of data."""
        gained = torch.zeros(len(x)).double()
        if self.best is not None or not self.sought:
            optimum = self.best or self.guide
        else:
            optimum, gained = self.search(self.guide, x, keywords)
        values = _elbos(self.model, (self.guide, optimum), x, keywords)
        self.parts.append((*values, gained))
        if estimating:
            self._estimate(optimum, x, keywords)

    def _estimate(self, optimum: ProgramLike, x: Tensor, keywords: dict[str, Any]) -> None:
        proposals: dict[str, ProgramLike] = {}
        if self.family.gaussian:
            proposals["refined"] = self.widen(optimum, x, keywords)
        if not self.family.gaussian or self.family.name not in COVARIANCES:
            proposals["own"] = optimum
        for name, proposal in proposals.items():
            found = estimate(self.model, proposal, x, keywords, self.num_samples)
            self.weighed.setdefault(name, []).append(found)

    def result(self, log_p: Any) -> Gaps:
        """The blocks together; log p as it was given, if it was."""
        estimated = None if log_p is not None else self._best_estimate()
        value = torch.as_tensor(log_p if estimated is None else estimated.value)
        error = torch.zeros(()) if estimated is None else estimated.standard_error
        ours, top, noise, best_noise, between, gained = map(
            torch.cat, zip(*self.parts, strict=True)
        )
        unsplit = "" if self.best is not None else self.family.why
        kept = torch.zeros(len(ours), dtype=torch.bool)
        if not self.sought:
            top, best_noise, between = (torch.full_like(ours, math.nan) for _ in range(3))
        elif not unsplit:
            kept = _failed(top - ours, between, each=self.best is None)
        return Gaps(
            log_likelihood=value.detach().double().cpu(),
            elbo=ours,
            best_elbo=torch.where(kept, ours, top),
            covariance=self.family.name,
            estimate=estimated,
            approximation_noise=torch.where(kept, noise, best_noise).hypot(error.double()),
            amortization_noise=torch.where(kept, 0.0, between),
            gained=gained,
            total_noise=noise.hypot(error.double()),
            kept=kept,
            unsplit=unsplit,
        )

    def _best_estimate(self) -> LogLikelihood:
        found = [
            collect(parts, self.num_samples, "importance", self.steps if name == "refined" else 0)
            for name, parts in self.weighed.items()
        ]
        return replace(_closest(found), notes=notes_of(self.model, self.guide))


def _closest(found: list[LogLikelihood]) -> LogLikelihood:
    """The estimate with the smallest error, unless another is higher by more than the errors.

    Each is a lower bound in expectation, so that the higher is the closer.
    """
    best, *others = sorted(found, key=_noise)
    for other in others:
        if float((other.value - best.value).mean()) > Z * math.hypot(_noise(other), _noise(best)):
            best = other
    return best


def _noise(found: LogLikelihood) -> float:
    return monte_carlo_error(found.standard_error.double())


def _failed(
    gain: Float[Tensor, " N"], noise: Float[Tensor, " N"], *, each: bool
) -> Bool[Tensor, " N"]:
    """For which data what was found is worse than the guide's own q, by more than its error.

    That is ``each`` datum for which it is by three errors, and all of them if it is on average.
    """
    failed = gain < -3 * noise if each else torch.zeros_like(gain, dtype=torch.bool)
    rest, left = torch.where(failed, 0.0, gain), torch.where(failed, 0.0, noise)
    error = min(error_of_mean(rest, left), monte_carlo_error(left))
    return failed | bool(rest.mean() < -Z * error)


def _check(log_p: Any, number: int, tolerance: float | None) -> None:
    if log_p is not None and torch.as_tensor(log_p).shape != (number,):
        raise ValueError(
            f"log_p must have one value for each of {number} rows; its shape is "
            f"{tuple(torch.as_tensor(log_p).shape)}"
        )
    if tolerance is not None and not tolerance > 0:
        raise ValueError(
            f"tolerance must be positive, in nats per datum; got {tolerance}. None: search once"
        )


@torch.no_grad()
def _elbos(
    model: ProgramLike,
    guides: tuple[ProgramLike, ProgramLike],
    x: Tensor,
    keywords: dict[str, Any],
) -> tuple[Float[Tensor, " B"], ...]:
    # Of the guide and of the best one; the errors of both and of their difference. The KL is
    # sampled too: where q is close to the posterior the log weights hardly vary, and a
    # closed-form KL would.
    bounds = CommonNoiseELBO(model, guides, x, keywords)
    looks = -(-ELBO_DRAWS // bounds.points().number)
    values = torch.cat([bounds.at(bounds.points()) for _ in range(looks)], 1).cpu()
    errors = torch.cat([values, values[1:] - values[:1]]).std(1) / math.sqrt(values.shape[1])
    return *values.mean(1), *errors
