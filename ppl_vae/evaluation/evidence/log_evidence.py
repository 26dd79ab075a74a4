"""The log evidence of Bayesian PPCA from draws of its posterior."""

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.arrays.inputs import schema_of
from ppl_vae.core.validation import ArrayLike
from ppl_vae.evaluation.evidence.bridge_sampling import LogEvidence, bridge_sampling
from ppl_vae.inference.mcmc.integrated_posterior import IntegratedPosterior
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.models.bayesian_ppca import BayesianPPCA
from ppl_vae.models.linear.table_statistics import TableStatistics


def log_evidence(
    samples: PosteriorSamples,
    x: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    seed: int | None = None,
) -> LogEvidence:
    """log p(x) of Bayesian PPCA by bridge sampling, in nats for the whole data set.

    z is integrated out, and so are rotations of W: the coordinates are those of
    :class:`~ppl_vae.inference.mcmc.integrated_posterior.IntegratedPosterior`.

    Args:
        samples: draws of the posterior given x, with its model.
        x: the data the samples were drawn with, (N, D); NaN marks a missing value.
        mask: True where observed.
        seed: the seed of the draws from the normal approximation.

    Raises:
        ValueError: if the samples have no model, or its prior on the loadings is not invariant
            under rotations (ARD is not).
    """
    posterior = evidence_coordinates(
        samples.model, TableStatistics.of(x, mask, schema=schema_of(samples.model))
    )
    draws = positions(posterior, samples)
    return bridge_sampling(posterior.log_density, draws, seed=seed)


def evidence_coordinates(model: object, statistics: TableStatistics) -> IntegratedPosterior:
    """The posterior density of a model in coordinates that are identified.

    Raises:
        ValueError: if the model is no BayesianPPCA, or its prior on the loadings is not normal
            about zero with one scale in each row.
    """
    if not isinstance(model, BayesianPPCA):
        raise ValueError(
            f"the evidence is computed for BayesianPPCA; these samples have the model {model!r}. "
            "For another model pass its log density and draws to bridge_sampling"
        )
    posterior = IntegratedPosterior(model, statistics)
    if not posterior.is_invariant:
        raise ValueError(
            "the evidence needs a prior on the loadings that is invariant under rotations: "
            "prior='normal' and loadings_prior=dist.Normal(0, s) with s a number or of shape "
            f"(D, 1); this model is {model!r}"
        )
    return posterior


def positions(posterior: IntegratedPosterior, samples: PosteriorSamples) -> Float[Tensor, "C S P"]:
    """Draws of the parameters in the coordinates of the posterior density."""
    draws = samples.draws
    loc = (draws["loc"] - posterior.statistics.mean) / posterior.scale
    log_noise = draws["noise_scale"].log()
    log_noise = log_noise if posterior.model.noise == "diagonal" else log_noise.unsqueeze(-1)
    return torch.cat([posterior.trapezoid.coordinates(draws["loadings"]), loc, log_noise], -1)
