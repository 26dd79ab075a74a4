"""The bound and what it bounds, side by side, for PPCA, where both are known exactly.

log p(x) = ELBO + KL(q || p(z|x)): an E-step closes the gap, an M-step or a gradient raises both.
"""

from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_vae.core.program import as_data_and_mask, as_rows
from ppl_vae.core.results import FitResult, Result
from ppl_vae.core.validation import ArrayLike
from ppl_vae.guides.guides import GaussianGuide
from ppl_vae.models.ppca import PPCA

RECORD_EVERY = 1.15
"""A recording's next look is at so many times the steps of the one before."""
TOUCHING = (0.15, 0.45, 0.75)


@dataclass(frozen=True)
class Ascent(Result):
    """Bound and log-likelihood along a fit, in nats per datum.

    Attributes:
        unit: what is counted: ``"iterations"`` of EM or ``"steps"`` of SVI.
        at: how many were done, (T,); EM's E-steps at t, its M-steps at t + 1/2.
        bound: the ELBO, (T,).
        log_likelihood: what it bounds, (T,).
    """

    unit: str
    at: Float[Tensor, " T"]
    bound: Float[Tensor, " T"]
    log_likelihood: Float[Tensor, " T"]

    def shifted(self, nats: float) -> "Ascent":
        """The same in other units of the data, in which log densities are so many nats higher."""
        return Ascent(self.unit, self.at, self.bound + nats, self.log_likelihood + nats)


def em_ascent(fit: FitResult) -> Ascent:
    """Bound and log-likelihood after each E- and each M-step, as EM's result holds them.

    Raises:
        ValueError: if the fit is none by EM.
    """
    if fit.log_likelihood is None or len(fit.objective) != 2 * fit.steps:
        raise ValueError(f"an ascent by E- and M-steps needs a fit by EM, not by {fit.algorithm}")
    at = torch.arange(len(fit.objective), dtype=torch.float64) / 2
    return Ascent("iterations", at, fit.objective.double(), fit.log_likelihood.double())


@torch.no_grad()
def exact_bound(
    ppca: PPCA, guide: GaussianGuide, x: Float[Tensor, "N D"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The ELBO of a Gaussian guide under PPCA, and log p(x), without draws, in nats per datum."""
    x, mask = as_data_and_mask(x, model=ppca.model, guide=guide)
    log_p = ppca.log_likelihood(x, mask=mask).mean()
    q = guide.distribution(x, mask=mask)
    kl = kl_divergence(_full(q), ppca.posterior(x, mask=mask))
    return log_p - kl.mean(), log_p


def _full(q: Any) -> dist.MultivariateNormal:
    if isinstance(q, dist.MultivariateNormal):
        return q
    return dist.MultivariateNormal(q.mean, scale_tril=torch.diag_embed(q.stddev))


@dataclass
class Recording:
    """Looks at a pair while it is fitted: pass it to ``fit_svi`` as ``progress``.

    Attributes:
        ppca, guide: the pair; its guide has ``distribution(x)``, a Gaussian.
        x: the rows it is fitted to, (N, D).
    """

    ppca: PPCA
    guide: GaussianGuide
    x: Tensor
    at: list[float] = field(default_factory=list)
    values: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, step: int, value: float) -> None:
        """Record, if enough steps have passed since the last time."""
        if not self.at or step >= RECORD_EVERY * self.at[-1]:
            bound, log_p = exact_bound(self.ppca, self.guide, self.x)
            self.at.append(float(step))
            self.values.append((float(bound), float(log_p)))

    def ascent(self) -> Ascent:
        """What was recorded."""
        columns = torch.tensor(self.values, dtype=torch.float64).reshape(-1, 2).unbind(1)
        return Ascent("steps", torch.tensor(self.at, dtype=torch.float64), *columns)


@dataclass(frozen=True)
class BoundSlice(Result):
    """log p and bounds along a line through PPCA's parameters, in nats per datum.

    Attributes:
        at: positions on the line, (A,).
        log_likelihood: there, (A,).
        touching: positions whose posterior is the q of a bound, (J,).
        bounds: E_q[log p(x, z)] + H[q] for each of these, (J, A).
    """

    at: Float[Tensor, " A"]
    log_likelihood: Float[Tensor, " A"]
    touching: Float[Tensor, " J"]
    bounds: Float[Tensor, "J A"]


@torch.no_grad()
def bound_slice(
    start: PPCA,
    end: PPCA,
    x: ArrayLike,
    *,
    touching: tuple[float, ...] = TOUCHING,
    points: int = 81,
) -> BoundSlice:
    """The log-likelihood on the line from ``start`` (0) to ``end`` (1), and bounds touching it.

    W, mu and sigma move linearly. A bound's q is p(z | x) at the point where it touches, where it
    has the value and the slope of log p; elsewhere it lies KL(q || p(z|x)) below.

    Args:
        start, end: PPCA models of one shape.
        x: data, (N, D).
        touching: where.
        points: on the line, from 0 to 1; the places of ``touching`` are added.
    """
    x = as_rows(x, start.loc, start.data_dim)
    at = torch.cat([torch.linspace(0, 1, points), torch.tensor(touching)]).double().unique()
    places = [_between(start, end, float(place)) for place in at]
    posteriors = [place.posterior(x) for place in places]
    log_p = torch.stack([place.log_likelihood(x).mean() for place in places]).double()
    bounds = []
    for place in touching:
        q = _between(start, end, place).posterior(x)
        gaps = [kl_divergence(q, posterior).mean().double() for posterior in posteriors]
        bounds.append(log_p - torch.stack(gaps))
    return BoundSlice(at, log_p, torch.tensor(touching).double(), torch.stack(bounds))


def _between(start: PPCA, end: PPCA, place: float) -> PPCA:
    names = ("loadings", "loc", "noise_scale")
    ends = [(getattr(start, name).detach(), getattr(end, name).detach()) for name in names]
    return PPCA.from_parameters(*(torch.lerp(a, b, place) for a, b in ends))
