"""Imputation that carries the uncertainty of the parameters.

Given parameters theta_s, the missing values of a row are normal with mean m_s and covariance C_s.
Over draws theta_s of the posterior of the parameters their mean is that of the m_s, and their
variance the mean of the C_s plus the variance of the m_s. Each joint draw takes one theta_s for
all rows, so that the completed tables are proper multiple imputations.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppl_vae.core.arrays.digest import describe_tensor, tensor_digest
from ppl_vae.core.arrays.inputs import schema_of
from ppl_vae.core.arrays.schema import RowLabels
from ppl_vae.core.imputed import Imputation
from ppl_vae.core.processes.divided_rows import DividedRows
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.data.sources.observed_rows import whole_table
from ppl_vae.data.sources.row_blocks import RowBlock, RowSource, rows_per_block
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.models.bayesian_ppca import ParameterDraws
from ppl_vae.models.linear.integrated_likelihood import row_posterior
from ppl_vae.models.linear.table_statistics import TableStatistics

CELLS_PER_PARAMETER = 50
"""Intervals at fitted parameters lose more than about 0.7 % coverage with fewer observed values
than this for each parameter."""
MAX_BISECTIONS, TOLERANCE = 60, 1e-5
"""Limits of the search for quantiles; the tolerance is relative to the standard deviation of a
value."""


def parameters_matter(num_observed: int, num_parameters: int) -> bool:
    """Whether intervals for imputed values need the uncertainty of the parameters.

    Fitted parameters understate the variance of a missing value by a share r of about
    3 P / n, with P parameters and n observed values: the errors of the loadings and the mean, the
    noise variance that a fit underestimates, and the error of z that follows from them are about
    P / n each. Intervals of 95 % then lose about 1.96 phi(1.96) r = 0.11 r of their coverage. With
    D = 12, K = 3 and 30 % missing values this gives 91.1 % at N = 50 and 94.0 % at N = 200; 91 %
    and 94 % were measured (:class:`~ppl_vae.core.imputed.Imputation`). The rule is n < 50 P, where
    the loss exceeds 0.7 %.
    """
    return num_observed < CELLS_PER_PARAMETER * num_parameters


@torch.no_grad()
def impute_from_posterior(
    posterior: PosteriorSamples,
    x: RowSource,
    num_samples: int = 1000,
    *,
    draws: int = 0,
    quantiles: Sequence[float] = (),
    mask: ArrayLike | None = None,
    seed: int | None = None,
) -> Imputation:
    """The missing values of x given the observed ones, under draws of PPCA's parameters.

    Args:
        posterior: draws of the parameters of :class:`~ppl_vae.models.bayesian_ppca.BayesianPPCA`.
        x: (N, D), in memory or read in blocks; NaN marks a missing value.
        num_samples: the largest number of draws of the parameters that means, standard deviations
            and quantiles are computed from.
        draws: the number of joint draws, each with a draw of the parameters of its own.
        quantiles: the probabilities of quantiles of each missing value.
        mask: True where x is observed.
        seed: seed of the draws.

    Raises:
        ValueError: if an argument is out of range, if x has another width than the data of the
            posterior, or if there are fewer draws of the parameters than ``draws``.
    """
    processes = Processes.current()
    with processes.together():
        given = whole_table(x, mask, schema=schema_of(posterior.model))
        parameters = posterior.parameters()
        levels, available = _check_levels(quantiles), len(parameters.loc)
        check_int("num_samples", num_samples)
        _check_number(draws, available)
        if given.shape[1] != parameters.loc.shape[1]:
            raise ValueError(
                f"x must have {parameters.loc.shape[1]} columns, as many as the data of the "
                f"posterior; it has {given.shape[1]}"
            )
        used = evenly_spaced(parameters, min(num_samples, available))
        result = _unchanged(given, draws, levels, len(used.loc))
    incomplete = incomplete_rows(given)
    division = DividedRows.of(
        "impute", None, lambda: (describe_tensor(given), None), incomplete, seed,
        settings=f"{num_samples=}, {draws=}, {quantiles=}",
        posterior=tensor_digest(value for value in parameters if value is not None)[:16],
    )  # fmt: skip
    if len(incomplete):
        with processes.together(), division.seeded():
            for rows in division.own.split(rows_per_block(4 * used.loc.numel())):
                block = RowBlock.of(given[rows], None, given.device)
                _write_moments(result, rows, block, used, levels)
                if result.draws is not None:
                    drawn = _draw_rows(block, evenly_spaced(parameters, draws))
                    result.draws[:, rows] = _where_missing(block, result.draws[:, rows], drawn)
        complete_imputation(result, incomplete, division)
    return replace(result, labels=RowLabels.of(x, schema_of(posterior.model)))


def incomplete_rows(x: Float[Tensor, "N D"]) -> Int[Tensor, " R"]:
    """The numbers of the rows that hold NaN."""
    parts = x.split(rows_per_block(x.shape[1]))
    return torch.cat([part.isnan().any(1) for part in parts]).nonzero().flatten()


def complete_imputation(
    result: Imputation, rows: Int[Tensor, " R"], division: DividedRows
) -> None:
    """Set imputed rows to those of all processes, each of which has computed its own.

    Args:
        result: the imputation of the whole table.
        rows: the rows with missing values.
        division: their division among the processes.
    """
    tables = [result.mean, result.sd, result.ess]
    tables += [None if t is None else t.transpose(0, 1) for t in (result.draws, result.quantiles)]
    for table in tables:
        if table is not None:
            division.complete(table, rows)


def _check_number(draws: int, available: int) -> None:
    if check_int("draws", draws, 0) > available:
        raise ValueError(
            f"draws={draws} needs as many draws of the parameters; the posterior has {available}. "
            "Sample more (num_samples of sample_posterior)"
        )


def _check_levels(quantiles: Sequence[float]) -> tuple[float, ...]:
    levels = tuple(map(float, quantiles))
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"quantiles must be probabilities between 0 and 1; got {quantiles}")
    return levels


def _unchanged(
    given: Float[Tensor, "N D"], draws: int, levels: tuple[float, ...], number: int
) -> Imputation:
    # The table itself, as a result to write to.
    return Imputation(
        given.clone(),
        torch.zeros_like(given),
        given.expand(draws, -1, -1).clone() if draws else None,
        levels=levels,
        quantiles=given.expand(len(levels), -1, -1).clone() if levels else None,
        parameter_draws=number,
    )


def evenly_spaced(parameters: ParameterDraws, number: int) -> ParameterDraws:
    """This number of the draws of parameters, evenly spaced along all of them."""
    loadings, loc, noise_scale, relevance = parameters
    places = (torch.arange(number, device=loc.device) * len(loc)) // max(number, 1)
    chosen = None if relevance is None else relevance[places]
    return ParameterDraws(loadings[places], loc[places], noise_scale[places], chosen)


class _Given(NamedTuple):
    # Given each draw of the parameters: E x, Var x, and what draws of z need.
    mean: Float[Tensor, "S B D"]
    variance: Float[Tensor, "S B D"]
    latent_mean: Float[Tensor, "S B K"]
    factor: Float[Tensor, "S B K K"]


def _conditional(block: RowBlock, parameters: ParameterDraws) -> _Given:
    # With P = T T' the precision of z, T'^-1 is a factor of its covariance.
    rows = TableStatistics.of_rows(block)
    loadings, loc, scale = parameters.loadings, parameters.loc, parameters.column_scale
    found = row_posterior(rows, loadings, loc, scale)
    eye = torch.eye(loadings.shape[-1], dtype=loadings.dtype, device=loadings.device)
    factor = torch.linalg.solve_triangular(found.tril.mT, eye, upper=True)
    spread = (loadings.unsqueeze(1) @ factor).square().sum(-1)[:, rows.pattern]
    variance = spread + scale.square().unsqueeze(1)
    mean = found.mean @ loadings.mT + loc.unsqueeze(1)
    return _Given(mean, variance, found.mean, factor[:, rows.pattern])


def _write_moments(
    result: Imputation,
    rows: Tensor,
    block: RowBlock,
    parameters: ParameterDraws,
    levels: tuple[float, ...],
) -> None:
    given = _conditional(block, parameters)
    mean = given.mean.mean(0)
    variance = given.variance.mean(0) + given.mean.var(0, correction=0)
    result.mean[rows] = _where_missing(block, result.mean[rows], mean)
    result.sd[rows] = _where_missing(block, result.sd[rows], variance.sqrt())
    if result.quantiles is None:
        return
    missing = ~_observed(block)
    means, sds = given.mean[:, missing], given.variance[:, missing].sqrt()
    for place, level in enumerate(levels):
        found = result.quantiles[place, rows]
        found[missing] = _mixture_quantile(means, sds, level).to(found)
        result.quantiles[place, rows] = found


def _observed(block: RowBlock) -> Bool[Tensor, "B D"]:
    assert block.observed is not None
    return block.observed.bool()


def _where_missing(block: RowBlock, before: Tensor, new: Tensor) -> Tensor:
    return torch.where(_observed(block), before, new.to(before))


def _draw_rows(block: RowBlock, parameters: ParameterDraws) -> Float[Tensor, "S B D"]:
    given = _conditional(block, parameters)
    noise = torch.randn_like(given.latent_mean).unsqueeze(-1)
    latent = given.latent_mean + (given.factor @ noise).squeeze(-1)
    mean = latent @ parameters.loadings.mT + parameters.loc.unsqueeze(1)
    return mean + parameters.column_scale.unsqueeze(1) * torch.randn_like(mean)


def _mixture_quantile(
    means: Float[Tensor, "S C"], sds: Float[Tensor, "S C"], level: float
) -> Float[Tensor, " C"]:
    """Quantiles of equally weighted mixtures of normal distributions, by bisection.

    A quantile of the mixture lies between the smallest and the largest of its components'.
    """
    normal = torch.distributions.Normal(means, sds)
    bounds = normal.icdf(torch.tensor(level).to(means))
    low, high = bounds.amin(0), bounds.amax(0)
    for _ in range(MAX_BISECTIONS):
        found = high - low <= TOLERANCE * sds.amax(0)
        if bool(found.all()):
            break
        middle = (low + high) / 2
        below = normal.cdf(middle).mean(0) < level
        # A quantile that is found stays, so that it does not depend on the others.
        low = torch.where(below & ~found, middle, low)
        high = torch.where(below | found, high, middle)
    return (low + high) / 2
