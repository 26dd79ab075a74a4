from .bounds import plot_bound_slice as plot_bound_slice
from .bounds import plot_em as plot_em
from .bounds import plot_svi as plot_svi
from .calibration import plot_rank_ecdf as plot_rank_ecdf
from .dictionary import plot_atoms as plot_atoms
from .dictionary import plot_sparse_lineage as plot_sparse_lineage
from .estimates import plot_comparison as plot_comparison
from .estimates import plot_convergence as plot_convergence
from .estimates import plot_cross_check as plot_cross_check
from .estimates import plot_tail_index as plot_tail_index
from .images import plot_denoised as plot_denoised
from .images import plot_interpolation as plot_interpolation
from .images import plot_manifold as plot_manifold
from .images import plot_reconstructions as plot_reconstructions
from .images import plot_samples as plot_samples
from .label_efficiency import plot_accuracy as plot_accuracy
from .label_efficiency import plot_accuracy_gain as plot_accuracy_gain
from .label_efficiency import plot_label_efficiency as plot_label_efficiency
from .latent_dims import plot_latent_dims as plot_latent_dims
from .latent_spaces import plot_embedding as plot_embedding
from .latent_spaces import plot_embeddings as plot_embeddings
from .latent_spaces import plot_kl_by_dimension as plot_kl_by_dimension
from .latent_spaces import plot_latent_means as plot_latent_means
from .latent_spaces import plot_latent_space as plot_latent_space
from .latent_spaces import plot_latent_spaces as plot_latent_spaces
from .latent_spaces import plot_spectrum as plot_spectrum
from .lineage import plot_gaps as plot_gaps
from .lineage import plot_objective as plot_objective
from .predictive_checks import plot_covariance_check as plot_covariance_check
from .predictive_checks import plot_quantile_check as plot_quantile_check
from .topics import plot_topic_interpolation as plot_topic_interpolation
from .vae_limit import plot_vae_limit as plot_vae_limit

__all__ = [
    "plot_accuracy",
    "plot_accuracy_gain",
    "plot_atoms",
    "plot_bound_slice",
    "plot_comparison",
    "plot_convergence",
    "plot_covariance_check",
    "plot_cross_check",
    "plot_denoised",
    "plot_em",
    "plot_embedding",
    "plot_embeddings",
    "plot_gaps",
    "plot_interpolation",
    "plot_kl_by_dimension",
    "plot_label_efficiency",
    "plot_latent_dims",
    "plot_latent_means",
    "plot_latent_space",
    "plot_latent_spaces",
    "plot_manifold",
    "plot_objective",
    "plot_quantile_check",
    "plot_rank_ecdf",
    "plot_reconstructions",
    "plot_samples",
    "plot_sparse_lineage",
    "plot_spectrum",
    "plot_svi",
    "plot_tail_index",
    "plot_topic_interpolation",
    "plot_vae_limit",
]
