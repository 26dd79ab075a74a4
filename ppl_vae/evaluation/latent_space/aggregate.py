"""The aggregate posterior q(z) = 1/N sum_m q(z | x_m): its density at draws of any guide."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair, run_guide
from ppl_vae.core.program import DATA_PLATE, ProgramLike
from ppl_vae.core.traces import (
    SAMPLE_PLATE,
    PairTraces,
    Site,
    by_draw_and_datum,
    frames,
    log_prob,
    sites,
)
from ppl_vae.evaluation.local_guides.site_override import Imposed, laid_out
from ppl_vae.evaluation.marginal_likelihood.batching import rows_at_once
from ppl_vae.objectives.bounds import batch_keywords
from ppl_vae.objectives.divergences import check_latents, is_delta, kl_by_dimension, kl_terms

PAIRS_AT_ONCE = 2**16
"""Pairs of a code and a datum whose density is taken at once, where networks see no more rows."""


@dataclass(frozen=True)
class Coded:
    """Codes drawn for a block of data, and their densities in nats.

    Attributes:
        run: the traces that they are from.
        log_q: log q(z_sn | x_n).
        log_prior: log p(z_sn).
        log_aggregate: log q(z_sn), the mean of q(z_sn | x_m) over all the data.
    """

    run: PairTraces
    log_q: Float[Tensor, "S B"]
    log_prior: Float[Tensor, "S B"]
    log_aggregate: Float[Tensor, "S B"]

    def names(self) -> tuple[str, ...]:
        """Of the latent dimensions, site by site."""
        widths = {name: self._of(name, s["value"]).shape[2] for name, s in self._latents()}
        return tuple(f"{name}[{k}]" for name, width in widths.items() for k in range(width))

    def means(self) -> Float[Tensor, "S B K"]:
        """The means of q, given draws of the sites before; draws, where there is no formula."""
        found = []
        for name, site in self._latents():
            try:
                value = site["fn"].mean
            except NotImplementedError:
                value = site["value"]
            found.append(self._of(name, value))
        return torch.cat(found, -1)

    def standardised(self) -> tuple[Float[Tensor, "S B k"], Float[Tensor, "S B k"]]:
        """First and second moments of codes in units of the prior given the sites before, where
        that is Gaussian: by formula, or of the draws, where there is none.

        Of codes from the prior they would be 0 and 1.
        """
        nothing = torch.zeros(len(self.log_q), self.log_q.shape[1], 0).double()
        first, second = [nothing], [nothing]
        for name, site in self._latents():
            p = self.run.latent[name]["fn"]
            while isinstance(p, dist.Independent):
                p = p.base_dist
            if isinstance(p, dist.Normal):
                mean, variance = _moments(site)
                mean = (mean - p.loc) / p.scale
                first.append(self._of(name, mean))
                second.append(self._of(name, mean.square() + variance / p.scale.square()))
        return torch.cat(first, -1), torch.cat(second, -1)

    def closed_kl(self) -> Float[Tensor, " B"]:
        """KL(q(z | x) || p(z)) of each datum: in closed form where it is known, else from its
        draws.
        """
        return _sum(kl_terms(self.run)).mean(0).cpu().expand(self.log_q.shape[1])

    def per_datum(self, num_data: int) -> tuple[Tensor, ...]:
        """A row per datum of each thing that a ``Collapse`` is made of, in the order below.

        Args:
            num_data: how many data share the aggregate posterior.
        """
        means, (first, second) = self.means(), self.standardised()
        num_draws, num_rows = self.log_q.shape
        information = self.log_q - self.log_aggregate
        return (
            self.kl_by_dimension().expand(num_rows, -1),
            means.mean(0),
            means.var(0) / num_draws if num_draws > 1 else torch.zeros_like(means[0]),
            (self.log_q - self.log_prior).mean(0),
            self.closed_kl(),
            information.mean(0),
            (self.log_aggregate - self.log_prior).mean(0),
            information.exp().mean(0) / num_data,
            first.mean(0),
            second.mean(0),
        )

    def kl_by_dimension(self) -> Float[Tensor, " K"]:
        """Mean over draws and data of KL(q(z_k | x) || p(z_k)); NaN where q is no product."""
        found = []
        for name, site in self._latents():
            try:
                found.append(kl_by_dimension(self.run, name, marginal=True).double().cpu())
            except ValueError:
                width = self._of(name, site["value"]).shape[2]
                found.append(torch.full((width,), math.nan).double())
        return torch.cat(found)

    def _latents(self) -> list[tuple[str, Site]]:
        return [(name, sites(self.run.guide)[name]) for name in self.run.latent]

    def _of(self, name: str, value: Tensor) -> Float[Tensor, "S B K"]:
        found = by_draw_and_datum(self.run, sites(self.run.guide)[name], value)
        found = found.reshape(*found.shape[:2], -1).double().cpu()
        return found.expand(len(self.log_q), -1, -1)


def coded(
    model: ProgramLike,
    guide: ProgramLike,
    x: Tensor,
    mask: Tensor | None,
    rows: Int[Tensor, " N"],
    num_samples: int,
) -> Iterator[Coded]:
    """Codes of all rows, block by block, each weighed against every row.

    N^2 S densities of the guide are taken, in memory that grows with none of them.

    Args:
        model, guide: any pair under the contract.
        x: the whole data, with zeros in place of missing values.
        mask: where it is observed; None if it is everywhere.
        rows: the rows looked at; q(z) is their mixture.
        num_samples: draws per datum, S.

    Raises:
        ValueError: if a site of the guide has no density (a Delta), or one of the model a flat
            prior.
        FloatingPointError: if a density is NaN.
    """
    blocks = rows.split(max(1, math.isqrt(PAIRS_AT_ONCE) // num_samples))
    dim = Pair(model, guide).sample_dim(Batch(x[blocks[0]], **batch_keywords(x, mask, blocks[0])))
    pairs = rows_at_once(x) if dim is None else PAIRS_AT_ONCE
    for block in blocks:
        told = batch_keywords(x, mask, block)
        run = Pair(model, guide).run(Batch(x[block], **told), num_samples=num_samples, dim=dim)
        check_latents(run)
        total = torch.full((num_samples * len(block),), -math.inf).to(x).double()
        values = _values(run)
        for others in rows.split(max(1, pairs // len(total))):
            told = batch_keywords(x, mask, others)
            log_q = _densities(guide, x[others], told, values, dim)
            total = torch.logaddexp(total, torch.logsumexp(log_q, 1))
        shape = num_samples, len(block)
        found = [
            _total(run, sites(run.guide)),
            _total(run, run.latent),
            total.reshape(shape) - math.log(len(rows)),
        ]
        if any(bool(values.isnan().any()) for values in found):
            raise FloatingPointError("densities of codes are NaN; are the guide's finite here?")
        yield Coded(run, *(values.expand(shape).cpu() for values in found))


def _values(run: PairTraces) -> dict[str, Num[Tensor, "J n"]]:
    # Points follow from the sites that they are made from.
    drawn = {n: s for n, s in sites(run.guide).items() if not is_delta(s["fn"])}
    flat = {n: by_draw_and_datum(run, s, s["value"]).flatten(0, 1) for n, s in drawn.items()}
    return {name: value.reshape(len(value), -1) for name, value in flat.items()}


def _densities(
    guide: ProgramLike, x: Tensor, told: dict[str, Any], values: dict[str, Tensor], dim: int | None
) -> Float[Tensor, "J M"]:
    """log q(z_j | x_m) of codes from anywhere, whatever the guide's sites and plates."""
    number = len(next(iter(values.values())))

    def read(site: Any) -> Tensor | None:
        if site["name"] not in values:
            return None
        fn, plates = site["fn"], frames(site)
        size = plates[DATA_PLATE].size // (1 if SAMPLE_PLATE in plates else number)
        each = values[site["name"]].unsqueeze(1).expand(-1, size, -1)
        return laid_out(each, site, fn.batch_shape + fn.event_shape, len(fn.event_shape))

    with Imposed(read):
        run = run_guide(guide, Batch(x, **told), num_samples=number, dim=dim)
    return _total(run, sites(run.guide)).expand(number, len(x))


def _moments(site: Site) -> tuple[Tensor, Tensor]:
    """Mean and variance of q, given the draws of the sites before; or a draw, and no variance."""
    try:
        return site["fn"].mean, site["fn"].variance
    except NotImplementedError:
        return site["value"], torch.zeros_like(site["value"])


def _total(run: PairTraces, found: dict[str, Any]) -> Float[Tensor, "S B"]:
    return _sum([run.per_datum(site, log_prob(site)) for site in found.values()])


def _sum(terms: list[Tensor]) -> Float[Tensor, "S B"]:
    return torch.stack(torch.broadcast_tensors(*[term.double() for term in terms])).sum(0)
