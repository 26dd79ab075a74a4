"""The ELBO and the log-likelihood of PPCA along a fit, where both are known exactly.

log p(x) = ELBO + KL(q || p(z|x)): an E-step closes the gap, an M-step or a gradient step increases
both.
"""

from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_vae.core.arrays.inputs import as_data_and_mask, as_rows
from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.results import Result
from ppl_vae.core.validation import ArrayLike
from ppl_vae.guides.guides import GaussianGuide
from ppl_vae.models.ppca import PPCA

STEP_RATIO = 1.15
"""The ratio of the steps of successive evaluations of a :class:`BoundMonitor`."""
TOUCHING = (0.15, 0.45, 0.75)
"""The default positions at which bounds touch log p, between the two ends of a slice."""


@dataclass(frozen=True)
class Ascent(Result):
    """The bound and the log-likelihood along a fit, in nats per datum.

    Attributes:
        unit: ``"iterations"`` of EM or ``"steps"`` of SVI.
        at: the number of units completed, (T,); E-steps of EM are at t, M-steps at t + 1/2.
        bound: the ELBO, (T,).
        log_likelihood: the log-likelihood that it bounds, (T,).
    """

    unit: str
    at: Float[Tensor, " T"]
    bound: Float[Tensor, " T"]
    log_likelihood: Float[Tensor, " T"]

    def shifted(self, nats: float) -> "Ascent":
        """The ascent in other units of the data, which add ``nats`` to each log density."""
        return Ascent(self.unit, self.at, self.bound + nats, self.log_likelihood + nats)


def em_ascent(fit: FitResult) -> Ascent:
    """The bound and the log-likelihood after each E-step and each M-step of a fit by EM.

    Raises:
        ValueError: if the fit is not by EM.
    """
    if fit.log_likelihood is None or len(fit.objective) != 2 * fit.steps:
        raise ValueError(f"an ascent by E- and M-steps needs a fit by EM, not by {fit.algorithm}")
    at = torch.arange(len(fit.objective), dtype=torch.float64) / 2
    return Ascent("iterations", at, fit.objective.double(), fit.log_likelihood.double())


@torch.no_grad()
def exact_bound(
    ppca: PPCA, guide: GaussianGuide, x: Float[Tensor, "N D"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The exact ELBO of a Gaussian guide under PPCA, and log p(x), in nats per datum."""
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
class BoundMonitor:
    """Evaluates the bound while a pair is fitted; it is passed to ``fit_svi`` as ``progress``.

    Attributes:
        ppca, guide: the pair; ``guide.distribution(x)`` is Gaussian.
        x: the rows that the pair is fitted to, (N, D).
        at: the steps at which the bound was evaluated.
        values: the bound and the log-likelihood at these steps.
    """

    ppca: PPCA
    guide: GaussianGuide
    x: Tensor
    at: list[float] = field(default_factory=list)
    values: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, step: int, value: float) -> None:
        """Evaluate the bound if enough steps have passed since the last evaluation."""
        if not self.at or step >= STEP_RATIO * self.at[-1]:
            bound, log_p = exact_bound(self.ppca, self.guide, self.x)
            self.at.append(float(step))
            self.values.append((float(bound), float(log_p)))

    def ascent(self) -> Ascent:
        """The values recorded so far."""
        columns = torch.tensor(self.values, dtype=torch.float64).reshape(-1, 2).unbind(1)
        return Ascent("steps", torch.tensor(self.at, dtype=torch.float64), *columns)


@dataclass(frozen=True)
class BoundSlice(Result):
    """log p and bounds of it along a line in the parameter space of PPCA, in nats per datum.

    Attributes:
        at: positions on the line, (A,).
        log_likelihood: log p at these positions, (A,).
        touching: the positions whose posterior is the q of a bound, (J,).
        bounds: E_q[log p(x, z)] + H[q] of each of these q, (J, A).
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

    W, mu and sigma are interpolated linearly. The q of a bound is p(z | x) at the position where
    the bound touches log p, and has its value and slope; elsewhere the bound is KL(q || p(z|x))
    below log p.

    Args:
        start, end: PPCA models with the same dimensions.
        x: data, (N, D).
        touching: the positions at which bounds touch log p.
        points: the number of equally spaced positions; those of ``touching`` are added.
    """
    x = as_rows(x, start.loc, start.data_dim, start.schema)
    at = torch.cat([torch.linspace(0, 1, points), torch.tensor(touching)]).double().unique()
    models = [_interpolate(start, end, float(position)) for position in at]
    posteriors = [model.posterior(x) for model in models]
    log_p = torch.stack([model.log_likelihood(x).mean() for model in models]).double()
    bounds = []
    for position in touching:
        q = _interpolate(start, end, position).posterior(x)
        gaps = [kl_divergence(q, posterior).mean().double() for posterior in posteriors]
        bounds.append(log_p - torch.stack(gaps))
    return BoundSlice(at, log_p, torch.tensor(touching).double(), torch.stack(bounds))


def _interpolate(start: PPCA, end: PPCA, position: float) -> PPCA:
    names = ("loadings", "loc", "noise_scale")
    ends = [(getattr(start, name).detach(), getattr(end, name).detach()) for name in names]
    return PPCA.from_parameters(*(torch.lerp(a, b, position) for a, b in ends))
