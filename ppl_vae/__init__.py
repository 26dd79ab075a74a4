"""ppl_vae: probabilistic PCA and variational autoencoders as Pyro model/guide pairs.

Every model between probabilistic PCA and the variational autoencoder is fitted by its own
algorithm and compared in nats per datum, against the exact answer where one exists. Names are
imported when they are first used (PEP 562); the stub in this folder lists them.
"""

import lazy_loader

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
