"""Priors on parameters: distributions whose own parameters move with a model."""

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.core.config import describe
from ppl_vae.core.program import Density


class InverseGammaScale(dist.TorchDistribution):
    """A standard deviation sigma with sigma^2 ~ InverseGamma(concentration, rate).

    It is the conjugate prior of the noise scale of a linear-Gaussian model. The density of sigma
    is 2 rate^a / Gamma(a) sigma^(-2a - 1) exp(-rate / sigma^2) with a the concentration.

    Args:
        concentration, rate: those of the precision 1 / sigma^2 ~ Gamma(concentration, rate).
    """

    arg_constraints: ClassVar[Any] = {  # pyright: ignore
        "concentration": constraints.positive,
        "rate": constraints.positive,
    }
    support: Any = constraints.positive  # pyright: ignore
    has_rsample = True

    def __init__(
        self,
        concentration: Tensor | float,
        rate: Tensor | float,
        validate_args: bool | None = None,
    ) -> None:
        self._precision = dist.Gamma(concentration, rate, validate_args=validate_args)
        self.concentration, self.rate = self._precision.concentration, self._precision.rate
        super().__init__(self._precision.batch_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "InverseGammaScale":
        """The same prior with this batch shape."""
        shape = torch.Size(batch_shape)
        return InverseGammaScale(
            self.concentration.expand(shape), self.rate.expand(shape), validate_args=False
        )

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws with a gradient to the parameters, those of a gamma variable to the power -1/2."""
        return self._precision.rsample(torch.Size(sample_shape)).rsqrt()

    def log_prob(self, value: Tensor) -> Tensor:
        """log of the density of sigma."""
        if self._validate_args:
            self._validate_sample(value)
        # |d precision / d sigma| = 2 sigma^-3
        return self._precision.log_prob(value**-2) + math.log(2) - 3 * value.log()


class ParameterPrior(nn.Module):
    """The prior of one parameter: a univariate distribution for each of its elements.

    The distribution's own parameters are buffers, so that they take the dtype and the device of
    the model, and are saved with it.

    Args:
        name: the parameter's name, for messages.
        prior: a distribution with an empty event shape, whose batch shape expands to ``shape``.
        shape: the parameter's shape.
        positive: whether the parameter is positive.

    Raises:
        TypeError: if ``prior`` is not a distribution of Pyro.
        ValueError: if it is improper or multivariate, if its shape does not expand to the
            parameter's, if its support is not that of the parameter, or if one of its parameters
            is not finite.
    """

    def __init__(
        self, name: str, prior: Density, shape: tuple[int, ...], *, positive: bool = False
    ) -> None:
        super().__init__()
        _check_prior(name, prior, shape, positive)
        self.family, self.shape = type(prior), torch.Size(shape)
        for key in prior.arg_constraints:
            self.register_buffer(key, torch.as_tensor(getattr(prior, key)).detach().clone())

    def forward(self) -> Density:
        """The distribution of the parameter, with all of its dimensions in the event."""
        return self.univariate().expand(self.shape).to_event(len(self.shape))

    def univariate(self) -> Density:
        """The distribution as it was given, with a batch shape that expands to the parameter's."""
        family: Any = self.family
        return family(**dict(self.named_buffers()))

    def is_normal_about_zero(self) -> bool:
        """Whether it is a normal distribution of mean zero."""
        return self.family is dist.Normal and not bool(self.get_buffer("loc").any())

    def is_constant_in_rows(self) -> bool:
        """Whether the elements of each row of a matrix have one and the same prior."""
        wide = [value.expand(self.shape) for value in self.buffers()]
        return all(bool((value == value[..., :1]).all()) for value in wide)

    def __repr__(self) -> str:
        return repr(describe(self.univariate()))


PRIOR_FAMILIES: tuple[type[Density], ...] = (
    dist.Cauchy,
    dist.Exponential,
    dist.Gamma,
    dist.HalfCauchy,
    dist.HalfNormal,
    dist.InverseGamma,
    dist.Laplace,
    dist.LogNormal,
    dist.Normal,
    dist.StudentT,
    InverseGammaScale,
)
"""Families that a saved model can have as priors."""


def _check_prior(name: str, prior: Any, shape: tuple[int, ...], positive: bool) -> None:
    argument = f"{name}_prior"
    if not isinstance(prior, Density):
        raise TypeError(
            f"{argument} must be a distribution of pyro.distributions, such as "
            f"dist.{'HalfNormal(1.0)' if positive else 'Normal(0.0, 1.0)'}; got {prior!r}"
        )
    if isinstance(prior, dist.ImproperUniform) or not prior.arg_constraints:
        raise ValueError(
            f"{argument} must be a proper distribution with parameters; got {prior!r}. Use a wide "
            f"one, such as dist.{'HalfCauchy(10.0)' if positive else 'Normal(0.0, 100.0)'}"
        )
    if prior.event_shape:
        raise ValueError(
            f"{argument} must be univariate (one distribution for each element); its event shape "
            f"is {tuple(prior.event_shape)}"
        )
    try:
        prior.expand(torch.Size(shape))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{argument} has batch shape {tuple(prior.batch_shape)}, which does not expand to the "
            f"shape {shape} of {name}"
        ) from error
    for key in prior.arg_constraints:
        if not bool(torch.as_tensor(getattr(prior, key)).isfinite().all()):
            raise ValueError(f"{argument} has a {key} that is not finite; every one must be")
    _check_prior_support(name, prior, positive)


def _check_prior_support(name: str, prior: Density, positive: bool) -> None:
    support: Any = prior.support
    is_positive = support in (constraints.positive, constraints.nonnegative)
    if positive != is_positive or not (positive or support == constraints.real):
        needed = "positive numbers" if positive else "all real numbers"
        raise ValueError(
            f"{name}_prior must have {needed} as its support; {type(prior).__name__} has {support}"
        )
