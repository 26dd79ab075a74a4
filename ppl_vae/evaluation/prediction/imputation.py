"""Missing values filled under any pair, by self-normalised importance sampling.

With z_s drawn from q(z | x_obs) and w_s = p(x_obs, z_s) / q(z_s | x_obs), the conditional mean of
a missing value is sum_s w_s E[x_d | z_s] / sum_s w_s, its variance that of E[x_d | z] plus the
mean of Var[x_d | z] under the same weights, and z drawn anew by the weights is a draw of z |
x_obs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Int
from pyro import poutine
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import DATA_PLATE, Density, ProgramLike, as_data_and_mask, check_support
from ppl_vae.core.results import Imputation
from ppl_vae.core.state import eval_mode, isolated_store, seeded
from ppl_vae.core.traces import (
    SAMPLE_PLATE,
    PairTraces,
    Site,
    by_draw_and_datum,
    data_sites,
    frames,
    sites,
)
from ppl_vae.core.validation import ArrayLike, as_matrix, check_int
from ppl_vae.evaluation.marginal_likelihood.batching import LocalVI, block_size, rows_at_once
from ppl_vae.evaluation.marginal_likelihood.importance import check_refinement
from ppl_vae.objectives.bounds import batch_keywords
from ppl_vae.objectives.divergences import check_importance_samplable


@torch.no_grad()
def impute(
    model: ProgramLike,
    guide: ProgramLike,
    x: ArrayLike,
    num_samples: int = 1000,
    *,
    draws: int = 0,
    refine: int = 0,
    covariance: str | None = None,
    mask: ArrayLike | None = None,
    seed: int | None = None,
) -> Imputation:
    """The missing values of x, given what was observed in their rows.

    Observed cells are untouched. Standard deviations and draws take the parameters of the pair as
    known: where these were fitted to few rows, intervals made of them are too narrow
    (:class:`~ppl_vae.core.results.Imputation` has numbers for PPCA).

    Draws and data are streamed, so that memory holds the result and little else. The cells of x
    must be independent given z, as masks presume.

    Args:
        model, guide: any pair under the contract whose model takes ``mask``; run in evaluation
            mode. The guide is the proposal; it need not take ``mask`` (it then sees zeros).
        x: the whole data, (N, D); NaN marks a missing value. Rows are looked up by their place in
            it.
        num_samples: draws of z per row with missing values, S.
        draws: how many draws to make of each row's missing values, jointly: z resampled by its
            weights (so that no more than S different ones come), and x given z drawn for each.
        refine: optimise a copy of the guide's Gaussian for every row by so many steps first
            (:class:`ppl_vae.evaluation.marginal_likelihood.batching.LocalVI`). The guide itself
            stays as it is.
        covariance: the family of the refined Gaussian; by default ``"full"``.
        mask: True where x is observed.
        seed: of the draws.

    Returns:
        In the model's dtype, or x's own if that is finer. ``ess`` says, row by row, whether it
        may be trusted; of a guide much narrower than the posterior it says too little, which the
        verdict of :func:`~ppl_vae.evaluation.marginal_likelihood.importance.log_likelihood` finds
        out.

    Raises:
        ValueError: bad data or arguments; a model that takes no ``mask``, or that observes
            anything else than x in one site of independent cells with a mean and a variance in
            closed form; what :func:`ppl_vae.core.traces.check_pair` refuses.
        FloatingPointError: if weights are NaN or infinite, or all of a row's are zero.

    References:
        Mattei, Frellsen: MIWAE: deep generative modelling and imputation of incomplete data sets
        (2019).
    """
    num_samples, draws = check_int("num_samples", num_samples), check_int("draws", draws, 0)
    check_refinement(refine, covariance)
    given = as_matrix(x)
    x, seen = as_data_and_mask(given, mask, model=model, guide=guide)
    check_support(model, x, seen)
    kept = given.to(device=x.device, dtype=torch.promote_types(given.dtype, x.dtype))
    filled = _unfilled(kept, draws)
    if seen is None:
        return filled
    size = min(
        block_size(x, num_samples, refined=refine > 0), max(1, rows_at_once(x) // max(draws, 1))
    )
    refiner = LocalVI(model, steps=max(refine, 1), covariance=covariance or "full")
    with isolated_store(), seeded(seed), eval_mode(model, guide):
        for rows in (~seen.all(1)).nonzero().flatten().split(size):
            told = x[rows], batch_keywords(x, seen, rows)
            check_importance_samplable(Pair(model, guide), Batch(told[0], **told[1]))
            block = _Block(model, refiner(guide, *told) if refine else guide, *told)
            _fill(filled, rows, seen[rows], block.estimate(num_samples, draws))
    return filled


def _unfilled(kept: Float[Tensor, "N D"], draws: int) -> Imputation:
    made = kept.expand(draws, -1, -1).clone() if draws else None
    unknown = torch.full((len(kept),), torch.nan, dtype=torch.float64, device=kept.device)
    return Imputation(kept.clone(), torch.zeros_like(kept), made, unknown)


def _fill(filled: Imputation, rows: Tensor, seen: Tensor, found: "_Found") -> None:
    filled.mean[rows] = torch.where(seen, filled.mean[rows], found.mean.to(filled.mean))
    filled.sd[rows] = torch.where(seen, 0.0, found.variance.sqrt()).to(filled.sd)
    if filled.draws is not None and found.draws is not None:
        drawn = found.draws.to(filled.draws)
        filled.draws[:, rows] = torch.where(seen, filled.draws[:, rows], drawn)
    assert filled.ess is not None
    filled.ess[rows] = found.ess


@dataclass(frozen=True)
class _Found:
    """Of a block of rows: what is known of all its cells, and of how many draws it is worth."""

    mean: Float[Tensor, "B D"]
    variance: Float[Tensor, "B D"]
    draws: Float[Tensor, "R B D"] | None
    ess: Float[Tensor, " B"]


class _Sums:
    """Weighted sums over draws, in units of the largest weight so far.

    Means are summed as distances from the first of them, so that their variance is not lost in
    rounding where they are large.
    """

    def __init__(self, centre: Float[Tensor, "B D"]) -> None:
        self.centre = centre
        self.top = torch.full_like(centre[:, 0], -torch.inf)
        self.total, self.squares = torch.zeros_like(self.top), torch.zeros_like(self.top)
        self.first, self.second = torch.zeros_like(centre), torch.zeros_like(centre)

    def add(
        self,
        log_weights: Float[Tensor, "S B"],
        mean: Float[Tensor, "S B D"],
        variance: Float[Tensor, "S B D"],
    ) -> Float[Tensor, "S B"]:
        """Take in draws with these moments of x; their weights, in the new units."""
        top = torch.maximum(self.top, log_weights.amax(0))
        unit = torch.where(top.isfinite(), top, 0.0)
        shrink, weights = (self.top - unit).exp(), (log_weights - unit).exp()
        off = mean - self.centre
        self.top = top
        self.total = self.total * shrink + weights.sum(0)
        self.squares = self.squares * shrink.square() + weights.square().sum(0)
        for_cells, shrink = "sb,sbd->bd", shrink[:, None]
        self.first = self.first * shrink + torch.einsum(for_cells, weights, off)
        spread = off.square() + variance
        self.second = self.second * shrink + torch.einsum(for_cells, weights, spread)
        return weights

    def found(self, draws: Tensor | None) -> _Found:
        """The conditional moments of x.

        Raises:
            FloatingPointError: if all weights of a row are zero.
        """
        if empty := int((self.total == 0).sum()):
            raise FloatingPointError(
                f"all weights of {empty} rows with missing values are zero: no draw of the guide "
                "can have made what was observed; use refine=, or a guide that has seen such rows"
            )
        off, spread = self.first / self.total[:, None], self.second / self.total[:, None]
        variance = (spread - off.square()).clamp(min=0)
        return _Found(self.centre + off, variance, draws, self.total.square() / self.squares)


class _Block:
    """Rows with missing values under a pair, and what is drawn for them."""

    def __init__(
        self, model: ProgramLike, guide: ProgramLike, x: Tensor, told: dict[str, Any]
    ) -> None:
        self.model, self.guide, self.x, self.told = model, guide, x, told
        self.dim = Pair(model, guide).sample_dim(Batch(x, **told))

    def estimate(self, num_samples: int, draws: int) -> _Found:
        """What S draws of z say of x, and so many draws of x."""
        chosen = self._run(self.guide, draws) if draws else None
        sums = None
        for run in self._runs(num_samples):
            weights, (mean, variance) = self._log_weights(run), self._moments(run)
            sums = sums or _Sums(mean[0])
            weights = sums.add(weights, mean, variance)
            if chosen is not None:
                _choose(chosen, run, draws, weights, sums.total)
        assert sums is not None
        return sums.found(None if chosen is None else self._data_given(chosen, draws))

    def _runs(self, num_samples: int) -> Iterator[PairTraces]:
        step = max(1, rows_at_once(self.x) // len(self.x))
        for start in range(0, num_samples, step):
            yield self._run(self.guide, min(step, num_samples - start))

    def _run(self, guide: ProgramLike, number: int) -> PairTraces:
        return Pair(self.model, guide).run(
            Batch(self.x, **self.told), num_samples=number, dim=self.dim
        )

    def _log_weights(self, run: PairTraces) -> Float[Tensor, "S B"]:
        weights = run.log_weights().double()
        if not bool((weights < torch.inf).all()):
            raise FloatingPointError(
                "log weights are NaN or infinite; do the model and the guide give finite "
                "densities on these data?"
            )
        return weights

    def _moments(self, run: PairTraces) -> list[Float[Tensor, "S B D"]]:
        site = self._data_site(run)
        try:
            found = [self._cells(run, site, v) for v in (site["fn"].mean, site["fn"].variance)]
        except NotImplementedError:
            found = []
        if not found or any(bool(values.isnan().any()) for values in found):
            kind = type(_innermost(site["fn"])).__name__
            raise ValueError(
                f"site {site['name']!r} of the model ({kind}) has no mean and variance in closed "
                "form, so its missing values cannot be filled with them"
            )
        return [values.double() for values in found]

    def _cells(self, run: PairTraces, site: Site, value: Tensor) -> Float[Tensor, "S B D"]:
        value = by_draw_and_datum(run, site, value)
        return value.reshape(*value.shape[:2], -1)

    def _data_site(self, run: PairTraces) -> Site:
        found = data_sites(run)
        if len(found) > 1:
            raise ValueError(
                f"the model observes several sites, {sorted(found)}, so it is not known which "
                "cells of x they hold; filling missing values needs one site that holds x"
            )
        (site,) = found.values()
        value = self._cells(run, site, site["value"])[0]
        known = self.told["mask"]
        if value.shape != self.x.shape or not torch.allclose(
            torch.where(known, value, 0.0).to(self.x), self.x, rtol=1e-3
        ):
            raise ValueError(
                f"site {site['name']!r} of the model does not hold x as it is, (rows, "
                f"{self.x.shape[1]}): it has shape {tuple(value.shape)}, or other values; filling "
                "missing values needs a model that observes x itself"
            )
        if (inner := _innermost(site["fn"])).event_shape:
            raise ValueError(
                f"the cells of site {site['name']!r} of the model ({type(inner).__name__}) are "
                "not independent given z, so those observed say more of the missing values than z "
                "does; filling missing values needs one distribution a cell, made an event by "
                "to_event(1)"
            )
        return site

    def _data_given(self, chosen: PairTraces, draws: int) -> Float[Tensor, "R B D"]:
        # The pair runs anew, so that draws of x that share a z each have noise of their own.
        run = self._run(poutine.replay(self.guide, trace=chosen.guide), draws)
        site = self._data_site(run)
        return self._cells(run, site, site["fn"].sample())


def _choose(
    chosen: PairTraces,
    run: PairTraces,
    draws: int,
    weights: Float[Tensor, "S B"],
    total: Float[Tensor, " B"],
) -> None:
    """Let each of R draws of z become one of this run's, as often as its share in the weights is.

    After all runs each is a draw by the weights of all (Chao's reservoir sampling, 1982).
    """
    own = weights.sum(0)
    chances = torch.where(own > 0, weights, 1.0).mT
    which = torch.multinomial(chances, draws, replacement=True).mT
    taken = torch.rand_like(which, dtype=own.dtype) < own / total
    for name, site in sites(chosen.guide).items():
        site["value"] = _swapped(site, sites(run.guide)[name], which, taken)


def _swapped(
    old: Site, new: Site, which: Int[Tensor, "R B"], taken: Bool[Tensor, "R B"]
) -> Tensor:
    """The value of a site with draw ``which[r, b]`` of another run in place r of datum b."""
    plates, event = frames(old), len(old["fn"].event_shape)
    data, values = plates[DATA_PLATE].dim - event, [old["value"], new["value"]]
    repeated = SAMPLE_PLATE not in plates
    if repeated:  # the draws stand in the data's dimension, see run_pair
        values = [value.unflatten(data, (-1, which.shape[1])) for value in values]
    draw = data - 1 if repeated else plates[SAMPLE_PLATE].dim - event
    shape = [1] * values[0].dim()
    shape[draw], shape[data] = which.shape
    picked = torch.take_along_dim(values[1], which.reshape(shape), draw)
    value = torch.where(taken.reshape(shape), picked, values[0])
    return value.flatten(draw, data) if repeated else value


def _innermost(fn: Density) -> Density:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn
