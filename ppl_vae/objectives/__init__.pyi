from .bounds import ELBO as ELBO
from .bounds import IWAE as IWAE
from .bounds import elbo as elbo
from .bounds import log_weights as log_weights

__all__ = [
    "ELBO",
    "IWAE",
    "elbo",
    "log_weights",
]
