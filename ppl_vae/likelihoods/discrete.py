"""Decoders as densities: p(x | z) from a decoder's outputs, constants always kept.

:class:`~ppl_vae.likelihoods.base.Likelihood` is their contract, and
:class:`~ppl_vae.likelihoods.gaussian.Gaussian` stands in a room of its own.
"""

from abc import abstractmethod

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.config import configurable
from ppl_vae.core.program import Density
from ppl_vae.core.validation import check_int
from ppl_vae.likelihoods import distributions as densities
from ppl_vae.likelihoods.base import (
    Likelihood,
    Mask,
    Outputs,
    Rows,
    by_cell,
    refuse_outside,
)
from ppl_vae.likelihoods.gaussian import Gaussian

COUNTS = "the counts 0, 1, 2, ..."


class _CellByCell(Likelihood):
    """Abstract: cells that are independent given z, each with the outputs of its own."""

    def forward(
        self,
        outputs: Outputs,
        x: Rows | None = None,
        mask: Mask | None = None,
        *,
        observe: bool = True,
    ) -> Density:
        """Independent cells; what x is makes no difference."""
        return by_cell(self.cells(outputs), mask)

    @abstractmethod
    def cells(self, outputs: Outputs) -> Density:
        """Batch shape (..., D)."""


class Bernoulli(_CellByCell):
    """x | z ~ Bernoulli(logits = G(z)), for binary x.

    Args:
        soft_targets: take grey x in [0, 1] too. What is then called log p(x | z) is minus a
            cross-entropy, E_{b ~ x} log p(b | z): no density of x (it does not integrate to one),
            and what is called log p(x) is minus a bound on one. Every result says so in its notes.
    """

    bounded = True

    @configurable
    def __init__(self, soft_targets: bool = False) -> None:
        super().__init__()
        self.soft_targets = soft_targets

    def cells(self, outputs: Outputs) -> Density:
        """Bernoulli with these logits."""
        kind = densities.RelaxedBernoulli if self.soft_targets else dist.Bernoulli
        return kind(logits=outputs)

    def check(self, x: Rows, mask: Mask | None = None) -> None:
        """Check that observed entries are 0 or 1; with soft targets, between them.

        Raises:
            ValueError: if some are not: over grey values it is no density.
        """
        if self.soft_targets:
            _check_unit_interval(x, mask)
            return
        advice = (
            "a Bernoulli is no density there. For grey values use ContinuousBernoulli() or "
            "Gaussian('shared'), binarize: (x > t).float(), or, for a bound on a cross-entropy "
            "that is no density, Bernoulli(soft_targets=True)"
        )
        refuse_outside(x, (x == 0) | (x == 1), mask, "{0, 1}", advice)

    def outputs_at(
        self, means: Float[Tensor, " D"], half: Float[Tensor, " D"]
    ) -> Float[Tensor, " D"]:
        """Logits of the columns' means."""
        return torch.logit(_inner(means, half))

    def notes(self) -> list[str]:
        """With soft targets, what the numbers are not."""
        if not self.soft_targets:
            return []
        return [
            "Bernoulli(soft_targets=True): what is called log p is minus a bound on a "
            "cross-entropy, not a log density of grey x; do not compare it with densities"
        ]


class ContinuousBernoulli(_CellByCell):
    """p(x | z) = l exp(l x) / (exp(l) - 1), l = G(z): a density of grey x in [0, 1].

    References:
        Loaiza-Ganem, Cunningham: The continuous Bernoulli: fixing a pervasive error in
        variational autoencoders (2019).
    """

    bounded = True

    def cells(self, outputs: Outputs) -> Density:
        """Continuous Bernoulli with these logits."""
        return densities.ContinuousBernoulli(outputs)

    def check(self, x: Rows, mask: Mask | None = None) -> None:
        """Check that observed entries lie in [0, 1].

        Raises:
            ValueError: if some do not.
        """
        _check_unit_interval(x, mask)

    def outputs_at(
        self, means: Float[Tensor, " D"], half: Float[Tensor, " D"]
    ) -> Float[Tensor, " D"]:
        """Logits at which the means are those of the columns."""
        return densities.continuous_bernoulli_logit(_inner(means, half))


class Categorical(_CellByCell):
    """x | z ~ Categorical(logits = G(z)), for x of the whole numbers 0..C-1.

    Mean and variance are of x as a number; where the numbers are mere names, look at the
    ``probs`` of ``vae.decode(z).base_dist``, or at draws.

    Args:
        num_categories: C, which is the number of outputs for each dimension of x.
    """

    @configurable
    def __init__(self, num_categories: int) -> None:
        super().__init__()
        self.outputs_per_dim = check_int("num_categories", num_categories, 2)

    def cells(self, outputs: Outputs) -> Density:
        """Categorical with these logits, C for each dimension."""
        return densities.OrdinalCategorical(
            logits=outputs.unflatten(-1, (-1, self.outputs_per_dim))
        )

    def check(self, x: Rows, mask: Mask | None = None) -> None:
        """Check that observed entries are whole numbers below C.

        Raises:
            ValueError: if some are not.
        """
        inside = (x >= 0) & (x < self.outputs_per_dim) & (x == x.floor())
        advice = (
            "use Categorical with more categories, Poisson() for counts without a limit, or "
            "Gaussian('shared') for other numbers"
        )
        refuse_outside(
            x, inside, mask, f"the categories 0, 1, ..., {self.outputs_per_dim - 1}", advice
        )

    def features(self, x: Rows) -> Float[Tensor, "N E"]:
        """For each entry C numbers, of which that of its category is one and the others zero."""
        numbers = torch.arange(self.outputs_per_dim, device=x.device)
        return (x[..., None] == numbers).to(x).flatten(1)

    def outputs_at(
        self, means: Float[Tensor, " E"], half: Float[Tensor, " E"]
    ) -> Float[Tensor, " E"]:
        """Logarithms of the categories' shares in each column."""
        return torch.maximum(means, half).log()


class Poisson(_CellByCell):
    """x | z ~ Poisson(exp G(z)), for counts; encoders made for it are given log(1 + x)."""

    counts = True

    def cells(self, outputs: Outputs) -> Density:
        """Poisson with these log-rates."""
        return densities.Poisson(outputs)

    def check(self, x: Rows, mask: Mask | None = None) -> None:
        """Check that observed entries are counts.

        Raises:
            ValueError: if some are not.
        """
        _check_counts(x, mask)

    def outputs_at(
        self, means: Float[Tensor, " D"], half: Float[Tensor, " D"]
    ) -> Float[Tensor, " D"]:
        """Logarithms of the columns' means."""
        return torch.maximum(means, half).log()


class Multinomial(Likelihood):
    """x | z, n ~ Multinomial(n, softmax G(z)) for rows of counts, each given its own total n.

    log p is of the whole row given its total, the coefficient n! / prod x_d! included. Draws take
    their totals from x where there is one (``model(x, observe=False)``, ``reconstruct``).

    Args:
        total_count: n of rows that are drawn where there is no x (``sample``, ``decode``).
    """

    counts = True
    partial = False

    @configurable
    def __init__(self, total_count: int | None = None) -> None:
        super().__init__()
        self.total_count = None if total_count is None else check_int("total_count", total_count)

    def forward(
        self,
        outputs: Outputs,
        x: Rows | None = None,
        mask: Mask | None = None,
        *,
        observe: bool = True,
    ) -> Density:
        """Rows of counts with these logits, and with x's totals.

        Raises:
            ValueError: if x has missing values.
        """
        if mask is not None:
            _refuse_holes(mask)
        if x is not None:
            return densities.ConditionalMultinomial(outputs, x.sum(-1))
        total = self.total_count
        return densities.ConditionalMultinomial(
            outputs, None if total is None else outputs.new_tensor(total)
        )

    def check(self, x: Rows, mask: Mask | None = None) -> None:
        """Check that all entries are counts, and all are there.

        Raises:
            ValueError: if some are not.
        """
        if mask is not None:
            _refuse_holes(mask)
        _check_counts(x, mask)

    def outputs_at(
        self, means: Float[Tensor, " D"], half: Float[Tensor, " D"]
    ) -> Float[Tensor, " D"]:
        """Logarithms of the columns' shares in all counts."""
        return (torch.maximum(means, half) / means.sum().clamp(min=2 * half[0])).log()


def _check_unit_interval(x: Tensor, mask: Tensor | None) -> None:
    advice = "rescale it (bytes: x / 255), or use Gaussian('shared')"
    refuse_outside(x, (x >= 0) & (x <= 1), mask, "[0, 1]", advice)


def _check_counts(x: Tensor, mask: Tensor | None) -> None:
    advice = "use Gaussian('shared') for other numbers, or give the counts as they were counted"
    refuse_outside(x, (x >= 0) & (x == x.floor()), mask, COUNTS, advice)


def _refuse_holes(mask: Tensor) -> None:
    if holes := int((~mask).sum()):
        raise ValueError(
            f"x has {holes} missing entries, and a Multinomial scores whole rows given their "
            "totals, which such rows have not; drop those rows, or use Poisson(), whose cells are "
            "independent"
        )


def _inner(means: Tensor, half: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(means, half), 1 - half)


_ALL = (Gaussian, Bernoulli, ContinuousBernoulli, Categorical, Poisson, Multinomial)
LIKELIHOODS: dict[str, type[Likelihood]] = {kind.__name__: kind for kind in _ALL}
