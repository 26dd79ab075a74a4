"""Pairs with latent spaces of different sizes side by side: log p, and the dimensions they use."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import Result
from ppl_vae.core.text_table import render
from ppl_vae.core.validation import ArrayLike
from ppl_vae.evaluation.latent_space.collapse_result import ACTIVE
from ppl_vae.evaluation.marginal_likelihood.compare import FEW_RELIABLE
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.evaluation.prediction.predictive import encode


@dataclass(frozen=True)
class LatentSpace(Result):
    """What a pair makes of data.

    Attributes:
        name: of the pair.
        shown: the two latent dimensions that are used most, counted from 0.
        codes: the means of q in these two, (N, 2).
        mean_variances: the variance of each dimension's mean over the data, (K,).
        estimate: of log p of the data.
    """

    name: str
    shown: tuple[int, ...]
    codes: Float[Tensor, "N 2"]
    mean_variances: Float[Tensor, " K"]
    estimate: LogLikelihood

    @property
    def latent_dim(self) -> int:
        """K."""
        return len(self.mean_variances)

    @property
    def active(self) -> Bool[Tensor, " K"]:
        """Which dimensions' means vary by more than 0.01 over the data."""
        return self.mean_variances > ACTIVE

    @property
    def log_p(self) -> str:
        """log p in words: ``≥`` where it is no more than a lower bound."""
        bound = "≥" if self.estimate.share_reliable < FEW_RELIABLE else ""
        share = math.floor(100 * self.estimate.share_reliable)
        value = f"{bound}{self.estimate.mean:.2f} ± {self.estimate.mean_error:.2f}"
        return f"{value} nats per datum ({share} % reliable)"


@dataclass(frozen=True, repr=False)
class LatentSpaces(Result):
    """Latent spaces of the same data.

    Attributes:
        spaces: in the order given.
        labels: a class for each datum, or None.
    """

    spaces: tuple[LatentSpace, ...]
    labels: tuple[Any, ...] | None

    def __repr__(self) -> str:
        rows = [
            (
                space.name,
                f"log p {space.log_p}",
                f"{int(space.active.sum())} of {space.latent_dim} dimensions active",
            )
            for space in self.spaces
        ]
        return render(rows)


def latent_spaces(
    pairs: Mapping[str, tuple[ProgramLike, ProgramLike]],
    x: ArrayLike,
    *,
    labels: Iterable[Any] | None = None,
    num_samples: int = 500,
    refine: int = 100,
    seed: int | None = None,
) -> LatentSpaces:
    """Look at fitted pairs with latent spaces of different sizes on the same data.

    Args:
        pairs: model and guide by name, each under the contract, with at least two latent
            dimensions (all sites together).
        x: data, (N, D), best held out.
        labels: a class for each datum, for pictures.
        num_samples, refine, seed: as :func:`ppl_vae.log_likelihood` takes them.

    Raises:
        ValueError: if there are no pairs, not as many labels as data, or a pair has one latent
            dimension.
        NotImplementedError: if the distribution of a guide's site has no mean in closed form.
    """
    if not pairs:
        raise ValueError("give at least one pair")
    if labels is not None:
        labels = tuple(v.item() if isinstance(v, np.generic) else v for v in labels)
        if len(labels) != len(x):
            raise ValueError(f"labels has {len(labels)} entries for {len(x)} rows of data")
    how = {"num_samples": num_samples, "refine": refine, "seed": seed}
    spaces = tuple(_look(name, *pair, x, how) for name, pair in pairs.items())
    return LatentSpaces(spaces, labels)


def _look(
    name: str, model: ProgramLike, guide: ProgramLike, x: ArrayLike, how: dict[str, Any]
) -> LatentSpace:
    codes = encode(model, guide, x).double().cpu()
    if codes.shape[1] < 2:
        raise ValueError(f"{name} has one latent dimension; there is no plane of it to be seen")
    variances = codes.var(0, correction=0)
    first, second = sorted(variances.argsort(descending=True, stable=True)[:2].tolist())
    shown = codes[:, [first, second]]
    estimate = log_likelihood(model, guide, x, **how)
    return LatentSpace(name, (first, second), shown, variances, estimate)
