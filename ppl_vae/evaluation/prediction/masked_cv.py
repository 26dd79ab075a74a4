"""Selection of the noise model and of K by the likelihood of masked observed values."""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Normal

from ppl_vae.core.imputed import CONDITIONAL
from ppl_vae.core.results import Result
from ppl_vae.core.text import counted, short_number
from ppl_vae.core.text_table import render
from ppl_vae.core.validation import (
    ArrayLike,
    as_matrix,
    check_int,
    observed_mask,
    without_empty_rows,
)
from ppl_vae.data.sources.row_blocks import RowBlocks
from ppl_vae.inference.em.fit import fit_em
from ppl_vae.models.linear.identifiability import undetermined_entries, undetermined_pairs
from ppl_vae.models.ppca import NOISES, PPCA

MASKED_FRACTION = 0.1
MAX_SELECTION_ROWS = 1000
"""The largest number of rows on which the commands select models."""
PATIENCE = 2
"""A search ends after this many values of K in a row without an improvement."""
STREAM = 20_251
TOLERANCE, MAX_ITERATIONS = 1e-5, 200
"""Limits of each fit; the tolerance, in nats per datum, is far below typical differences of
scores."""


@dataclass(frozen=True, repr=False)
class MaskedCV(Result):
    """PPCA (``"isotropic"``) and factor analysis (``"diagonal"``) scored on masked values.

    Attributes:
        noise: the noise of each model.
        latent_dim: K of each model.
        log_density: the mean over masked values of log p(x_nd | unmasked values of row n), (M,),
            in nats per value.
        rmse: the root mean square of x_nd - E x_nd in standard deviations of the column, (M,);
            the mean of the column as prediction gives about 1.
        coverage: the share of masked values within 1.96 standard deviations of the prediction,
            (M,). The standard deviations take the fitted parameters as known, so that coverage
            falls below 95 % for few rows (see :class:`~ppl_vae.core.imputed.Imputation`). It
            refers to values that were observed, not to missing values whose prediction depends on
            an undetermined covariance; ``notes`` give the number of these.
        num_masked: the number of masked values.
        notes: models that could not be fitted, with the reason; missing values to which the scores
            do not apply.
    """

    noise: tuple[str, ...]
    latent_dim: tuple[int, ...]
    log_density: Float[Tensor, " M"]
    rmse: Float[Tensor, " M"]
    coverage: Float[Tensor, " M"]
    num_masked: int
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> int:
        """The index of the model under which masked values are most probable."""
        return int(self.log_density.argmax())

    def __repr__(self) -> str:
        titles = ("noise", "K", "nats per value", "RMSE", "within 1.96 sd", "")
        lines = [
            f"{counted(self.num_masked, 'observed value')}, masked and predicted from the rest of "
            "their rows:",
            render([*map(self._cells, range(len(self.noise)))], titles, indent="  "),
            f"  ({CONDITIONAL})",
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _cells(self, index: int) -> tuple[str, ...]:
        return (
            self.noise[index],
            str(self.latent_dim[index]),
            short_number(float(self.log_density[index])),
            short_number(float(self.rmse[index])),
            f"{self.coverage[index]:.1%}",
            "<- best" if index == self.best else "",
        )


def select_by_masked_cv(
    x: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    noises: Iterable[str] = NOISES,
    latent_dims: Iterable[int] | None = None,
    fraction: float = MASKED_FRACTION,
    max_rows: int | None = None,
    seed: int = 0,
) -> MaskedCV:
    """Mask some observed values, fit PPCA and factor analysis to the rest, and score them.

    The masked values are drawn at random, the same for every model; no row and no column loses all
    its observed values.

    Args:
        x: (N, D); NaN marks a missing value.
        mask: True where x is observed.
        noises: the noise models to compare.
        latent_dims: the values of K to try with each; by default 1, 2, 3, 4, 6, 8, 12, 16, 24, ...
            until two in a row bring no improvement; for factor analysis up to
            D + 1/2 - sqrt(2 D + 1/4), above which it has more parameters than a covariance matrix.
        fraction: the fraction of observed values to mask.
        max_rows: the largest number of rows to use, evenly spaced; None uses all, and so does a
            number of rows in which a column does not vary that varies in all of them.
        seed: seed of the masked values and of the initial parameters.

    Raises:
        ValueError: if fraction is not within (0, 1), if no value can be masked, or if no model can
            be fitted; as :func:`~ppl_vae.inference.em.fit.fit_em`.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1; got {fraction}")
    x = _evenly_spaced(without_empty_rows(as_matrix(x, mask=mask).double()), max_rows)
    observed = observed_mask(x)
    observed = torch.ones_like(x, dtype=torch.bool) if observed is None else observed
    data = _MaskedData.of(x, observed, fraction, seed)
    notes: list[str] = []
    scores: list[_Score] = []
    for noise in noises:
        scores.extend(_search(data, noise, latent_dims, notes))
    if not scores:
        raise ValueError("; ".join(notes))
    names, sizes, *columns = zip(*scores, strict=True)
    log_density, rmse, coverage = torch.tensor(columns, dtype=torch.float64)
    notes.extend(_not_validated(x, observed, sizes[int(log_density.argmax())]))
    number = int(data.masked.sum())
    return MaskedCV(names, sizes, log_density, rmse, coverage, number, tuple(notes))


def _evenly_spaced(x: Float[Tensor, "N D"], max_rows: int | None) -> Float[Tensor, "M D"]:
    if max_rows is None or len(x) <= check_int("max_rows", max_rows, 2):
        return x
    rows = np.linspace(0, len(x) - 1, max_rows).round().astype(int)
    return x if bool((_constant(x[rows]) & ~_constant(x)).any()) else x[rows]


def _constant(x: Float[Tensor, "N D"]) -> Bool[Tensor, " D"]:
    # Columns with at most one value among their observed entries.
    return x.nan_to_num(nan=-math.inf).amax(0) <= x.nan_to_num(nan=math.inf).amin(0)


class _Score(NamedTuple):
    noise: str
    latent_dim: int
    log_density: float
    rmse: float
    coverage: float


@dataclass(frozen=True)
class _MaskedData:
    """Data of which some observed values are masked.

    Attributes:
        x: all values.
        masked: True where a value is observed and masked.
        kept: x with NaN where values are missing or masked.
        seed: seed of the initial parameters of each fit.
    """

    x: Float[Tensor, "N D"]
    masked: Bool[Tensor, "N D"]
    kept: Float[Tensor, "N D"]
    seed: int

    @classmethod
    def of(
        cls, x: Float[Tensor, "N D"], observed: Bool[Tensor, "N D"], fraction: float, seed: int
    ) -> "_MaskedData":
        """Mask a fraction of the observed values.

        Raises:
            ValueError: if no value can be masked.
        """
        masked = _draw_masked(observed, fraction, seed)
        if not masked.any():
            raise ValueError(
                f"no value of x, of shape {tuple(x.shape)} with {int(observed.sum())} observed, "
                "can be masked without a row or column losing all its observed values; choose "
                "latent_dim and noise yourself"
            )
        return cls(x, masked, x.where(observed & ~masked, torch.nan), seed)


def _search(
    data: _MaskedData, noise: str, latent_dims: Iterable[int] | None, notes: list[str]
) -> list[_Score]:
    """Scores for increasing K, up to the first that cannot be fitted, which ``notes`` report."""
    patience: float = math.inf
    if latent_dims is None:
        latent_dims = _latent_dims(_max_latent_dim(noise, *data.x.shape))
        patience = PATIENCE
    scores: list[_Score] = []
    for k in latent_dims:
        try:
            scores.append(_score(data, noise, check_int("latent_dim", k)))
        except ValueError as error:
            notes.append(f"noise={noise!r}, K = {k}: {error}")
            break
        best = int(np.argmax([score.log_density for score in scores]))
        if len(scores) - best > patience:
            break
    return scores


def _not_validated(x: Tensor, observed: Bool[Tensor, "N D"], latent_dim: int) -> Iterator[str]:
    # Masked values are of columns that are observed together, unlike some missing values.
    pairs = undetermined_pairs(RowBlocks(x.where(observed, torch.nan)), latent_dim)
    entries = undetermined_entries(observed, pairs)
    if number := int(entries.sum()):
        columns = entries.any(0).nonzero().flatten().tolist()
        yield (
            f"the observed values do not determine the covariances that {number} of the missing "
            f"values, in {counted(len(columns), 'column')}, depend on at K = {latent_dim}; the "
            "scores do not apply to these"
        )


def _max_latent_dim(noise: str, num_data: int, data_dim: int) -> float:
    # Above Ledermann's number a factor model has more parameters than a covariance has entries.
    ledermann = data_dim + 0.5 - (2 * data_dim + 0.25) ** 0.5
    largest = min(data_dim, num_data - 1)
    return largest if noise == "isotropic" else min(largest, ledermann + 1e-9)


def _latent_dims(limit: float) -> Iterator[int]:
    # 1, 2, 3, 4, 6, 8, 12, 16, ... below the limit, and 1 in any case.
    powers = (2**j for j in itertools.count(1))
    several = itertools.chain([1, 2], (k for p in powers for k in (p * 3 // 2, 2 * p)))
    return itertools.takewhile(lambda k: k < max(limit, 2), several)


def _draw_masked(observed: Bool[Tensor, "N D"], fraction: float, seed: int) -> Bool[Tensor, "N D"]:
    # A separate random stream: the caller may have drawn the missing values from the bare seed.
    stream = np.random.default_rng((seed, STREAM))
    draws = torch.from_numpy(stream.random(tuple(observed.shape))).to(observed.device)
    # Each row keeps its observed value with the largest draw; each column keeps its two largest.
    ranked = draws.where(observed, -1.0)
    kept = ranked >= ranked.amax(1, keepdim=True)
    num_kept = min(2, len(observed))
    kept |= ranked >= ranked.topk(num_kept, 0).values[-1:]
    return observed & ~kept & (draws < fraction)


def _score(data: _MaskedData, noise: str, latent_dim: int) -> _Score:
    ppca = PPCA.like(data.kept, latent_dim, noise=noise, seed=data.seed)
    fit_em(ppca, data.kept, tol=TOLERANCE, max_iterations=MAX_ITERATIONS)
    ppca.undetermined = None  # masked values are scored even if their covariance is undetermined
    imputed = ppca.impute(data.kept)
    truth, mean, sd = (values[data.masked] for values in (data.x, imputed.mean, imputed.sd))
    error = (truth - mean).abs()
    centred = data.kept - data.kept.nanmean(0)
    scale = centred.square().nanmean(0).sqrt().expand_as(data.x)[data.masked]
    varying = scale > 0
    return _Score(
        noise=noise,
        latent_dim=latent_dim,
        log_density=float(Normal(mean, sd).log_prob(truth).mean()),
        rmse=float((error / scale)[varying].square().mean().sqrt()),
        coverage=float((error < 1.96 * sd).double().mean()),
    )
