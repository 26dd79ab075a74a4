from . import capture as capture
from . import core as core
from . import data as data
from . import evaluation as evaluation
from . import fitted as fitted
from . import guides as guides
from . import inference as inference
from . import interop as interop
from . import likelihoods as likelihoods
from . import lineage as lineage
from . import models as models
from . import networks as networks
from . import objectives as objectives
from . import plots as plots
from . import report as report

__version__: str

from .core.program import Program as Program
from .data.files.tables import read_table as read_table
from .data.grey_values import binarize as binarize
from .data.handwritten_digits import digits as digits
from .evaluation.calibration.simulation_based import (
    simulation_based_calibration as simulation_based_calibration,
)
from .evaluation.inference_gaps.gaps import gaps as gaps
from .evaluation.latent_space.collapse import collapse as collapse
from .evaluation.latent_space.spectrum import spectrum as spectrum
from .evaluation.marginal_likelihood.compare import compare as compare
from .evaluation.marginal_likelihood.cross_check import cross_check as cross_check
from .evaluation.marginal_likelihood.importance import log_likelihood as log_likelihood
from .evaluation.prediction.imputation import impute as impute
from .evaluation.prediction.masked_cv import select_by_masked_cv as select_by_masked_cv
from .guides.guides import AmortizedGuide as AmortizedGuide
from .guides.guides import ExactGuide as ExactGuide
from .guides.guides import PerDatumGuide as PerDatumGuide
from .inference.em.fit import fit_closed_form as fit_closed_form
from .inference.em.fit import fit_em as fit_em
from .inference.em.fit import variational_em as variational_em
from .inference.mcmc.sampling import sample_posterior as sample_posterior
from .inference.svi.fit import fit_svi as fit_svi
from .inference.svi.steps.captured_svi import CapturedSVI as CapturedSVI
from .inference.variational_bayes.fit import fit_vb as fit_vb
from .interop.arviz import to_arviz as to_arviz
from .interop.sklearn import PPCATransformer as PPCATransformer
from .likelihoods.discrete import Bernoulli as Bernoulli
from .likelihoods.discrete import Categorical as Categorical
from .likelihoods.discrete import ContinuousBernoulli as ContinuousBernoulli
from .likelihoods.discrete import Poisson as Poisson
from .likelihoods.gaussian import Gaussian as Gaussian
from .lineage.run import run_lineage as run_lineage
from .models.autoencoder import Autoencoder as Autoencoder
from .models.bayesian_ppca import BayesianPPCA as BayesianPPCA
from .models.ppca import PPCA as PPCA
from .models.storage import load as load
from .models.storage import save as save
from .models.vae import VAE as VAE
from .networks.mlp_conv import mlp as mlp
from .objectives.bounds import ELBO as ELBO
from .objectives.bounds import IWAE as IWAE
from .objectives.bounds import elbo as elbo
from .objectives.bounds import log_weights as log_weights

__all__ = [
    "ELBO",
    "IWAE",
    "PPCA",
    "VAE",
    "AmortizedGuide",
    "Autoencoder",
    "BayesianPPCA",
    "Bernoulli",
    "CapturedSVI",
    "Categorical",
    "ContinuousBernoulli",
    "ExactGuide",
    "Gaussian",
    "PPCATransformer",
    "PerDatumGuide",
    "Poisson",
    "Program",
    "binarize",
    "collapse",
    "compare",
    "cross_check",
    "digits",
    "elbo",
    "fit_closed_form",
    "fit_em",
    "fit_svi",
    "fit_vb",
    "gaps",
    "impute",
    "load",
    "log_likelihood",
    "log_weights",
    "mlp",
    "read_table",
    "run_lineage",
    "sample_posterior",
    "save",
    "select_by_masked_cv",
    "simulation_based_calibration",
    "spectrum",
    "to_arviz",
    "variational_em",
]
