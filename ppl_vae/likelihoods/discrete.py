"""Likelihoods of binary, bounded, categorical and count data, normalising constants included.

:class:`~ppl_vae.likelihoods.base.Likelihood` is their interface.
"""

from abc import abstractmethod

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import constraints

from ppl_vae.core.config import configurable
from ppl_vae.core.program import Density
from ppl_vae.core.validation import check_int
from ppl_vae.likelihoods import distributions as densities
from ppl_vae.likelihoods.base import (
    Likelihood,
    Mask,
    Means,
    Outputs,
    RowTensor,
    Support,
    row_density,
)
from ppl_vae.likelihoods.gaussian import Gaussian, OptimalGaussian

BINARY = Support(
    constraints.boolean,
    "{0, 1}",
    "a Bernoulli has no density there. For grey values use ContinuousBernoulli() or "
    "Gaussian('shared'), binarize: (x > t).float(), or, for a bound on a cross-entropy "
    "rather than a density, Bernoulli(soft_targets=True)",
)
UNIT_INTERVAL = Support(
    constraints.unit_interval,
    "[0, 1]",
    "rescale it (bytes: x / 255), or use Gaussian('shared')",
)
COUNTS = Support(
    constraints.nonnegative_integer,
    "the counts 0, 1, 2, ...",
    "use Gaussian('shared') for other numbers, or pass the original counts",
)


class _IndependentEntries(Likelihood):
    """Abstract: entries of x are independent given z, each with its own outputs."""

    def density(
        self, outputs: Outputs, x: RowTensor | None, mask: Mask | None, observe: bool
    ) -> Density:
        """Independent entries; x is not used."""
        return row_density(self.entry_density(outputs), mask)

    @abstractmethod
    def entry_density(self, outputs: Outputs) -> Density:
        """The density of the entries, batch shape (..., D)."""


class Bernoulli(_IndependentEntries):
    """x | z ~ Bernoulli(logits = G(z)), for binary x.

    Args:
        soft_targets: also accept grey values x in [0, 1]. What is reported as log p(x | z) is
            then a negative cross-entropy, E_{b ~ x} log p(b | z), which is no density of x (it
            does not integrate to one), and log p(x) a bound on one. The notes of results say so.
    """

    bounded = True

    @configurable
    def __init__(self, soft_targets: bool = False) -> None:
        super().__init__()
        self.soft_targets = soft_targets
        self.support = UNIT_INTERVAL if soft_targets else BINARY

    def entry_density(self, outputs: Outputs) -> Density:
        """Bernoulli with these logits."""
        bernoulli = densities.SoftTargetBernoulli if self.soft_targets else dist.Bernoulli
        return bernoulli(logits=outputs)

    def initial_outputs(self, means: Means, half_weight: Means) -> Float[Tensor, " O"]:
        """Logits of the means."""
        return torch.logit(_clamp_inside(means, half_weight))

    def notes(self) -> list[str]:
        """A note on soft targets: values are then not log densities."""
        if not self.soft_targets:
            return []
        return [
            "Bernoulli(soft_targets=True): log p is a bound on a negative cross-entropy, not "
            "a log density of grey x; do not compare it with densities"
        ]


class ContinuousBernoulli(_IndependentEntries):
    """p(x | z) = l exp(l x) / (exp(l) - 1), l = G(z): a density of grey values x in [0, 1].

    References:
        Loaiza-Ganem, Cunningham: The continuous Bernoulli: fixing a pervasive error in
        variational autoencoders (2019).
    """

    support = UNIT_INTERVAL
    bounded = True

    def entry_density(self, outputs: Outputs) -> Density:
        """Continuous Bernoulli with these logits."""
        return densities.LogitContinuousBernoulli(outputs)

    def initial_outputs(self, means: Means, half_weight: Means) -> Float[Tensor, " O"]:
        """Logits at which the means are these."""
        return densities.continuous_bernoulli_logit(_clamp_inside(means, half_weight))


class Categorical(_IndependentEntries):
    """x | z ~ Categorical(logits = G(z)), for x with values 0..C-1.

    Mean and variance treat x as a number; for nominal categories, use the ``probs`` of
    ``vae.decode(z).base_dist``, or draws.

    Args:
        num_categories: C, the number of outputs for each dimension of x.
    """

    @configurable
    def __init__(self, num_categories: int) -> None:
        super().__init__()
        self.outputs_per_dim = check_int("num_categories", num_categories, 2)
        last = self.outputs_per_dim - 1
        self.support = Support(
            constraints.integer_interval(0, last),
            f"the categories 0, 1, ..., {last}",
            "use Categorical with more categories, Poisson() for unbounded counts, or "
            "Gaussian('shared') for other numbers",
        )

    def entry_density(self, outputs: Outputs) -> Density:
        """Categorical with these logits, C for each dimension."""
        return densities.OrdinalCategorical(
            logits=outputs.unflatten(-1, (-1, self.outputs_per_dim))
        )

    def features(self, x: RowTensor) -> Float[Tensor, "N E"]:
        """One-hot encoding of each entry, C features."""
        categories = torch.arange(self.outputs_per_dim, device=x.device)
        return (x[..., None] == categories).to(x).flatten(1)

    def initial_outputs(self, means: Means, half_weight: Means) -> Float[Tensor, " O"]:
        """Log probabilities of the categories of each column."""
        return torch.maximum(means, half_weight).log()


class Poisson(_IndependentEntries):
    """x | z ~ Poisson(exp G(z)), for counts; encoders are given log(1 + x) by default."""

    support = COUNTS
    counts = True

    def entry_density(self, outputs: Outputs) -> Density:
        """Poisson with these log-rates."""
        return densities.LogRatePoisson(outputs)

    def initial_outputs(self, means: Means, half_weight: Means) -> Float[Tensor, " O"]:
        """Logarithms of the means."""
        return torch.maximum(means, half_weight).log()


class Multinomial(Likelihood):
    """x | z, n ~ Multinomial(n, softmax G(z)) for rows of counts, each given its total n.

    log p is that of the row given its total, including the coefficient n! / prod x_d!. Draws have
    the totals of x, if x is given (``model(x, observe=False)``, ``reconstruct``).

    Args:
        total_count: n of draws without x (``sample``, ``decode``).
    """

    support = COUNTS
    counts = True
    supports_mask = False

    @configurable
    def __init__(self, total_count: int | None = None) -> None:
        super().__init__()
        self.total_count = None if total_count is None else check_int("total_count", total_count)

    def density(
        self, outputs: Outputs, x: RowTensor | None, mask: Mask | None, observe: bool
    ) -> Density:
        """Rows of counts with these logits and the totals of x.

        Raises:
            ValueError: if x has missing values.
        """
        if mask is not None:
            _check_complete(mask)
        if x is not None:
            return densities.ConditionalMultinomial(outputs, x.sum(-1))
        total = self.total_count
        return densities.ConditionalMultinomial(
            outputs, None if total is None else outputs.new_tensor(total)
        )

    def check(self, x: RowTensor, mask: Mask | None = None) -> None:
        """Check that all entries are counts and none is missing.

        Raises:
            ValueError: if not.
        """
        if mask is not None:
            _check_complete(mask)
        super().check(x, mask)

    def initial_outputs(self, means: Means, half_weight: Means) -> Float[Tensor, " O"]:
        """Logarithms of the columns' shares of all counts."""
        return (
            torch.maximum(means, half_weight) / means.sum().clamp(min=2 * half_weight[0])
        ).log()


def _check_complete(mask: Tensor) -> None:
    if num_missing := int((~mask).sum()):
        raise ValueError(
            f"x has {num_missing} missing entries, but a Multinomial scores complete rows given "
            "their totals; drop those rows, or use Poisson(), whose entries are independent"
        )


def _clamp_inside(means: Tensor, half_weight: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(means, half_weight), 1 - half_weight)


LIKELIHOODS: dict[str, type[Likelihood]] = {
    likelihood.__name__: likelihood
    for likelihood in (
        Gaussian,
        OptimalGaussian,
        Bernoulli,
        ContinuousBernoulli,
        Categorical,
        Poisson,
        Multinomial,
    )
}
"""The likelihoods by name, for saving and loading."""
