"""Whether Markov chains have converged: R-hat and effective sample sizes, by ArviZ."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.core.text_table import render

if TYPE_CHECKING:
    import pandas

MAX_R_HAT = 1.01
MIN_ESS = 400.0
MAX_ELEMENTS = 500
"""The largest number of elements of one quantity that are examined by default."""
SYMMETRIC = ("covariance", "subspace")
"""Quantities that are symmetric matrices, of which the lower triangle is examined."""


@dataclass(frozen=True, repr=False)
class Diagnostics(Result):
    """The worst R-hat and effective sample sizes among the elements of several quantities.

    Attributes:
        quantities: their names.
        elements: the number of elements examined, (Q,).
        available: the number of elements that each quantity has, (Q,).
        r_hat: the largest rank-normalised split R-hat, (Q,); NaN for a single chain.
        ess_bulk: the smallest effective sample size of the bulk, (Q,).
        ess_tail: the smallest effective sample size of the 5 and 95 % quantiles, (Q,).
        worst: the element with the largest R-hat, of each quantity.

    References:
        Vehtari, Gelman, Simpson, Carpenter, Buerkner: Rank-normalization, folding, and
        localization: an improved R-hat (2021).
    """

    quantities: tuple[str, ...]
    elements: Tensor
    available: Tensor
    r_hat: Tensor
    ess_bulk: Tensor
    ess_tail: Tensor
    worst: tuple[str, ...]

    def to_frame(self) -> "pandas.DataFrame":
        """The table, one row per quantity."""
        return super().to_frame().assign(worst=self.worst).set_axis(list(self.quantities))

    def __repr__(self) -> str:
        cells = [
            [
                name,
                f"{examined}" if examined == available else f"{examined} of {available}",
                f"{r_hat:.4f}",
                f"{bulk:.0f}",
                f"{tail:.0f}",
                worst,
            ]
            for name, examined, available, r_hat, bulk, tail, worst in zip(
                self.quantities,
                self.elements.tolist(),
                self.available.tolist(),
                self.r_hat.tolist(),
                self.ess_bulk.tolist(),
                self.ess_tail.tolist(),
                self.worst,
                strict=True,
            )
        ]
        header = ("quantity", "elements", "R-hat", "ESS bulk", "ESS tail", "largest R-hat at")
        return render(cells, header)

    def verdict(self, divergences: int = 0) -> str:
        """One sentence: whether to trust the draws, and if not, why and what to do.

        Trusted are draws with an R-hat below 1.01 and effective sample sizes above 400 for every
        element examined, and without divergent transitions.
        """
        r_hat, which = (
            float(self.r_hat.nan_to_num(-1).max()),
            int(self.r_hat.nan_to_num(-1).argmax()),
        )
        ess = torch.minimum(self.ess_bulk, self.ess_tail)
        least, fewest = float(ess.min()), self.quantities[int(ess.argmin())]
        if bool(self.r_hat.isnan().any()):
            return (
                "NOT assessed: R-hat compares chains, and is not defined for a single one or for "
                "fewer than four draws; run chains=4"
            )
        if r_hat >= MAX_R_HAT:
            return (
                f"NOT reliable: R-hat of {self.worst[which]} is {r_hat:.3f}, where {MAX_R_HAT} is "
                "the limit: the chains have not mixed; increase warmup and num_samples, or use "
                "another sampler"
            )
        if divergences:
            return (
                f"NOT reliable: {divergences} transitions diverged, so that regions of high "
                "curvature were not explored; sample with a smaller step size (target_accept), or "
                "with sampler='gibbs' if the priors are conjugate"
            )
        if least <= MIN_ESS:
            return (
                f"NOT reliable: the smallest effective sample size is {least:.0f}, of {fewest}, "
                f"where {MIN_ESS:.0f} are needed; increase num_samples"
            )
        return (
            f"reliable: R-hat is at most {r_hat:.4f}, the effective sample size at least "
            f"{least:.0f}, and no transition diverged"
        )


def diagnose(
    quantities: Mapping[str, Tensor], max_elements: int | None = MAX_ELEMENTS
) -> Diagnostics:
    """R-hat and effective sample sizes of quantities with leading dimensions (chains, draws).

    Args:
        quantities: draws by name, (chains, S, ...).
        max_elements: this number of elements of a quantity that has more, chosen at random but
            always the same, are examined; None for all.
    """
    found = [_worst(name, draws, max_elements) for name, draws in quantities.items()]
    elements, available, r_hat, bulk, tail, worst = zip(*found, strict=True)
    return Diagnostics(
        quantities=tuple(quantities),
        elements=torch.tensor(elements),
        available=torch.tensor(available),
        r_hat=torch.tensor(r_hat).double(),
        ess_bulk=torch.tensor(bulk).double(),
        ess_tail=torch.tensor(tail).double(),
        worst=worst,
    )


def _worst(
    name: str, draws: Float[Tensor, "C S ..."], max_elements: int | None
) -> tuple[int, int, float, float, float, str]:
    from arviz_stats.base.array import array_stats

    flat, labels = _elements(name, draws)
    available = len(labels)
    if max_elements is not None and available > max_elements:
        chosen = np.sort(np.random.default_rng(0).permutation(available)[:max_elements])
        flat, labels = flat[chosen], [labels[i] for i in chosen]
    r_hat = np.asarray(array_stats.rhat(flat, chain_axis=-2, draw_axis=-1))
    bulk, tail = (
        np.asarray(array_stats.ess(flat, chain_axis=-2, draw_axis=-1, method=method, prob=prob))
        for method, prob in (("bulk", None), ("tail", (0.05, 0.95)))
    )
    if not len(labels) or np.isnan(r_hat).all():
        return len(labels), available, math.nan, math.nan, math.nan, ""
    worst = int(np.nanargmax(r_hat))
    return len(labels), available, r_hat[worst], bulk.min(), tail.min(), labels[worst]


def _elements(name: str, draws: Tensor) -> tuple[np.ndarray, list[str]]:
    # The elements that vary, (elements, chains, S), and their names.
    shape = draws.shape[2:]
    places = list(np.ndindex(*shape))
    if name in SYMMETRIC:
        places = [(i, j) for i, j in places if i >= j]
    values = draws.detach().cpu().numpy()
    flat = np.stack([values[(slice(None), slice(None), *place)] for place in places])
    varying = np.ptp(flat, axis=(1, 2)) > 0
    labels = [name + (str(list(place)) if place else "") for place in places]
    return flat[varying], [label for label, varies in zip(labels, varying, strict=True) if varies]
