from .autoencoder import Autoencoder as Autoencoder
from .bayesian_ppca import BayesianPPCA as BayesianPPCA
from .ppca import PPCA as PPCA
from .priors import InverseGammaScale as InverseGammaScale
from .storage import load as load
from .storage import save as save
from .supervised import SupervisedEncoder as SupervisedEncoder
from .topics import TopicDecoder as TopicDecoder
from .topics import top_words as top_words
from .topics import topic_vae as topic_vae
from .vae import VAE as VAE
from .variational_posterior import VBPosterior as VBPosterior

__all__ = [
    "PPCA",
    "VAE",
    "Autoencoder",
    "BayesianPPCA",
    "InverseGammaScale",
    "SupervisedEncoder",
    "TopicDecoder",
    "VBPosterior",
    "load",
    "save",
    "top_words",
    "topic_vae",
]
