"""ppl_vae: probabilistic PCA and variational autoencoders as Pyro model/guide pairs.

From exact EM over variational EM and amortized inference to the variational autoencoder, each
rung fitted with the algorithm that belongs to it and measured in nats a datum.
"""

from ppl_vae.data import Dequantization, binarize, digits
from ppl_vae.evaluation.annealed import Annealing
from ppl_vae.evaluation.bidirectional import Bidirectional, bidirectional
from ppl_vae.evaluation.collapse import Collapse, collapse, kl_by_dimension
from ppl_vae.evaluation.compare import Comparison, compare
from ppl_vae.evaluation.deja_vu import DejaVu, deja_vu
from ppl_vae.evaluation.denoising import Denoising, compare_denoisers
from ppl_vae.evaluation.estimates import LogLikelihood
from ppl_vae.evaluation.few_labels import FewLabels, few_labels
from ppl_vae.evaluation.gaps import Gaps, gaps
from ppl_vae.evaluation.hidden_cells import HiddenCells, compare_on_hidden_cells
from ppl_vae.evaluation.imputation import impute
from ppl_vae.evaluation.likelihood import log_likelihood
from ppl_vae.evaluation.maps import Maps, compare_maps
from ppl_vae.evaluation.opinions import Opinions, opinions
from ppl_vae.evaluation.spectrum import spectrum
from ppl_vae.evaluation.subspace import Subspace, subspace
from ppl_vae.guides import AmortizedGuide, ExactGuide, MeanFieldGuide
from ppl_vae.images import Images, image_set
from ppl_vae.inference.captured_svi import CapturedSVI
from ppl_vae.inference.codes import BestCodes, best_codes
from ppl_vae.inference.dictionary import fit_dictionary
from ppl_vae.inference.em import fit_closed_form, fit_em, variational_em
from ppl_vae.inference.freezing import freeze_scale
from ppl_vae.inference.pca import fit_pca, implied_gaussian
from ppl_vae.inference.svi import fit_svi
from ppl_vae.interop.arviz import to_arviz
from ppl_vae.interop.encoders import EncoderClassifier, FeatureTransformer
from ppl_vae.interop.sklearn import PPCATransformer
from ppl_vae.lineage import Lineage, run_lineage
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.models.corruption import GaussianNoise, MaskingNoise
from ppl_vae.models.gaussian import Gaussian
from ppl_vae.models.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    Multinomial,
    Poisson,
)
from ppl_vae.models.networks import mlp
from ppl_vae.models.observation import Likelihood
from ppl_vae.models.patches import HiddenPatches
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.supervised import SupervisedEncoder
from ppl_vae.models.transformers import PatchDecoder, PatchTransformer
from ppl_vae.models.vae import VAE
from ppl_vae.objectives import ELBO, IWAE, elbo, log_weights
from ppl_vae.program import Program
from ppl_vae.results import FitResult, Imputation
from ppl_vae.sparse_ladder import SparseLadder, run_sparse_ladder
from ppl_vae.storage import load, save
from ppl_vae.tables import Table, read_table
from ppl_vae.texts import count_words, docstrings
from ppl_vae.topics import match_topics, simulate_topics, top_words, topic_vae

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
    "DejaVu",
    "Denoising",
    "Dequantization",
    "EncoderClassifier",
    "ExactGuide",
    "FeatureTransformer",
    "FewLabels",
    "FitResult",
    "Gaps",
    "Gaussian",
    "GaussianNoise",
    "HiddenCells",
    "HiddenPatches",
    "Images",
    "Imputation",
    "Likelihood",
    "Lineage",
    "LogLikelihood",
    "Maps",
    "MaskingNoise",
    "MeanFieldGuide",
    "Multinomial",
    "Opinions",
    "PPCATransformer",
    "PatchDecoder",
    "PatchTransformer",
    "Poisson",
    "Program",
    "SparseLadder",
    "Subspace",
    "SupervisedEncoder",
    "Table",
    "best_codes",
    "bidirectional",
    "binarize",
    "collapse",
    "compare",
    "compare_denoisers",
    "compare_maps",
    "compare_on_hidden_cells",
    "count_words",
    "deja_vu",
    "digits",
    "docstrings",
    "elbo",
    "few_labels",
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
    "load",
    "log_likelihood",
    "log_weights",
    "match_topics",
    "mlp",
    "opinions",
    "read_table",
    "run_lineage",
    "run_sparse_ladder",
    "save",
    "simulate_topics",
    "spectrum",
    "subspace",
    "to_arviz",
    "top_words",
    "topic_vae",
    "variational_em",
]
