from .em.fit import fit_closed_form as fit_closed_form
from .em.fit import fit_em as fit_em
from .em.fit import variational_em as variational_em
from .mcmc.samples import PosteriorSamples as PosteriorSamples
from .mcmc.sampling import sample_posterior as sample_posterior
from .sparse.dictionary import fit_dictionary as fit_dictionary
from .sparse.map_codes import BestCodes as BestCodes
from .sparse.map_codes import best_codes as best_codes
from .sparse.pca import fit_pca as fit_pca
from .sparse.pca import implied_gaussian as implied_gaussian
from .svi.data_statistics import freeze_scale as freeze_scale
from .svi.fit import fit_svi as fit_svi
from .svi.steps.captured_svi import CapturedSVI as CapturedSVI
from .variational_bayes.fit import fit_vb as fit_vb
from .variational_bayes.result import VBResult as VBResult

__all__ = [
    "BestCodes",
    "CapturedSVI",
    "PosteriorSamples",
    "VBResult",
    "best_codes",
    "fit_closed_form",
    "fit_dictionary",
    "fit_em",
    "fit_pca",
    "fit_svi",
    "fit_vb",
    "freeze_scale",
    "implied_gaussian",
    "sample_posterior",
    "variational_em",
]
