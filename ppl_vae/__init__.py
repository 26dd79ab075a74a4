"""ppl_vae: probabilistic PCA and variational autoencoders as Pyro model/guide pairs.

From exact EM over variational EM and amortized inference to the variational autoencoder, each
rung fitted with the algorithm that belongs to it and measured in nats a datum.
"""

from ppl_vae.data import digits
from ppl_vae.evaluation.gaps import Gaps, gaps
from ppl_vae.evaluation.likelihood import LogLikelihood, log_likelihood
from ppl_vae.evaluation.subspace import Subspace, subspace
from ppl_vae.guides import AmortizedGuide, ExactGuide, MeanFieldGuide
from ppl_vae.inference.em import fit_closed_form, fit_em, variational_em
from ppl_vae.inference.svi import fit_svi
from ppl_vae.lineage import Lineage, run_lineage
from ppl_vae.models.likelihoods import Bernoulli, Gaussian, Likelihood
from ppl_vae.models.networks import mlp
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.objectives import ELBO, IWAE, elbo, log_weights
from ppl_vae.program import Program
from ppl_vae.results import FitResult
from ppl_vae.storage import load, save

__all__ = [
    "ELBO",
    "IWAE",
    "PPCA",
    "VAE",
    "AmortizedGuide",
    "Bernoulli",
    "ExactGuide",
    "FitResult",
    "Gaps",
    "Gaussian",
    "Likelihood",
    "Lineage",
    "LogLikelihood",
    "MeanFieldGuide",
    "Program",
    "Subspace",
    "digits",
    "elbo",
    "fit_closed_form",
    "fit_em",
    "fit_svi",
    "gaps",
    "load",
    "log_likelihood",
    "log_weights",
    "mlp",
    "run_lineage",
    "save",
    "subspace",
    "variational_em",
]
