from .base import Likelihood as Likelihood
from .discrete import Bernoulli as Bernoulli
from .discrete import Categorical as Categorical
from .discrete import ContinuousBernoulli as ContinuousBernoulli
from .discrete import Multinomial as Multinomial
from .discrete import Poisson as Poisson
from .gaussian import Gaussian as Gaussian
from .gaussian import OptimalGaussian as OptimalGaussian

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "Gaussian",
    "Likelihood",
    "Multinomial",
    "OptimalGaussian",
    "Poisson",
]
