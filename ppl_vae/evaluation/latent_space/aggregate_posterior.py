"""The aggregate posterior q(z) = 1/N sum_m q(z | x_m), and its density at codes of the guide."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.global_sites import check_no_globals
from ppl_vae.core.pair import Pair, run_guide
from ppl_vae.core.program import DATA_PLATE, ProgramLike
from ppl_vae.core.traces import (
    SAMPLE_PLATE,
    PairTraces,
    Site,
    by_draw_and_datum,
    log_prob,
    plates_of,
)
from ppl_vae.evaluation.local_guides.site_override import SiteOverride, to_site_shape
from ppl_vae.evaluation.marginal_likelihood.batching import rows_at_once
from ppl_vae.objectives.divergences import check_latents, is_delta, kl_terms, site_kl_by_dimension

DENSITIES_PER_BLOCK = 2**16
"""Number of densities q(z | x), of one code under one datum, that are evaluated at once."""


class CodeStatistics(NamedTuple):
    """One row per datum of each statistic from which a ``Collapse`` is computed.

    Attributes:
        kl_by_dimension: KL(q(z_k | x) || p(z_k)); the mean over the block in every row.
        means: the mean of q(z | x), averaged over draws.
        mean_variance: the Monte Carlo variance of ``means``.
        kl: the mean of log q(z | x) - log p(z) over draws.
        closed_kl: KL(q(z | x) || p(z)), in closed form where it is known.
        information: the mean of log q(z | x) - log q(z) over draws.
        aggregate: the mean of log q(z) - log p(z) over draws.
        retrieval_prob: the mean of q(z | x) / sum_m q(z | x_m) over draws.
        first, second: the moments of codes in units of the prior, averaged over draws.
    """

    kl_by_dimension: Float[Tensor, "B K"]
    means: Float[Tensor, "B K"]
    mean_variance: Float[Tensor, "B K"]
    kl: Float[Tensor, " B"]
    closed_kl: Float[Tensor, " B"]
    information: Float[Tensor, " B"]
    aggregate: Float[Tensor, " B"]
    retrieval_prob: Float[Tensor, " B"]
    first: Float[Tensor, "B k"]
    second: Float[Tensor, "B k"]


@dataclass(frozen=True)
class CodeDensities:
    """Codes drawn for a block of data, and their log densities in nats.

    Attributes:
        run: the traces in which the codes were drawn.
        log_q: log q(z_sn | x_n).
        log_prior: log p(z_sn).
        log_aggregate: log q(z_sn), the mean of q(z_sn | x_m) over all the data.
    """

    run: PairTraces
    log_q: Float[Tensor, "S B"]
    log_prior: Float[Tensor, "S B"]
    log_aggregate: Float[Tensor, "S B"]

    def names(self) -> tuple[str, ...]:
        """The names of the latent dimensions, site by site."""
        widths = {name: self._flat(name, s["value"]).shape[2] for name, s in self._latents()}
        return tuple(f"{name}[{k}]" for name, width in widths.items() for k in range(width))

    def means(self) -> Float[Tensor, "S B K"]:
        """The means of q given the draws of earlier sites; the draws where no formula is known."""
        means = []
        for name, site in self._latents():
            try:
                value = site["fn"].mean
            except NotImplementedError:
                value = site["value"]
            means.append(self._flat(name, value))
        return torch.cat(means, -1)

    def standardized_moments(self) -> tuple[Float[Tensor, "S B k"], Float[Tensor, "S B k"]]:
        """First and second moments of the codes in units of a Gaussian prior.

        The prior of a site is the one given earlier sites. Moments are exact where a formula is
        known, else those of the draws; sites whose prior is not Gaussian are left out. The moments
        of codes drawn from the prior are 0 and 1.
        """
        empty = torch.zeros(len(self.log_q), self.log_q.shape[1], 0).double()
        first, second = [empty], [empty]
        for name, site in self._latents():
            p = self.run.latent[name]["fn"]
            while isinstance(p, dist.Independent):
                p = p.base_dist
            if isinstance(p, dist.Normal):
                mean, variance = _moments(site)
                mean = (mean - p.loc) / p.scale
                first.append(self._flat(name, mean))
                second.append(self._flat(name, mean.square() + variance / p.scale.square()))
        return torch.cat(first, -1), torch.cat(second, -1)

    def closed_kl(self) -> Float[Tensor, " B"]:
        """KL(q(z | x) || p(z)) per datum: closed form where known, else estimated from draws."""
        return _sum(kl_terms(self.run)).mean(0).cpu().expand(self.log_q.shape[1])

    def per_datum(self, num_data: int) -> CodeStatistics:
        """The statistics of each datum, averaged over its draws.

        Args:
            num_data: the number of data in the aggregate posterior.
        """
        means, (first, second) = self.means(), self.standardized_moments()
        num_draws, num_rows = self.log_q.shape
        information = self.log_q - self.log_aggregate
        return CodeStatistics(
            kl_by_dimension=self.kl_by_dimension().expand(num_rows, -1),
            means=means.mean(0),
            mean_variance=(
                means.var(0) / num_draws if num_draws > 1 else torch.zeros_like(means[0])
            ),
            kl=(self.log_q - self.log_prior).mean(0),
            closed_kl=self.closed_kl(),
            information=information.mean(0),
            aggregate=(self.log_aggregate - self.log_prior).mean(0),
            retrieval_prob=information.exp().mean(0) / num_data,
            first=first.mean(0),
            second=second.mean(0),
        )

    def kl_by_dimension(self) -> Float[Tensor, " K"]:
        """Mean over draws and data of KL(q(z_k | x) || p(z_k)); NaN where q does not factorize."""
        values = []
        for name, site in self._latents():
            try:
                values.append(site_kl_by_dimension(self.run, name, marginal=True).double().cpu())
            except ValueError:
                width = self._flat(name, site["value"]).shape[2]
                values.append(torch.full((width,), math.nan).double())
        return torch.cat(values)

    def _latents(self) -> list[tuple[str, Site]]:
        return [(name, self.run.drawn[name]) for name in self.run.latent]

    def _flat(self, name: str, value: Tensor) -> Float[Tensor, "S B K"]:
        value = by_draw_and_datum(self.run, self.run.drawn[name], value)
        value = value.reshape(*value.shape[:2], -1).double().cpu()
        return value.expand(len(self.log_q), -1, -1)


def code_densities(
    pair: Pair, data: Batch, rows: Int[Tensor, " N"], num_samples: int
) -> Iterator[CodeDensities]:
    """Draw codes for rows of the data, block by block, and evaluate each under every row.

    N^2 S densities of the guide are evaluated; memory does not grow with N or S.

    Args:
        pair: any pair under the contract.
        data: the whole data set.
        rows: the rows that are evaluated; q(z) is the mixture over these.
        num_samples: draws per datum, S.

    Raises:
        ValueError: if a site of the guide has no density (a Delta), or a site of the model has a
            flat prior; if the model has global latent variables.
        FloatingPointError: if a density is NaN.
    """
    blocks = rows.split(max(1, math.isqrt(DENSITIES_PER_BLOCK) // num_samples))
    dim = pair.sample_dim(data.rows(blocks[0]))
    per_block = rows_at_once(data.x) if dim is None else DENSITIES_PER_BLOCK
    for block in blocks:
        run = pair.run(data.rows(block), num_samples=num_samples, dim=dim)
        check_no_globals(run, "the aggregate posterior")
        check_latents(run)
        total = torch.full((num_samples * len(block),), -math.inf).to(data.x).double()
        codes = _drawn_codes(run)
        for others in data.split(rows, max(1, per_block // len(total))):
            log_q = _log_q(pair.guide, others, codes, dim)
            total = torch.logaddexp(total, torch.logsumexp(log_q, 1))
        shape = num_samples, len(block)
        densities = [
            _joint_log_prob(run, run.drawn),
            _joint_log_prob(run, run.latent),
            total.reshape(shape) - math.log(len(rows)),
        ]
        if any(bool(values.isnan().any()) for values in densities):
            raise FloatingPointError(
                "log densities of codes are NaN; does the guide give finite densities on these "
                "data?"
            )
        yield CodeDensities(run, *(values.expand(shape).cpu() for values in densities))


def _drawn_codes(run: PairTraces) -> dict[str, Num[Tensor, "J n"]]:
    # The value of a Delta site is determined by the sites that it is computed from.
    drawn = {n: s for n, s in run.drawn.items() if not is_delta(s["fn"])}
    flat = {n: by_draw_and_datum(run, s, s["value"]).flatten(0, 1) for n, s in drawn.items()}
    return {name: value.reshape(len(value), -1) for name, value in flat.items()}


def _log_q(
    guide: ProgramLike, batch: Batch, codes: dict[str, Tensor], dim: int | None
) -> Float[Tensor, "J M"]:
    """log q(z_j | x_m) of given codes, for a guide with any sites and plates."""
    number = len(next(iter(codes.values())))

    def read(site: Any) -> Tensor | None:
        if site["name"] not in codes:
            return None
        fn, plates = site["fn"], plates_of(site)
        size = plates[DATA_PLATE].size // (1 if SAMPLE_PLATE in plates else number)
        each = codes[site["name"]].unsqueeze(1).expand(-1, size, -1)
        return to_site_shape(each, site, fn.batch_shape + fn.event_shape, len(fn.event_shape))

    with SiteOverride(read):
        run = run_guide(guide, batch, num_samples=number, dim=dim)
    return _joint_log_prob(run, run.drawn).expand(number, len(batch))


def _moments(site: Site) -> tuple[Tensor, Tensor]:
    """Mean and variance of q given the draws of earlier sites; else its draw and variance 0."""
    try:
        return site["fn"].mean, site["fn"].variance
    except NotImplementedError:
        return site["value"], torch.zeros_like(site["value"])


def _joint_log_prob(run: PairTraces, of: dict[str, Any]) -> Float[Tensor, "S B"]:
    return _sum([run.per_datum(site, log_prob(site)) for site in of.values()])


def _sum(terms: list[Tensor]) -> Float[Tensor, "S B"]:
    return torch.stack(torch.broadcast_tensors(*[term.double() for term in terms])).sum(0)
