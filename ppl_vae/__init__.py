"""ppl_vae: probabilistic PCA and variational autoencoders as Pyro model/guide pairs.

From exact EM over variational EM and amortized inference to the variational autoencoder, each
stage fitted with the algorithm that belongs to it and measured in nats per datum.
"""

from ppl_vae.core.program import Program
from ppl_vae.core.results import FitResult, Imputation
from ppl_vae.data.images import Images, image_set
from ppl_vae.data.tables import Table, read_table
from ppl_vae.data.texts import count_words, docstrings
from ppl_vae.data.transforms import Dequantization, binarize, digits
from ppl_vae.evaluation.inference_gaps.gaps import Gaps, gaps
from ppl_vae.evaluation.latent_space.collapse import Collapse, collapse, kl_by_dimension
from ppl_vae.evaluation.latent_space.embeddings import Embeddings, compare_embeddings
from ppl_vae.evaluation.latent_space.spectrum import spectrum
from ppl_vae.evaluation.latent_space.subspace import Subspace, subspace
from ppl_vae.evaluation.latent_space.vae_limit import VAELimit, vae_limit
from ppl_vae.evaluation.marginal_likelihood.annealed import Annealing
from ppl_vae.evaluation.marginal_likelihood.bidirectional import Bidirectional, bidirectional
from ppl_vae.evaluation.marginal_likelihood.compare import Comparison, compare
from ppl_vae.evaluation.marginal_likelihood.cross_check import EstimatorComparison, cross_check
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.evaluation.prediction.denoising import Denoising, compare_denoisers
from ppl_vae.evaluation.prediction.imputation import impute
from ppl_vae.evaluation.prediction.label_efficiency import LabelEfficiency, label_efficiency
from ppl_vae.evaluation.prediction.masked_cv import MaskedCV, select_by_masked_cv
from ppl_vae.guides.guides import AmortizedGuide, ExactGuide, PerDatumGuide
from ppl_vae.inference.em.fit import fit_closed_form, fit_em, variational_em
from ppl_vae.inference.sparse.dictionary import fit_dictionary
from ppl_vae.inference.sparse.map_codes import BestCodes, best_codes
from ppl_vae.inference.sparse.pca import fit_pca, implied_gaussian
from ppl_vae.inference.svi.calibration import freeze_scale
from ppl_vae.inference.svi.captured_svi import CapturedSVI
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.interop.arviz import to_arviz
from ppl_vae.interop.encoders import EncoderClassifier, FeatureTransformer
from ppl_vae.interop.sklearn import PPCATransformer
from ppl_vae.likelihoods.base import Likelihood
from ppl_vae.likelihoods.discrete import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    Multinomial,
    Poisson,
)
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.lineage.result import Lineage
from ppl_vae.lineage.run import run_lineage
from ppl_vae.lineage.sparse_run import SparseLineage, run_sparse_lineage
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.storage import load, save
from ppl_vae.models.supervised import SupervisedEncoder
from ppl_vae.models.topics import match_topics, simulate_topics, top_words, topic_vae
from ppl_vae.models.vae import VAE
from ppl_vae.networks.corruption import GaussianNoise, MaskingNoise
from ppl_vae.networks.mlp_conv import mlp
from ppl_vae.networks.patches import HiddenPatches
from ppl_vae.networks.transformers import PatchDecoder, PatchTransformer
from ppl_vae.objectives.bounds import ELBO, IWAE, elbo, log_weights

__all__ = [
    "ELBO",
    "IWAE",
    "PPCA",
    "VAE",
    "AmortizedGuide",
    "Annealing",
    "Autoencoder",
    "Bernoulli",
    "BestCodes",
    "Bidirectional",
    "CapturedSVI",
    "Categorical",
    "Collapse",
    "Comparison",
    "ContinuousBernoulli",
    "Denoising",
    "Dequantization",
    "Embeddings",
    "EncoderClassifier",
    "EstimatorComparison",
    "ExactGuide",
    "FeatureTransformer",
    "FitResult",
    "Gaps",
    "Gaussian",
    "GaussianNoise",
    "HiddenPatches",
    "Images",
    "Imputation",
    "LabelEfficiency",
    "Likelihood",
    "Lineage",
    "LogLikelihood",
    "MaskedCV",
    "MaskingNoise",
    "Multinomial",
    "PPCATransformer",
    "PatchDecoder",
    "PatchTransformer",
    "PerDatumGuide",
    "Poisson",
    "Program",
    "SparseLineage",
    "Subspace",
    "SupervisedEncoder",
    "Table",
    "VAELimit",
    "best_codes",
    "bidirectional",
    "binarize",
    "collapse",
    "compare",
    "compare_denoisers",
    "compare_embeddings",
    "count_words",
    "cross_check",
    "digits",
    "docstrings",
    "elbo",
    "fit_closed_form",
    "fit_dictionary",
    "fit_em",
    "fit_pca",
    "fit_svi",
    "freeze_scale",
    "gaps",
    "image_set",
    "implied_gaussian",
    "impute",
    "kl_by_dimension",
    "label_efficiency",
    "load",
    "log_likelihood",
    "log_weights",
    "match_topics",
    "mlp",
    "read_table",
    "run_lineage",
    "run_sparse_lineage",
    "save",
    "select_by_masked_cv",
    "simulate_topics",
    "spectrum",
    "subspace",
    "to_arviz",
    "top_words",
    "topic_vae",
    "vae_limit",
    "variational_em",
]
