"""Estimates of the ELBOs of a pair under q and q*, and of log p, batch by batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.processes.divided_rows import DividedRows
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.stats import monte_carlo_error, standard_error
from ppl_vae.core.validation import check_int, check_option
from ppl_vae.evaluation.inference_gaps.family import Family
from ppl_vae.evaluation.inference_gaps.local_optimum import CommonNoiseELBO, LocalOptimum
from ppl_vae.evaluation.inference_gaps.result import NORMAL_QUANTILE, Gaps, error_of_mean
from ppl_vae.evaluation.marginal_likelihood.batching import LogWeightSampler, rows_at_once
from ppl_vae.evaluation.marginal_likelihood.call_runner import CallRunner
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.evaluation.marginal_likelihood.importance import combine, weight_summary
from ppl_vae.evaluation.marginal_likelihood.local_vi import LocalVI
from ppl_vae.evaluation.marginal_likelihood.reliability import WeightSummary
from ppl_vae.guides.families import COVARIANCES

ELBO_DRAWS = 200
"""The approximate number of draws per datum for each ELBO."""


@dataclass(frozen=True)
class GapSettings:
    """Arguments of :func:`ppl_vae.gaps`.

    Raises:
        ValueError: if one of them cannot be used.
    """

    covariance: str | None
    best: ProgramLike | None
    steps: int
    num_samples: int
    tolerance: float | None
    num_global_draws: int
    capture: bool | str = "auto"

    def __post_init__(self) -> None:
        check_int("steps", self.steps)
        check_int("num_samples", self.num_samples)
        check_int("num_global_draws", self.num_global_draws, 2)
        if self.covariance is not None:
            check_option("covariance", self.covariance, COVARIANCES)
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(
                f"tolerance must be positive, in nats per datum; got {self.tolerance}. With None "
                "there are no further rounds"
            )

    def __str__(self) -> str:
        names = ("covariance", "steps", "num_samples", "tolerance", "num_global_draws")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class _ELBOs(NamedTuple):
    """The ELBOs of a batch under the guide's own q and under q*, with Monte Carlo errors, in nats.

    Attributes:
        own, best: the ELBOs.
        own_error, best_error, difference_error: standard errors of both and of their difference.
        last_gain: the gain of the last round of the search for q*.
    """

    own: Float[Tensor, " B"]
    best: Float[Tensor, " B"]
    own_error: Float[Tensor, " B"]
    best_error: Float[Tensor, " B"]
    difference_error: Float[Tensor, " B"]
    last_gain: Float[Tensor, " B"]


class GapEstimator:
    """Searches for q* and estimates the ELBOs and log p, batch by batch.

    Args:
        pair: the pair.
        family: the family of q*.
        settings: the arguments of :func:`ppl_vae.gaps`.
        make_runner: makes what decides whether calls run eagerly, recorded or compiled, from the
            number of calls of a batch.
    """

    def __init__(
        self,
        pair: Pair,
        family: Family,
        settings: GapSettings,
        make_runner: Callable[[int], CallRunner],
    ) -> None:
        self.pair, self.family, best = pair, family, settings.best
        self.best = None if best is None else pair.with_guide(best)
        self.steps, self.num_samples = settings.steps, settings.num_samples
        self.local_optimum = LocalOptimum(
            steps=self.steps,
            covariance=family.name,
            tolerance=settings.tolerance,
            make_runner=make_runner,
        )
        runner = make_runner(self.steps)
        self.full_covariance = LocalVI(steps=self.steps, covariance="full", runner=runner)
        self.make_runner = make_runner
        self.samplers: dict[str, LogWeightSampler] = {}
        self.has_best = best is not None or family.searchable
        self.elbos: list[_ELBOs] = []
        self.summaries: dict[str, list[WeightSummary]] = {}

    def evaluate(self, batch: Batch, *, estimates_log_p: bool) -> None:
        """Estimate the ELBOs of a batch and, on request, log p."""
        last_gain = torch.zeros(len(batch)).double()
        if self.best is not None or not self.has_best:
            best = self.best or self.pair
        else:
            best, last_gain = self.local_optimum(self.pair, batch)
        self.elbos.append(_ELBOs._make((*_elbos(self.pair, best, batch), last_gain)))
        if estimates_log_p:
            self._estimate_log_p(best, batch)

    def _estimate_log_p(self, best: Pair, batch: Batch) -> None:
        proposals: dict[str, Pair] = {}
        if self.family.gaussian:
            proposals["refined"] = self.full_covariance(best, batch)
        if not self.family.gaussian or self.family.name not in COVARIANCES:
            proposals["own"] = best
        num_calls = self.num_samples * len(batch) // rows_at_once(batch.x)
        for name, proposal in proposals.items():
            if name not in self.samplers:
                self.samplers[name] = LogWeightSampler(self.make_runner(num_calls))
            summary = weight_summary(self.samplers[name], proposal, batch, self.num_samples)
            self.summaries.setdefault(name, []).append(summary)

    def of_all_rows(self, division: DividedRows) -> "GapEstimator":
        """The estimates of the rows of all processes."""
        self.elbos = [division.gather_columns(_joined(_ELBOs, self.elbos))]
        self.summaries = {
            name: [division.gather_columns(_joined(WeightSummary, parts))]
            for name, parts in self.summaries.items()
        }
        return self

    def result(self, log_p: Any) -> Gaps:
        """The gaps of all batches, with the given log p or else the estimated one."""
        estimate = None if log_p is not None else self._best_estimate()
        value: Any = log_p if estimate is None else estimate.value
        error = torch.zeros(()) if estimate is None else estimate.standard_error.double()
        (elbos,) = self.elbos
        reason = "" if self.best is not None else self.family.unsplit_reason
        kept = torch.zeros(len(elbos.own), dtype=torch.bool)
        if not self.has_best:
            nan = torch.full_like(elbos.own, math.nan)
            elbos = elbos._replace(best=nan, best_error=nan, difference_error=nan)
        elif not reason:
            kept = _failed(elbos.best - elbos.own, elbos.difference_error, each=self.best is None)
        return Gaps(
            log_likelihood=value.detach().double().cpu(),
            elbo=elbos.own,
            best_elbo=torch.where(kept, elbos.own, elbos.best),
            covariance=self.family.name,
            estimate=estimate,
            approximation_mc_error=torch.where(kept, elbos.own_error, elbos.best_error).hypot(
                error.double()
            ),
            amortization_mc_error=torch.where(kept, 0.0, elbos.difference_error),
            last_gain=elbos.last_gain,
            total_mc_error=elbos.own_error.hypot(error.double()),
            kept_own_q=kept,
            unsplit_reason=reason,
        )

    def _best_estimate(self) -> LogLikelihood:
        estimates = [
            combine(parts, self.num_samples, "importance", self.steps if name == "refined" else 0)
            for name, parts in self.summaries.items()
        ]
        return replace(_closest(estimates), notes=self.pair.notes())


def _joined(kind: Any, parts: Sequence[Any]) -> Any:
    return kind(*map(torch.cat, zip(*parts, strict=True)))


def _closest(estimates: list[LogLikelihood]) -> LogLikelihood:
    """The estimate with the smallest error, unless another is higher by more than the errors.

    Each is a lower bound in expectation, so that a higher one is closer to log p.
    """
    best, *others = sorted(estimates, key=_error)
    for other in others:
        if float((other.value - best.value).mean()) > NORMAL_QUANTILE * math.hypot(
            _error(other), _error(best)
        ):
            best = other
    return best


def _error(estimate: LogLikelihood) -> float:
    return monte_carlo_error(estimate.standard_error.double())


def _failed(
    gain: Float[Tensor, " N"], error: Float[Tensor, " N"], *, each: bool
) -> Bool[Tensor, " N"]:
    """The data for which the q that was found is significantly worse than the guide's own.

    With ``each``, these are the data with a loss of three errors; they are all data if the mean
    over the remaining ones is significantly negative.
    """
    failed = gain < -3 * error if each else torch.zeros_like(gain, dtype=torch.bool)
    rest, rest_error = torch.where(failed, 0.0, gain), torch.where(failed, 0.0, error)
    mean_error = min(error_of_mean(rest, rest_error), monte_carlo_error(rest_error))
    return failed | bool(rest.mean() < -NORMAL_QUANTILE * mean_error)


@torch.no_grad()
def _elbos(own: Pair, best: Pair, batch: Batch) -> tuple[Float[Tensor, " B"], ...]:
    """The ELBOs of both pairs, their errors and that of their difference.

    The KL is sampled too: where q is close to the posterior, the log weights have little variance,
    which would be lost with a closed-form KL.
    """
    elbo = CommonNoiseELBO([own, best], batch)
    num_rules = -(-ELBO_DRAWS // elbo.rule().num_points)
    values = torch.cat([elbo.estimates(elbo.rule()) for _ in range(num_rules)], 1).cpu()
    errors = standard_error(torch.cat([values, values[1:] - values[:1]]).mT)
    return *values.mean(1), *errors
