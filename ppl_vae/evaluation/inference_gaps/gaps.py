"""The inference gap, log p - ELBO = approximation gap + amortization gap."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppl_vae.core.arrays.digest import describe_tensor
from ppl_vae.core.arrays.inputs import labels_of
from ppl_vae.core.batch import Batch
from ppl_vae.core.global_sites import conditioned
from ppl_vae.core.pair import Pair
from ppl_vae.core.processes.shared_rows import SharedRows
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import isolated_store, seeded
from ppl_vae.core.stats import standard_error
from ppl_vae.core.validation import ArrayLike, as_vector, check_int, check_option
from ppl_vae.data.sources.row_stream import describe_rows
from ppl_vae.evaluation.inference_gaps.family import Family, family_of
from ppl_vae.evaluation.inference_gaps.global_draws import average_over_draws
from ppl_vae.evaluation.inference_gaps.local_optimum import (
    MAX_POINTS,
    CommonNoiseELBO,
    LocalOptimum,
)
from ppl_vae.evaluation.inference_gaps.result import Gaps, Z, error_of_mean, monte_carlo_error
from ppl_vae.evaluation.marginal_likelihood.batching import (
    LogWeightSampler,
    block_size,
    rows_at_once,
)
from ppl_vae.evaluation.marginal_likelihood.call_runner import CallRunner
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.evaluation.marginal_likelihood.importance import combine, weight_summary
from ppl_vae.evaluation.marginal_likelihood.local_vi import LocalVI
from ppl_vae.evaluation.marginal_likelihood.reliability import WeightSummary
from ppl_vae.guides.families import COVARIANCES
from ppl_vae.objectives.divergences import check_importance_samplable, check_latents

ELBO_DRAWS = 200
"""The approximate number of draws per datum for each ELBO."""
ROWS_FACTOR = 8
"""The number of rows at once relative to other evaluations, as in :class:`LocalVI`."""


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
    num_global_draws: int = 8,
    mask: ArrayLike | None = None,
    rows: Int[Tensor, " R"] | None = None,
    capture: bool | str = "auto",
    seed: int | None = None,
) -> Gaps:
    """Split log p - ELBO of a pair into the approximation gap and the amortization gap.

    The family is that of the guide's own q: a Gaussian with one of the covariances of
    :mod:`ppl_vae.guides.families`, or any class of distributions with parameters and
    reparameterized draws, all of whose parameters are then free for each datum (low-rank
    Gaussians, Gamma and Student distributions, Gaussians through affine maps, a product of
    several). For any other q the gap is not split, and ``Gaps.unsplit_reason`` states why: a
    flow with weights that all data share, a site whose q depends on the draw of another,
    auxiliary sites, mixtures and discrete sites.

    All ELBOs are estimated with common noise, which reduces the variance of their difference; see
    :class:`ppl_vae.evaluation.inference_gaps.local_optimum.SphericalRadialRule`. If log p(x, z)
    is quadratic in z and q is Gaussian with at most 16 dimensions per datum, they are exact.

    With global latent variables theta, the gaps of the data are averages, over draws of theta from
    the guide, of the gaps given theta; ``Gaps.global_part`` is the gap of q(theta) itself.

    Args:
        model, guide: any pair under the contract.
        x: the whole data, (N, D).
        log_p: exact log p(x_n) of the evaluated rows, if it is known. Otherwise it is estimated
            by importance sampling with a full-covariance Gaussian refined from q*. If q* is not
            such a Gaussian, q* itself is a second proposal (or the guide, if there is no q*). The
            estimate with the smaller error is used unless the mean of the other is higher by more
            than both errors, since both are lower bounds in expectation.
        best: a guide that is known to be the best of the family for each datum; by default it is
            searched for.
        covariance: the family, a covariance; by default the guide's own family.
        steps: the number of steps of the search for q*, and of the refinement for log p.
        num_samples: draws per datum for log p.
        tolerance: the search continues, in rounds of 50 steps, until a round gains less than
            this, in nats per datum, or for 20 rounds; ``last_gain`` and ``remaining`` report the
            gain of the last round. None: there are no rounds.
        num_global_draws: draws of the global latent variables, if there are any, each of which
            costs as much as the gaps of a pair without them.
        mask: True where x is observed; NaN in x has the same meaning.
        rows: the rows of x to evaluate; by default all.
        capture: how the searches and log p are computed, see :func:`~ppl_vae.log_likelihood`.
        seed: seed of the draws.

    Raises:
        ValueError: as :func:`~ppl_vae.evaluation.marginal_likelihood.importance.log_likelihood`,
            and if the tolerance is not positive; if ``log_p`` or ``best`` is given for a model
            with global latent variables.

    References:
        Cremer, Li, Duvenaud: Inference suboptimality in variational autoencoders (2018).
    """
    pair = Pair(model, guide)
    data = pair.observe(x, mask)
    check_int("steps", steps)
    check_int("num_samples", num_samples)
    check_int("num_global_draws", num_global_draws, 2)
    if covariance is not None:
        check_option("covariance", covariance, COVARIANCES)
    rows = torch.arange(len(data)) if rows is None else rows
    log_p = None if log_p is None else as_vector(log_p, name="log_p")
    _check(log_p, len(rows), tolerance)
    labels = labels_of(x).take(rows)
    most_rows = max(1, ROWS_FACTOR * rows_at_once(data.x) // MAX_POINTS)
    size = min(block_size(data.x, num_samples, refined=True), most_rows)
    settings = f"{covariance=}, {steps=}, {num_samples=}, {tolerance=}, {num_global_draws=}"
    known = None if log_p is None else describe_tensor(log_p)
    shared = SharedRows.of(
        "gaps", pair, partial(describe_rows, data), rows, seed, settings=settings, log_p=known
    )
    together, log_ratios = shared.processes.together, None
    num_batches = -(-len(shared.own) // size)

    def make_runner(calls_per_batch: int) -> CallRunner:
        runner = CallRunner(capture, num_batches * calls_per_batch)
        return stack.enter_context(closing(runner))

    with (
        ExitStack() as stack,
        together(),
        isolated_store(),
        seeded(shared.seed),
        pair.eval_mode(),
    ):
        pairs, first = [pair], next(data.split(rows, size))
        check_importance_samplable(pair, first)
        if pair.has_globals(first):
            _check_no_constants(log_p=log_p, best=best)
            pairs, log_ratios = _conditioned(pair, first, num_global_draws)
        shared.seed_own_draws()
        estimators = []
        for each in pairs:
            family = family_of(each, first, covariance)
            estimator = _GapEstimator(
                each, family, best, steps, num_samples, tolerance, make_runner
            )
            for batch in data.split(shared.own, size):
                estimator.evaluate(batch, estimates_log_p=log_p is None)
            estimators.append(estimator)
    found = [estimator.of_all_rows(shared).result(log_p) for estimator in estimators]
    if log_ratios is None:
        return replace(found[0], labels=labels)
    average = average_over_draws(found, log_ratios, has_all_data=len(rows) == len(data))
    return replace(average, labels=labels)


def _conditioned(
    pair: Pair, batch: Batch, num_draws: int
) -> tuple[list[Pair], Float[Tensor, " G"]]:
    # The pair given draws of its global latent variables, and their log density ratios.
    runs = [pair.run(batch) for _ in range(num_draws)]
    check_latents(runs[0])
    log_ratios = torch.stack([run.global_log_weights()[0].detach().cpu() for run in runs])
    return [conditioned(pair, run) for run in runs], log_ratios


def _check_no_constants(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} depends on the global latent variables, which are random here; leave it "
                "out, or fix them: ppl_vae.core.condition_on_globals(model, guide, x)"
            )


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


class _GapEstimator:
    """Searches for q* and estimates the ELBOs and log p, batch by batch.

    Args:
        pair: the pair.
        family: the family of q*.
        best: a guide that is known to be q*, if there is one.
        steps, num_samples, tolerance: see :func:`gaps`.
        make_runner: makes what decides whether calls run eagerly, recorded or compiled, from the
            number of calls of a batch.
    """

    def __init__(
        self,
        pair: Pair,
        family: Family,
        best: ProgramLike | None,
        steps: int,
        num_samples: int,
        tolerance: float | None,
        make_runner: Callable[[int], CallRunner],
    ) -> None:
        self.pair, self.family = pair, family
        self.best = None if best is None else pair.with_guide(best)
        self.steps, self.num_samples = steps, num_samples
        self.local_optimum = LocalOptimum(
            steps=steps, covariance=family.name, tolerance=tolerance, make_runner=make_runner
        )
        self.full_covariance = LocalVI(steps=steps, covariance="full", runner=make_runner(steps))
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

    def of_all_rows(self, shared: SharedRows) -> "_GapEstimator":
        """The estimates of the rows of all processes."""
        self.elbos = [shared.gather_columns(_joined(_ELBOs, self.elbos))]
        self.summaries = {
            name: [shared.gather_columns(_joined(WeightSummary, parts))]
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
        if float((other.value - best.value).mean()) > Z * math.hypot(_error(other), _error(best)):
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
    return failed | bool(rest.mean() < -Z * mean_error)


def _check(log_p: Any, number: int, tolerance: float | None) -> None:
    if log_p is not None and log_p.shape != (number,):
        raise ValueError(
            f"log_p must have one value for each of {number} rows; its shape is "
            f"{tuple(log_p.shape)}"
        )
    if tolerance is not None and not tolerance > 0:
        raise ValueError(
            f"tolerance must be positive, in nats per datum; got {tolerance}. With None there are "
            "no further rounds"
        )


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
