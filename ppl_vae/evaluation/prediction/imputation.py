"""Imputation of missing values under any pair, by self-normalised importance sampling.

With z_s drawn from q(z | x_obs) and w_s = p(x_obs, z_s) / q(z_s | x_obs), the conditional mean of
a missing value is estimated by sum_s w_s E[x_d | z_s] / sum_s w_s, and its variance by the
variance of E[x_d | z] plus the mean of Var[x_d | z] under the same weights; z resampled in
proportion to the weights is approximately a draw of z | x_obs.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from ppl_vae.core.arrays.inputs import schema_of
from ppl_vae.core.arrays.schema import RowLabels
from ppl_vae.core.batch import Batch
from ppl_vae.core.imputed import Imputation
from ppl_vae.core.introspection import bound_object
from ppl_vae.core.nonfinite import name_rows
from ppl_vae.core.nonfinite_pairs import nonfinite_sites_named
from ppl_vae.core.pair import Pair
from ppl_vae.core.processes.divided_rows import DividedRows
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.program import Density, ProgramLike
from ppl_vae.core.state import isolated_store
from ppl_vae.core.traces import (
    PairTraces,
    Site,
    by_draw_and_datum,
    data_sites,
)
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.data.sources.observed_rows import (
    closed_after_use,
    observe_rows,
    open_source,
    whole_table,
)
from ppl_vae.data.sources.row_blocks import RowSource
from ppl_vae.data.sources.row_stream import Rows, describe_rows
from ppl_vae.evaluation.marginal_likelihood.batching import block_size, rows_at_once
from ppl_vae.evaluation.marginal_likelihood.call_runner import CallRunner
from ppl_vae.evaluation.marginal_likelihood.importance import check_refinement
from ppl_vae.evaluation.marginal_likelihood.local_vi import LocalVI
from ppl_vae.evaluation.prediction.multiple_imputation import (
    complete_imputation,
    impute_from_posterior,
    incomplete_rows,
)
from ppl_vae.evaluation.prediction.resampling import resample
from ppl_vae.evaluation.prediction.weighted_moments import BlockEstimate, WeightedMoments
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.models.bayesian_ppca import BayesianPPCA
from ppl_vae.objectives.divergences import check_importance_samplable


@torch.no_grad()
def impute(
    model: ProgramLike,
    guide: ProgramLike | None,
    x: RowSource,
    num_samples: int = 1000,
    *,
    draws: int = 0,
    refine: int = 0,
    covariance: str | None = None,
    posterior: PosteriorSamples | None = None,
    quantiles: Sequence[float] = (),
    mask: ArrayLike | None = None,
    seed: int | None = None,
) -> Imputation:
    """Impute the missing values of x, given the observed values of their rows.

    Observed values are not changed. A row with nothing observed gets the mean of x under the model
    and its standard deviation. Without ``posterior`` standard deviations and draws take the
    parameters of the pair as known: if these were fitted to few rows, intervals based on them are
    too narrow (see :class:`~ppl_vae.core.imputed.Imputation` for PPCA). With draws of the
    posterior of a :class:`~ppl_vae.models.bayesian_ppca.BayesianPPCA` they include the uncertainty
    of the parameters, and completed tables can be analysed by
    :func:`~ppl_vae.evaluation.prediction.pooling.pool`.

    Draws and data are processed in blocks, so that memory use is dominated by the result. The
    columns of x must be independent given z, as masks presume.

    Args:
        model, guide: any pair under the contract whose model takes ``mask``; run in evaluation
            mode. The guide is the proposal; it need not take ``mask`` (missing values are zero in
            its x).
        x: the whole data set, (N, D), in memory or read in blocks; NaN marks a missing value. A
            guide with per-datum parameters finds rows by position. The result holds all of x.
        num_samples: draws of z per row with missing values, S.
        draws: number of joint draws of the missing values of each row: z is resampled by its
            weights (from S values), and x given z is drawn for each.
        refine: number of optimisation steps for a copy of the guide's Gaussian for each row,
            as in :func:`ppl_vae.log_likelihood`. The guide itself is not changed.
        covariance: the family of the refined Gaussian; by default ``"full"``.
        posterior: draws of the model's parameters, see :func:`ppl_vae.sample_posterior`.
        quantiles: with ``posterior``, the probabilities of quantiles of each missing value, such
            as (0.025, 0.975).
        mask: True where x is observed.
        seed: seed of the draws.

    Returns:
        The imputation, in the dtype of the model, or of x if that is finer. ``ess`` is the
        effective sample size of each row. It does not reveal a guide that is much narrower than
        the posterior; the verdict of
        :func:`~ppl_vae.evaluation.marginal_likelihood.importance.log_likelihood` does.

    Raises:
        ValueError: if data or arguments are invalid; if the model does not take ``mask``, or does
            not observe x in exactly one site, with independent entries whose mean and variance are
            known in closed form; if :func:`ppl_vae.core.traces.check_pair` rejects the pair.
        FloatingPointError: if weights are NaN or infinite, or all weights of a row are zero.

    References:
        Mattei, Frellsen: MIWAE: deep generative modelling and imputation of incomplete data sets
        (2019).
    """
    if posterior is not None:
        with Processes.current().together():
            _check_posterior(model, guide, refine)
        return impute_from_posterior(
            posterior, x, num_samples, draws=draws, quantiles=quantiles, mask=mask, seed=seed
        )
    with ExitStack() as stack:
        with Processes.current().together():
            check_int("num_samples", num_samples)
            check_int("draws", draws, 0)
            check_refinement(refine, covariance)
            pair = Pair(model, _checked_guide(guide, quantiles))
            source = open_source(x, mask, model=model, guide=guide)
            given = whole_table(x, mask, schema=schema_of(model), source=source)
            x_read = given if source is None else source
            observed = observe_rows(x_read, model=model, guide=guide, allow_empty_rows=True)
            data = stack.enter_context(closed_after_use(observed, x_read))
            result = _without_imputations(given, data, draws, on_cpu=source is not None)
        settings = f"{num_samples=}, {draws=}, {refine=}, {covariance=}"
        _impute(result, pair, data, num_samples, refine, covariance, seed, settings)
    return replace(result, labels=RowLabels.of(x, schema_of(model)))


def _checked_guide(guide: ProgramLike | None, quantiles: Sequence[float]) -> ProgramLike:
    if guide is None or len(quantiles):
        raise ValueError(
            "guide=None and quantiles need the draws of a posterior: pass "
            "posterior=sample_posterior(model, x)"
        )
    return guide


def _impute(
    result: Imputation,
    pair: Pair,
    data: Rows,
    num_samples: int,
    refine: int,
    covariance: str | None,
    seed: int | None,
    settings: str,
) -> None:
    """Write the imputations of the rows with missing values."""
    draws = 0 if result.draws is None else len(result.draws)
    incomplete = incomplete_rows(result.mean)
    division = DividedRows.of(
        "impute", pair, partial(describe_rows, data), incomplete, seed, settings=settings
    )
    if not len(incomplete):
        return
    (one,) = data.split(incomplete[:1], 1)
    size = block_size(one.x, num_samples, refined=refine > 0)
    size = min(size, max(1, rows_at_once(one.x) // max(draws, 1)))
    together = division.processes.together
    runner = CallRunner("auto", -(-len(division.own) // size) * refine)
    with closing(runner), together(), isolated_store(), division.seeded(), pair.eval_mode():
        local_vi = LocalVI(steps=max(refine, 1), covariance=covariance or "full", runner=runner)
        for batch in data.split(division.own, size):
            _check_samplable(pair, batch, draws)
            with nonfinite_sites_named(pair, batch):
                sampler = _Sampler(local_vi(pair, batch) if refine else pair, batch)
                _write(result, batch, sampler.estimate(num_samples, draws))
    complete_imputation(result, incomplete, division)


def _check_samplable(pair: Pair, batch: Batch, draws: int) -> None:
    check_importance_samplable(pair, batch)
    if draws and pair.has_globals(batch):
        raise ValueError(
            "joint draws of missing values need a model without global latent variables; "
            "use draws=0 for means and standard deviations, or fix them at a draw of the "
            "guide: ppl_vae.core.condition_on_globals(model, guide, x)"
        )


def _check_posterior(model: ProgramLike, guide: ProgramLike | None, refine: int) -> None:
    owner = bound_object(model)
    if not isinstance(owner, BayesianPPCA):
        raise ValueError(
            f"posterior needs a BayesianPPCA as the model; got {type(owner).__name__}. For "
            "another pair fix its global latent variables at draws: condition_on_globals"
        )
    if guide is not None or refine:
        raise ValueError(
            "with posterior no guide is used, since z is integrated out: pass guide=None, and no "
            "refine"
        )


def _without_imputations(
    given: Float[Tensor, "N D"], data: Rows, draws: int, *, on_cpu: bool
) -> Imputation:
    # The table itself, as a result to write to; a table that is read in blocks stays on the CPU.
    device = "cpu" if on_cpu else data.device
    dtype = torch.promote_types(given.dtype, data.like.dtype)
    mean = given.to(device=device, dtype=dtype, copy=not on_cpu)
    made = mean.expand(draws, -1, -1).clone() if draws else None
    ess = torch.full((len(mean),), torch.nan, dtype=torch.float64, device=device)
    return Imputation(mean, torch.zeros_like(mean), made, ess)


def _write(result: Imputation, batch: Batch, new: BlockEstimate) -> None:
    assert result.ess is not None and batch.mask is not None
    place = result.mean.device
    rows = torch.arange(len(batch)) if batch.index is None else batch.index
    rows, observed = rows.to(place), batch.mask.to(place)
    result.mean[rows] = torch.where(observed, result.mean[rows], new.mean.to(result.mean))
    sd = new.variance.sqrt().to(result.sd)
    result.sd[rows] = torch.where(observed, 0.0, sd)
    if result.draws is not None and new.draws is not None:
        drawn = new.draws.to(result.draws)
        result.draws[:, rows] = torch.where(observed, result.draws[:, rows], drawn)
    result.ess[rows] = new.ess.to(place)


class _Sampler:
    """Importance sampler for a block of rows with missing values."""

    def __init__(self, pair: Pair, batch: Batch) -> None:
        self.pair, self.batch = pair, batch
        self.dim = pair.sample_dim(batch)

    def estimate(self, num_samples: int, draws: int) -> BlockEstimate:
        """Conditional moments of x from S draws of z, and ``draws`` draws of x."""
        resampled = self._run(self.pair, draws) if draws else None
        moments = None
        for run in self._runs(num_samples):
            log_weights, (mean, variance) = self._log_weights(run), self._moments(run)
            moments = moments or WeightedMoments(mean[0])
            weights = moments.add(log_weights, mean, variance)
            if resampled is not None:
                resample(resampled, run, draws, weights, moments.total)
        assert moments is not None
        return moments.estimate(None if resampled is None else self._draw_x(resampled, draws))

    def _runs(self, num_samples: int) -> Iterator[PairTraces]:
        step = max(1, rows_at_once(self.batch.x) // len(self.batch))
        for start in range(0, num_samples, step):
            yield self._run(self.pair, min(step, num_samples - start))

    def _run(self, pair: Pair, number: int) -> PairTraces:
        return pair.run(self.batch, num_samples=number, dim=self.dim)

    def _log_weights(self, run: PairTraces) -> Float[Tensor, "S B"]:
        weights = run.log_weights().double()
        wrong = ~(weights < torch.inf).all(0)
        if bool(wrong.any()):
            raise FloatingPointError(
                f"log weights are NaN or infinite in {name_rows(wrong, self.batch)}; do the model "
                "and the guide give finite densities on these data?"
            )
        return weights

    def _moments(self, run: PairTraces) -> list[Float[Tensor, "S B D"]]:
        site = self._data_site(run)
        try:
            moments = [self._rows(run, site, v) for v in (site["fn"].mean, site["fn"].variance)]
        except NotImplementedError:
            moments = []
        if not moments or any(bool(values.isnan().any()) for values in moments):
            kind = type(_innermost(site["fn"])).__name__
            raise ValueError(
                f"site {site['name']!r} of the model ({kind}) has no mean and variance in closed "
                "form, so its missing values cannot be imputed"
            )
        return [values.double() for values in moments]

    def _rows(self, run: PairTraces, site: Site, value: Tensor) -> Float[Tensor, "S B D"]:
        value = by_draw_and_datum(run, site, value)
        return value.reshape(*value.shape[:2], -1)

    def _data_site(self, run: PairTraces) -> Site:
        observed = data_sites(run)
        if len(observed) > 1:
            raise ValueError(
                f"the model observes several sites, {sorted(observed)}, so it is not known which "
                "columns of x they hold; imputation needs a single site that holds x"
            )
        (site,) = observed.values()
        value = self._rows(run, site, site["value"])[0]
        x = self.batch.x
        if value.shape != x.shape or not self._equals_observed(value):
            raise ValueError(
                f"site {site['name']!r} of the model does not hold x itself, of shape (rows, "
                f"{x.shape[1]}): it has shape {tuple(value.shape)}, or other values; "
                "imputation needs a model that observes x without a transformation"
            )
        if (inner := _innermost(site["fn"])).event_shape:
            raise ValueError(
                f"the entries of site {site['name']!r} of the model ({type(inner).__name__}) are "
                "not independent given z, so missing values depend on the observed ones even "
                "given z; imputation needs one univariate distribution per column, made an event "
                "by to_event(1)"
            )
        return site

    def _equals_observed(self, value: Float[Tensor, "B D"]) -> bool:
        x, mask = self.batch.x, self.batch.mask
        observed = value if mask is None else torch.where(mask, value, 0.0)
        return torch.allclose(observed.to(x), x, rtol=1e-3)

    def _draw_x(self, resampled: PairTraces, draws: int) -> Float[Tensor, "R B D"]:
        # The model is run again, so that draws of x with the same z have independent noise.
        replayed = poutine.replay(self.pair.guide, trace=resampled.guide)
        run = self._run(self.pair.with_guide(replayed), draws)
        site = self._data_site(run)
        return self._rows(run, site, site["fn"].sample())


def _innermost(fn: Density) -> Density:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn
