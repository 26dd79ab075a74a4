from .calibration.result import SimulationBasedCalibration as SimulationBasedCalibration
from .calibration.simulation_based import (
    simulation_based_calibration as simulation_based_calibration,
)
from .evidence.bridge_sampling import LogEvidence as LogEvidence
from .evidence.bridge_sampling import bridge_sampling as bridge_sampling
from .evidence.laplace import minka_log_evidence as minka_log_evidence
from .evidence.latent_dims import compare_latent_dims as compare_latent_dims
from .evidence.latent_dims_result import LatentDims as LatentDims
from .evidence.log_evidence import log_evidence as log_evidence
from .evidence.loo import leave_one_out as leave_one_out
from .inference_gaps.bound_history import bound_slice as bound_slice
from .inference_gaps.bound_history import em_ascent as em_ascent
from .inference_gaps.bound_history import exact_bound as exact_bound
from .inference_gaps.gaps import gaps as gaps
from .inference_gaps.result import Gaps as Gaps
from .latent_space.atoms import Atoms as Atoms
from .latent_space.atoms import atoms as atoms
from .latent_space.collapse import collapse as collapse
from .latent_space.collapse import kl_by_dimension as kl_by_dimension
from .latent_space.collapse_result import Collapse as Collapse
from .latent_space.embeddings import Embeddings as Embeddings
from .latent_space.embeddings import compare_embeddings as compare_embeddings
from .latent_space.latent_spaces import LatentSpaces as LatentSpaces
from .latent_space.latent_spaces import latent_spaces as latent_spaces
from .latent_space.spectrum import Spectrum as Spectrum
from .latent_space.spectrum import spectrum as spectrum
from .latent_space.subspace import Subspace as Subspace
from .latent_space.subspace import subspace as subspace
from .latent_space.traversal import decode_grid as decode_grid
from .latent_space.traversal import interpolate as interpolate
from .latent_space.traversal import interpolate_codes as interpolate_codes
from .latent_space.traversal import normal_quantiles as normal_quantiles
from .latent_space.vae_limit import VAELimit as VAELimit
from .latent_space.vae_limit import vae_limit as vae_limit
from .marginal_likelihood.annealed import Annealing as Annealing
from .marginal_likelihood.bidirectional import Bidirectional as Bidirectional
from .marginal_likelihood.bidirectional import bidirectional as bidirectional
from .marginal_likelihood.compare import Comparison as Comparison
from .marginal_likelihood.compare import compare as compare
from .marginal_likelihood.cross_check import EstimatorComparison as EstimatorComparison
from .marginal_likelihood.cross_check import cross_check as cross_check
from .marginal_likelihood.estimate import LogLikelihood as LogLikelihood
from .marginal_likelihood.importance import log_likelihood as log_likelihood
from .marginal_likelihood.reliability import effective_sample_size as effective_sample_size
from .marginal_likelihood.reliability import k_hat as k_hat
from .prediction.denoising import Denoising as Denoising
from .prediction.denoising import compare_denoisers as compare_denoisers
from .prediction.imputation import impute as impute
from .prediction.label_efficiency import LabelEfficiency as LabelEfficiency
from .prediction.label_efficiency import draw_labels as draw_labels
from .prediction.label_efficiency import label_efficiency as label_efficiency
from .prediction.masked_cv import MaskedCV as MaskedCV
from .prediction.masked_cv import select_by_masked_cv as select_by_masked_cv
from .prediction.pooling import PooledEstimate as PooledEstimate
from .prediction.pooling import pool as pool
from .prediction.predictive import decode as decode
from .prediction.predictive import draw_data as draw_data
from .prediction.predictive import encode as encode
from .prediction.predictive import latent_means as latent_means
from .prediction.predictive import mean_data as mean_data
from .prediction.predictive import reconstruct as reconstruct
from .prediction.predictive_checks import PredictiveCheck as PredictiveCheck
from .prediction.predictive_checks import predictive_check as predictive_check

__all__ = [
    "Annealing",
    "Atoms",
    "Bidirectional",
    "Collapse",
    "Comparison",
    "Denoising",
    "Embeddings",
    "EstimatorComparison",
    "Gaps",
    "LabelEfficiency",
    "LatentDims",
    "LatentSpaces",
    "LogEvidence",
    "LogLikelihood",
    "MaskedCV",
    "PooledEstimate",
    "PredictiveCheck",
    "SimulationBasedCalibration",
    "Spectrum",
    "Subspace",
    "VAELimit",
    "atoms",
    "bidirectional",
    "bound_slice",
    "bridge_sampling",
    "collapse",
    "compare",
    "compare_denoisers",
    "compare_embeddings",
    "compare_latent_dims",
    "cross_check",
    "decode",
    "decode_grid",
    "draw_data",
    "draw_labels",
    "effective_sample_size",
    "em_ascent",
    "encode",
    "exact_bound",
    "gaps",
    "impute",
    "interpolate",
    "interpolate_codes",
    "k_hat",
    "kl_by_dimension",
    "label_efficiency",
    "latent_means",
    "latent_spaces",
    "leave_one_out",
    "log_evidence",
    "log_likelihood",
    "mean_data",
    "minka_log_evidence",
    "normal_quantiles",
    "pool",
    "predictive_check",
    "reconstruct",
    "select_by_masked_cv",
    "simulation_based_calibration",
    "spectrum",
    "subspace",
    "vae_limit",
]
