"""NUTS for the parameters of BayesianPPCA, on the likelihood with z integrated out."""

import time
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.state import seeded, threads
from ppl_vae.core.validation import ArrayLike, check_option
from ppl_vae.data.sources.row_blocks import RowSource
from ppl_vae.inference.mcmc.external_nuts import NAMES, RUNNERS
from ppl_vae.inference.mcmc.hamiltonian import (
    MIN_COMPILED_ITERATIONS,
    DensityAndGradient,
    DensityGradient,
)
from ppl_vae.inference.mcmc.integrated_posterior import IntegratedPosterior
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.inference.mcmc.settings import DEFAULT_SETTINGS, ChainSettings
from ppl_vae.inference.mcmc.start import prior_notes, statistics_for
from ppl_vae.inference.svi.progress import progress_bar
from ppl_vae.models.bayesian_ppca import BayesianPPCA

MAX_MODE_ITERATIONS = 500
START_SPREAD = 2.0
"""Standard deviation of starts around the mode, in those of the Laplace approximation."""
LEAST_CURVATURE = 0.25
"""Least curvature of the Laplace approximation. The coordinates have a scale of about one under
the prior, so that no direction of the posterior is much wider than two."""


@dataclass(frozen=True)
class Whitened:
    """A density in coordinates u with position = centre + T u, of about unit covariance.

    Attributes:
        density: log p and its gradient at a position.
        centre: the origin of u, (P,).
        factor: T, (P, P).
        spread: standard deviations of starting points of chains, (P,).
    """

    density: DensityAndGradient
    centre: Float[Tensor, " P"]
    factor: Float[Tensor, "P P"]
    spread: Float[Tensor, " P"]

    @classmethod
    def around_mode(cls, posterior: IntegratedPosterior, density: DensityAndGradient) -> Self:
        """Make the coordinates from the Laplace approximation of the posterior.

        The block ``rotation`` of a position, whose prior is standard normal and on which the
        likelihood does not depend, is left as it is.
        """
        fixed = posterior.is_rotation.to(posterior.start.device)
        free = (~fixed).nonzero().flatten()
        mode = _mode(density, posterior.start, free)
        hessian = torch.autograd.functional.hessian(posterior.log_density, mode)
        values, axes = torch.linalg.eigh(-hessian[free][:, free])
        factor = torch.eye(len(mode), dtype=mode.dtype, device=mode.device)
        factor[free[:, None], free] = axes * values.clamp(min=LEAST_CURVATURE).rsqrt()
        spread = torch.where(fixed, 1.0, START_SPREAD).to(mode)
        return cls(density, torch.where(fixed, 0.0, mode), factor, spread)

    def position(self, whitened: Float[Tensor, "*S P"]) -> Float[Tensor, "*S P"]:
        """The positions of points u."""
        return self.centre + whitened @ self.factor.mT

    def __call__(self, whitened: Float[Tensor, " P"]) -> tuple[Tensor, Float[Tensor, " P"]]:
        """log p at the position of u, and its gradient with respect to u."""
        value, gradient = self.density(self.position(whitened))
        return value, self.factor.mT @ gradient

    def starts(self, chains: int) -> Float[Tensor, "C P"]:
        """Starting points of chains, more widely spread than the Laplace approximation."""
        return self.spread * torch.randn(chains, len(self.centre)).to(self.centre)


def _mode(
    density: DensityAndGradient, start: Float[Tensor, " P"], free: Int[Tensor, " F"]
) -> Float[Tensor, " P"]:
    # The maximum over the free coordinates; the others stay at the start.
    import numpy as np
    from scipy.optimize import minimize

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = density(start.index_copy(0, free, torch.from_numpy(values).to(start)))
        return -float(value), -gradient[free].numpy(force=True)

    found = minimize(
        objective,
        start[free].numpy(force=True),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": MAX_MODE_ITERATIONS},
    )
    return start.index_copy(0, free, torch.from_numpy(found.x).to(start))


def sample_nuts(
    model: BayesianPPCA,
    x: RowSource,
    mask: ArrayLike | None = None,
    settings: ChainSettings = DEFAULT_SETTINGS,
    *,
    sampler: str = "nuts",
) -> PosteriorSamples:
    """Draws of the posterior of W, mu, sigma and relevance by NUTS, for any priors.

    The density is that of the sufficient statistics with z integrated out, so that its cost does
    not depend on the number of data. W is sampled as L Q' with L lower trapezoidal and Q
    orthogonal (:class:`~ppl_vae.inference.mcmc.integrated_posterior.IntegratedPosterior`), and
    coordinates are scaled by a Laplace approximation. The chains run one after another.

    Args:
        model: the model, with conjugate priors or others.
        x: a matrix, a memory map, or an iterable of blocks of rows; NaN marks a missing value.
        mask: True where observed.
        settings: the settings of the chains.
        sampler: ``"nuts"``, that of Pyro, or ``"nutpie"``.

    Raises:
        ValueError: if x has another width than the model, or a column with nothing observed; if
            latent_dim is not smaller than data_dim.

    References:
        Hoffman, Gelman: The No-U-Turn Sampler (2014).
        Leung, Drton: Order-invariant prior specification in Bayesian factor analysis (2016).
    """
    started = time.perf_counter()
    check_option("sampler", sampler, RUNNERS)
    processes = Processes.current()
    statistics = statistics_for(
        "sample_posterior", model, x, mask, sampler=sampler, **settings.same_everywhere
    )
    with (
        seeded(processes.common_seed(settings.seed)),
        threads(1),
        progress_bar(settings.total, settings.progress, "NUTS") as report,
    ):
        posterior = IntegratedPosterior(model, statistics)
        density = DensityGradient(
            posterior.log_density,
            posterior.start,
            compiled=settings.total >= MIN_COMPILED_ITERATIONS,
        )
        whitened = Whitened.around_mode(posterior, density)
        found = RUNNERS[sampler](
            whitened,
            whitened.starts(settings.chains),
            settings,
            lambda step, value: report(step, value / statistics.num_data),
        )
        parameters = posterior.parameters(whitened.position(found.positions))
    found_draws = parameters._asdict().items()
    draws = {name: processes.broadcast(v) for name, v in found_draws if v is not None}
    return PosteriorSamples(
        draws=draws,
        sampler=f"{NAMES[sampler]} on the integrated likelihood",
        seconds=time.perf_counter() - started,
        num_data=statistics.num_data,
        divergences=found.divergences,
        acceptance=found.acceptance,
        notes=statistics.notes() + prior_notes(model, statistics.columns),
        model=model,
    )
