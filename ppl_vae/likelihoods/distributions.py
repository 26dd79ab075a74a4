"""Distributions that Pyro lacks, or does not compute accurately in float32."""

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

_BISECTIONS = 100
_HALF_LOG_TWO_PI = math.log(2 * math.pi) / 2


class _LogitParametrized(TorchDistribution):
    """Abstract: a univariate distribution for each output of a decoder."""

    arg_constraints: ClassVar[Any] = {"outputs": constraints.real}

    def __init__(self, outputs: Float[Tensor, "*B"], validate_args: bool | None = None) -> None:
        self.outputs = outputs
        super().__init__(outputs.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution with a larger batch shape."""
        return type(self)(self.outputs.expand(batch_shape), validate_args=self._validate_args)


class StandardizedNormal(dist.Normal):
    """N(origin + unit loc, (unit scale)^2), with its log density computed in standard units.

    log N(x) = log N((x - origin) / unit; loc, scale^2) - log unit: a mean that is large relative
    to the standard deviation costs no precision, and no square overflows in float32.

    Args:
        loc, scale: mean and standard deviation of (x - origin) / unit.
        origin, unit: origin and unit of the standardised x.
    """

    def __init__(
        self,
        loc: Float[Tensor, "*B D"],
        scale: Float[Tensor, "*C"],
        origin: Float[Tensor, " D"],
        unit: Float[Tensor, " D"],
        validate_args: bool | None = None,
    ) -> None:
        self.standard_loc, self.standard_scale = torch.broadcast_tensors(loc, scale)
        self.origin, self.unit = origin, unit
        super().__init__(
            origin + unit * self.standard_loc,
            unit * self.standard_scale,
            validate_args=validate_args,
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution with a larger batch shape."""
        parts = (self.standard_loc.expand(batch_shape), self.standard_scale.expand(batch_shape))
        return type(self)(*parts, self.origin, self.unit, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """log N(x) in the units of x, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        standard = ((value - self.origin) / self.unit - self.standard_loc) / self.standard_scale
        logs = self.standard_scale.log() + self.unit.log() + _HALF_LOG_TWO_PI
        return -standard.square() / 2 - logs


class LogitContinuousBernoulli(_LogitParametrized):
    """p(x) = l exp(l x) / (exp(l) - 1) on [0, 1], for a logit l.

    Pyro's implementation is parametrised by probabilities: in float32 it has no correct digits
    near one half, and none at logits beyond 17. This one uses the Langevin function
    L(t) = coth(t) - 1/t, t = l/2, which has a series at 0.

    Args:
        outputs: logits l.

    References:
        Loaiza-Ganem, Cunningham: The continuous Bernoulli: fixing a pervasive error in
        variational autoencoders (2019).
    """

    support: Any = constraints.unit_interval
    has_rsample = True

    def log_prob(self, value: Tensor) -> Tensor:
        """x l - log(1 + e^l) + log C, C = l coth(l/2) = 2 (1 + t L(t)), in nats."""
        if self._validate_args:
            self._validate_sample(value)
        half = self.outputs / 2
        cross_entropy = torch.nn.functional.softplus(self.outputs) - value * self.outputs
        return torch.log(2 + 2 * half * langevin(half)) - cross_entropy

    @property
    def mean(self) -> Tensor:
        """E x = (1 + L(l/2)) / 2."""
        return (1 + langevin(self.outputs / 2)) / 2

    @property
    def variance(self) -> Tensor:
        """Var x = L'(l/2) / 4."""
        t = self.outputs.abs() / 2
        # Each formula is used where it does not suffer from cancellation.
        small, large = t.clamp(max=1), t.clamp(min=1)
        ratio = _langevin_ratio(small)
        near = 1 - 2 * ratio - (small * ratio).square()
        return torch.where(t < 1, near, large.pow(-2) - torch.sinh(large).pow(-2)) / 4

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws by inversion of the distribution function, differentiable in the logits."""
        shape = self._extended_shape(sample_shape)
        # Computed for l < 0, where nothing overflows; x at l is 1 - x at -l. At 0 it is uniform.
        negative = -self.outputs.abs().clamp(min=torch.finfo(self.outputs.dtype).tiny ** 0.5)
        uniform = torch.rand(shape, dtype=self.outputs.dtype, device=self.outputs.device)
        x = (torch.log1p(uniform * torch.expm1(negative)) / negative).clamp(0, 1)
        return torch.where(self.outputs < 0, x, 1 - x)


def langevin(t: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """The Langevin function coth(t) - 1/t, to full precision at 0 too."""
    return t * _langevin_ratio(t)


def _langevin_ratio(t: Tensor) -> Tensor:
    # (coth(t) - 1/t)/t = 1/3 - t^2/45 + 2 t^4/945 - ...
    small = t.abs() < 0.25
    square = torch.where(small, t, 0.0).square()
    series = torch.zeros_like(t)
    for c in (4 / 18_243_225, -1382 / 638_512_875, 2 / 93_555, -1 / 4725, 2 / 945, -1 / 45, 1 / 3):
        series = series * square + c
    other = torch.where(small, 1.0, t)
    return torch.where(small, series, (1 / torch.tanh(other) - 1 / other) / other)


def continuous_bernoulli_logit(mean: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """The logit at which a continuous Bernoulli has this mean in (0, 1), by bisection."""
    high = 2 / torch.minimum(mean, 1 - mean)  # the mean at a large logit l is 1 - 1/l
    low = -high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        above = LogitContinuousBernoulli(middle).mean > mean
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


class SoftTargetBernoulli(dist.Bernoulli):
    """x log p + (1 - x) log(1 - p) for x in [0, 1]: a negative cross-entropy, no density of x."""

    support = constraints.unit_interval


class OrdinalCategorical(dist.Categorical):
    """A categorical distribution over the numbers 0..C-1, with a mean; draws are floats."""

    @property
    def mean(self) -> Tensor:
        """sum_c c p_c."""
        return (self.probs * self._values()).sum(-1)

    @property
    def variance(self) -> Tensor:
        """sum_c (c - mean)^2 p_c."""
        return (self.probs * (self._values() - self.mean.unsqueeze(-1)).square()).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws in the dtype of the logits."""
        return super().sample(torch.Size(sample_shape)).to(self.logits)

    def _values(self) -> Tensor:
        return torch.arange(self.logits.shape[-1], device=self.logits.device)


class LogRatePoisson(_LogitParametrized):
    """p(x) = exp(x a - e^a) / x! for counts x with log-rate a, which may be very negative.

    Args:
        outputs: log-rates.
    """

    support: Any = constraints.nonnegative_integer

    def log_prob(self, value: Tensor) -> Tensor:
        """x a - e^a - log x!, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        return value * self.outputs - self.outputs.exp() - torch.lgamma(value + 1)

    @property
    def mean(self) -> Tensor:
        """e^a."""
        return self.outputs.exp()

    @property
    def variance(self) -> Tensor:
        """e^a."""
        return self.outputs.exp()

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, as floats."""
        with torch.no_grad():
            return torch.poisson(self.mean.expand(self._extended_shape(sample_shape)))


class ConditionalMultinomial(TorchDistribution):
    """p(x | n) = n! prod_d p_d^{x_d} / x_d! for rows of counts x with total n.

    Unlike Pyro's ``Multinomial`` it scores rows with different totals, each given its own.

    Args:
        logits: log p_d, up to a constant.
        total_count: n of draws; without it neither draws nor moments are available.
    """

    arg_constraints: ClassVar[Any] = {"logits": constraints.real_vector}
    support: Any = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(
        self,
        logits: Float[Tensor, "*B D"],
        total_count: Float[Tensor, "*#B"] | Int[Tensor, "*#B"] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.logits = torch.log_softmax(logits, -1)
        self._total_count = total_count
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution with a larger batch shape."""
        total = None if self._total_count is None else self._total_count.expand(batch_shape)
        logits = self.logits.expand(*batch_shape, self.logits.shape[-1])
        return type(self)(logits, total, validate_args=self._validate_args)

    @property
    def probs(self) -> Tensor:
        """The probabilities p_d."""
        return self.logits.exp()

    @property
    def total_count(self) -> Tensor:
        """The totals of draws.

        Raises:
            ValueError: if they are unknown.
        """
        if self._total_count is None:
            raise ValueError(
                "a multinomial has moments and draws only given a total, which is unknown here: "
                "pass x, whose rows have totals, or use the likelihood Multinomial(total_count=n)"
            )
        return self._total_count

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x | n), with n the total of x, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        coefficient = torch.lgamma(value.sum(-1) + 1) - torch.lgamma(value + 1).sum(-1)
        return coefficient + (value * self.logits).sum(-1)

    @property
    def mean(self) -> Tensor:
        """n p_d."""
        return self.total_count.unsqueeze(-1) * self.probs

    @property
    def variance(self) -> Tensor:
        """n p_d (1 - p_d)."""
        return self.mean * (1 - self.probs)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, as floats: x_d given x_1..x_{d-1} is binomial."""
        shape = self._extended_shape(sample_shape)
        probs = self.probs.double().expand(shape)
        remaining = self.total_count.double().expand(shape[:-1])
        # The probability of d given that it is none of 1..d-1.
        tail = probs.flip(-1).cumsum(-1).flip(-1)
        conditional = torch.where(tail > 0, probs / tail, 1.0).clamp(max=1)
        drawn = []
        for p in conditional[..., :-1].unbind(-1):
            drawn.append(torch.binomial(remaining.contiguous(), p.contiguous()))
            remaining = remaining - drawn[-1]
        return torch.stack([*drawn, remaining], -1).to(self.logits)
