"""NUTS for the parameters of BayesianPPCA, on the likelihood with z integrated out."""

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.state import seeded, threads
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.data.row_blocks import RowSource
from ppl_vae.inference.mcmc.hamiltonian import (
    MIN_COMPILED_ITERATIONS,
    DensityGradient,
    run_chains,
)
from ppl_vae.inference.mcmc.integrated_posterior import IntegratedPosterior
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.inference.mcmc.start import prior_notes, statistics_for
from ppl_vae.inference.svi.progress import ProgressCallback, progress_bar
from ppl_vae.models.bayesian_ppca import BayesianPPCA

MAX_MODE_ITERATIONS = 500
START_SPREAD = 2.0
"""Standard deviation of starts around the mode, in those of the Laplace approximation."""
LEAST_CURVATURE = 0.25
"""Least curvature of the Laplace approximation. The coordinates have a scale of about one under
the prior, so that no direction of the posterior is much wider than two."""


@dataclass(frozen=True)
class WhitenedPosterior:
    """The posterior in coordinates u of mean zero and unit covariance, position = mode + T u.

    Mode and covariance T T' are those of the Laplace approximation; the block ``rotation`` of a
    position, whose prior is standard normal, is left as it is.

    Attributes:
        posterior: the posterior.
        mode: the origin of u, (P,).
        tril: T, (P, P).
    """

    posterior: IntegratedPosterior
    mode: Float[Tensor, " P"]
    factor: Float[Tensor, "P P"]

    @classmethod
    def of(cls, posterior: IntegratedPosterior) -> "WhitenedPosterior":
        """Maximise the density and compute its curvature there."""
        free = (~posterior.is_rotation).nonzero().flatten()
        mode = _mode(posterior, free)
        hessian = torch.autograd.functional.hessian(posterior.log_density, mode)
        values, axes = torch.linalg.eigh(-hessian[free][:, free])
        factor = torch.eye(len(mode)).to(mode)
        factor[free[:, None], free] = axes * values.clamp(min=LEAST_CURVATURE).rsqrt()
        return cls(posterior, torch.where(posterior.is_rotation, 0.0, mode), factor)

    def position(self, whitened: Float[Tensor, "*S P"]) -> Float[Tensor, "*S P"]:
        """The positions of the posterior."""
        return self.mode + whitened @ self.factor.mT

    def log_density(self, whitened: Float[Tensor, "*S P"]) -> Float[Tensor, "*S"]:
        """log p(X, theta) at the position, in nats."""
        return self.posterior.log_density(self.position(whitened))

    def starts(self, chains: int) -> Float[Tensor, "C P"]:
        """Starting points of chains, more widely spread than the Laplace approximation."""
        normal = torch.randn(chains, len(self.mode)).to(self.mode)
        return torch.where(self.posterior.is_rotation, 1.0, START_SPREAD) * normal


def _mode(posterior: IntegratedPosterior, free: Tensor) -> Float[Tensor, " P"]:
    # The maximum over the free coordinates; the others stay at the start.
    import numpy as np
    from scipy.optimize import minimize

    density = DensityGradient(posterior.log_density, posterior.start, compiled=False)

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = density(posterior.start.index_copy(0, free, torch.from_numpy(values)))
        return -float(value), -gradient[free].numpy()

    first = posterior.start[free].numpy()
    options = {"maxiter": MAX_MODE_ITERATIONS}
    found = minimize(objective, first, jac=True, method="L-BFGS-B", options=options)
    return posterior.start.index_copy(0, free, torch.from_numpy(found.x))


def sample_nuts(
    model: BayesianPPCA,
    x: RowSource,
    mask: ArrayLike | None = None,
    *,
    num_samples: int = 1000,
    warmup: int = 1000,
    chains: int = 4,
    seed: int | None = None,
    progress: bool | str | ProgressCallback = "auto",
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
        num_samples: draws of each chain, S.
        warmup: iterations of each chain before these, which adapt the sampler.
        chains: the number of chains, which start at different points.
        seed: seed of the draws.
        progress: as in :func:`ppl_vae.inference.svi.fit.fit_svi`.

    Raises:
        ValueError: if x has another width than the model, or a column with nothing observed; if
            latent_dim is not smaller than data_dim.

    References:
        Hoffman, Gelman: The No-U-Turn Sampler (2014).
        Leung, Drton: Order-invariant prior specification in Bayesian factor analysis (2016).
    """
    started = time.perf_counter()
    for name, number in {"num_samples": num_samples, "warmup": warmup, "chains": chains}.items():
        check_int(name, number)
    statistics = statistics_for(model, x, mask)
    total = chains * (warmup + num_samples)
    with seeded(seed), threads(1), progress_bar(total, progress, "NUTS") as report:
        whitened = WhitenedPosterior.of(IntegratedPosterior(model, statistics))
        starts = whitened.starts(chains)
        density = DensityGradient(
            whitened.log_density, starts[0], compiled=total >= MIN_COMPILED_ITERATIONS
        )
        found = run_chains(
            density,
            starts,
            num_samples=num_samples,
            warmup=warmup,
            progress=lambda step, value: report(step, value / statistics.num_data),
        )
        parameters = whitened.posterior.parameters(whitened.position(found.positions))
    draws = {k: v for k, v in parameters._asdict().items() if v is not None}
    return PosteriorSamples(
        draws=draws,
        sampler="NUTS on the integrated likelihood",
        seconds=time.perf_counter() - started,
        num_data=statistics.num_data,
        divergences=found.divergences,
        acceptance=found.acceptance,
        notes=prior_notes(model, statistics.columns),
        model=model,
    )
