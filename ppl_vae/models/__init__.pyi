from .autoencoder import Autoencoder as Autoencoder
from .ppca import PPCA as PPCA
from .storage import load as load
from .storage import save as save
from .supervised import SupervisedEncoder as SupervisedEncoder
from .topics import TopicDecoder as TopicDecoder
from .topics import top_words as top_words
from .topics import topic_vae as topic_vae
from .vae import VAE as VAE

__all__ = [
    "PPCA",
    "VAE",
    "Autoencoder",
    "SupervisedEncoder",
    "TopicDecoder",
    "load",
    "save",
    "top_words",
    "topic_vae",
]
