"""Latent spaces of different dimensions compared: log p, and the dimensions that are active."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import Result
from ppl_vae.core.text import counted
from ppl_vae.core.text_table import render
from ppl_vae.core.validation import ArrayLike, as_matrix
from ppl_vae.evaluation.latent_space.collapse_statistics import ACTIVE_VARIANCE
from ppl_vae.evaluation.marginal_likelihood.compare import FEW_RELIABLE
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.evaluation.prediction.predictive import encode


@dataclass(frozen=True)
class LatentSpace(Result):
    """The latent space of one pair on the data.

    Attributes:
        name: the name of the pair.
        leading: the two latent dimensions with the largest ``mean_variances``, counted from 0.
        codes: the means of q in these two, (N, 2).
        mean_variances: the variance of each dimension's posterior mean over the data, (K,).
        estimate: the estimated log-likelihood of the data.
    """

    name: str
    leading: tuple[int, ...]
    codes: Float[Tensor, "N 2"]
    mean_variances: Float[Tensor, " K"]
    estimate: LogLikelihood

    @property
    def latent_dim(self) -> int:
        """The number of latent dimensions, K."""
        return len(self.mean_variances)

    @property
    def active(self) -> Bool[Tensor, " K"]:
        """Which dimensions have a variance of the posterior mean above 0.01 (active units)."""
        return self.mean_variances > ACTIVE_VARIANCE

    @property
    def log_p(self) -> str:
        """The mean of log p as text, with ``≥`` where it is only a lower bound."""
        bound = "≥" if self.estimate.share_reliable < FEW_RELIABLE else ""
        share = math.floor(100 * self.estimate.share_reliable)
        value = f"{bound}{self.estimate.mean:.2f} ± {self.estimate.mean_error:.2f}"
        return f"{value} ({share} % reliable)"


@dataclass(frozen=True, repr=False)
class LatentSpaces(Result):
    """Latent spaces of the same data.

    Attributes:
        spaces: one per pair, in the order given.
        labels: the class of each datum, or None.
    """

    spaces: tuple[LatentSpace, ...]
    labels: tuple[Any, ...] | None

    def __repr__(self) -> str:
        rows = [
            (
                space.name,
                f"log p {space.log_p}",
                f"{int(space.active.sum())} of {counted(space.latent_dim, 'dimension')} active",
            )
            for space in self.spaces
        ]
        head = "log p of the same data in nats per datum, ± one standard error"
        return "\n".join([head, render(rows)])


def latent_spaces(
    pairs: Mapping[str, tuple[ProgramLike, ProgramLike]],
    x: ArrayLike,
    *,
    labels: Iterable[Any] | None = None,
    num_samples: int = 500,
    refine: int = 100,
    seed: int | None = None,
) -> LatentSpaces:
    """Compare fitted pairs with latent spaces of different dimensions on the same data.

    Args:
        pairs: model and guide by name, each under the contract, with at least two latent
            dimensions (all sites together).
        x: data, (N, D), preferably held out.
        labels: the class of each datum, for plots.
        num_samples, refine, seed: arguments of :func:`ppl_vae.log_likelihood`.

    Raises:
        ValueError: if there are no pairs, if the number of labels differs from that of data, or if
            a pair has one latent dimension.
        NotImplementedError: if the distribution of a guide's site has no mean in closed form.
    """
    if not pairs:
        raise ValueError("give at least one pair")
    if labels is not None:
        labels = tuple(v.item() if isinstance(v, np.generic) else v for v in labels)
    spaces = []
    for name, (model, guide) in pairs.items():
        codes = as_matrix(encode(model, guide, x), name="codes").double().cpu()
        if labels is not None and len(labels) != len(codes):
            raise ValueError(f"labels has {len(labels)} entries for {len(codes)} rows of data")
        _check_width(name, codes)
        estimate = log_likelihood(model, guide, x, num_samples, refine=refine, seed=seed)
        spaces.append(_latent_space(name, codes, estimate))
    return LatentSpaces(tuple(spaces), labels)


def _check_width(name: str, codes: Float[Tensor, "N K"]) -> None:
    if codes.shape[1] < 2:
        raise ValueError(f"{name} has one latent dimension; two are needed to plot codes")


def _latent_space(name: str, codes: Float[Tensor, "N K"], estimate: LogLikelihood) -> LatentSpace:
    variances = codes.var(0, correction=0)
    first, second = sorted(variances.argsort(descending=True, stable=True)[:2].tolist())
    return LatentSpace(name, (first, second), codes[:, [first, second]], variances, estimate)
