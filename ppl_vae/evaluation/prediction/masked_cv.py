"""How many latent dimensions, and which noise: what models say of cells hidden from their fit."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Normal

from ppl_vae.core.results import CONDITIONAL, Result
from ppl_vae.core.text_table import render
from ppl_vae.core.validation import ArrayLike, as_matrix, check_int, observed_mask
from ppl_vae.data.row_blocks import RowBlocks
from ppl_vae.inference.em.fit import fit_em
from ppl_vae.models.identifiability import undetermined_cells, undetermined_pairs
from ppl_vae.models.ppca import NOISES, PPCA

HIDDEN_SHARE = 0.1
PATIENCE = 2
"""A search ends after so many numbers of latent dimensions in a row without a better one."""
STREAM = 20_251
TOLERANCE, MAX_ITERATIONS = 1e-5, 200
"""Of the fits that are compared, in nats per datum: scores differ by more."""


@dataclass(frozen=True, repr=False)
class MaskedCV(Result):
    """PPCA (``"isotropic"``) and factor analysis (``"diagonal"``) on cells they did not see.

    Attributes:
        noise: of each model.
        latent_dim: K of each model.
        log_density: the mean over hidden cells of log p(x_nd given what is left of row n), (M,),
            in nats per cell.
        error: the root mean square of x_nd - E x_nd in standard deviations of the column, (M,);
            about 1 is what the mean of the column would give.
        coverage: the share of hidden cells within 1.96 standard deviations, (M,). These take the
            fitted parameters as known, so that it falls below 95 % where rows are few
            (:class:`~ppl_vae.core.results.Imputation` has numbers). It is the share of cells that
            were
            observed: of missing cells that rest on an undetermined covariance it says nothing,
            and ``notes`` say how many there are.
        num_hidden: how many cells were hidden.
        notes: what could not be fitted, and why; which missing cells the scores say nothing of.
    """

    noise: tuple[str, ...]
    latent_dim: tuple[int, ...]
    log_density: Float[Tensor, " M"]
    error: Float[Tensor, " M"]
    coverage: Float[Tensor, " M"]
    num_hidden: int
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> int:
        """The place of the model under which hidden cells are most probable."""
        return int(self.log_density.argmax())

    def __repr__(self) -> str:
        titles = ("noise", "K", "nats per cell", "error", "within 1.96 sd", "")
        lines = [
            f"{self.num_hidden} observed cells, hidden and given the rest of their rows:",
            render([*map(self._cells, range(len(self.noise)))], titles, indent="  "),
            f"  ({CONDITIONAL})",
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _cells(self, place: int) -> tuple[str, ...]:
        return (
            self.noise[place],
            str(self.latent_dim[place]),
            f"{self.log_density[place]:.3f}",
            f"{self.error[place]:.3f}",
            f"{self.coverage[place]:.1%}",
            "<- best" if place == self.best else "",
        )


def select_by_masked_cv(
    x: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    noises: Iterable[str] = NOISES,
    latent_dims: Iterable[int] | None = None,
    share: float = HIDDEN_SHARE,
    seed: int = 0,
) -> MaskedCV:
    """Fit PPCA and factor analysis without some of the observed cells, and score those.

    Cells are hidden at random, the same for every model; no row and no column loses all.

    Args:
        x: (N, D); NaN marks a missing value.
        mask: True where observed.
        noises: of the models.
        latent_dims: to try with each; by default 1, 2, 3, 4, 6, 8, 12, 16, 24, ... until two in
            a row are no better; for factor analysis up to D + 1/2 - sqrt(2 D + 1/4), above which
            it has more parameters than a covariance.
        share: of the observed cells to hide.
        seed: of the choice of cells and of the starts.

    Raises:
        ValueError: if share is not within (0, 1), if no cell can be hidden, or if no model can
            be fitted; as :func:`~ppl_vae.inference.em.fit.fit_em`.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1; got {share}")
    x = as_matrix(x).detach().double()
    seen = observed_mask(x, mask)
    seen = torch.ones_like(x, dtype=torch.bool) if seen is None else seen
    hidden = _hidden(seen, share, seed)
    if not hidden.any():
        raise ValueError(
            f"no cell of x, of shape {tuple(x.shape)} with {int(seen.sum())} observed, can be "
            "hidden without a row or column losing all; choose latent_dim and noise yourself"
        )
    left = x.where(seen & ~hidden, torch.nan)
    notes: list[str] = []
    found = []
    for noise in noises:
        tried = _numbers(_limit(noise, *x.shape)) if latent_dims is None else latent_dims
        scores: list[float] = []
        for k in tried:
            try:
                scored = _scored(x, left, hidden, noise, check_int("latent_dim", k), seed)
            except ValueError as error:
                notes.append(f"noise={noise!r}, K = {k}: {error}")
                break
            found.append((noise, k, *scored))
            scores.append(scored[0])
            if latent_dims is None and len(scores) - np.argmax(scores) > PATIENCE:
                break
    if not found:
        raise ValueError("; ".join(notes))
    names, sizes, *columns = zip(*found, strict=True)
    log_density, error, coverage = torch.tensor(columns, dtype=torch.float64)
    best = sizes[int(log_density.argmax())]
    notes.extend(_not_validated(x, seen, best))
    number = int(hidden.sum())
    return MaskedCV(names, sizes, log_density, error, coverage, number, tuple(notes))


def _not_validated(x: Tensor, seen: Bool[Tensor, "N D"], latent_dim: int) -> Iterator[str]:
    # Hidden cells are of columns that are observed together; others may be missing together.
    pairs = undetermined_pairs(RowBlocks(x.where(seen, torch.nan)), latent_dim)
    cells = undetermined_cells(seen, pairs)
    if number := int(cells.sum()):
        columns = cells.any(0).nonzero().flatten().tolist()
        yield (
            f"{number} missing cells, in {len(columns)} columns, rest on covariances that what is "
            f"observed does not determine at K = {latent_dim}; the scores say nothing of them"
        )


def _limit(noise: str, num_data: int, data_dim: int) -> float:
    # Above Ledermann's number a factor model has more parameters than a covariance has entries.
    ledermann = data_dim + 0.5 - (2 * data_dim + 0.25) ** 0.5
    most = min(data_dim, num_data - 1)
    return most if noise == "isotropic" else min(most, ledermann + 1e-9)


def _numbers(limit: float) -> Iterator[int]:
    # 1, 2, 3, 4, 6, 8, 12, 16, ... below the limit, and 1 in any case.
    powers = (2**j for j in itertools.count(1))
    several = itertools.chain([1, 2], (k for p in powers for k in (p * 3 // 2, 2 * p)))
    return itertools.takewhile(lambda k: k < max(limit, 2), several)


def _hidden(seen: Bool[Tensor, "N D"], share: float, seed: int) -> Bool[Tensor, "N D"]:
    # A stream of its own: the one of the bare seed may have made the missing values.
    stream = np.random.default_rng((seed, STREAM))
    draws = torch.from_numpy(stream.random(tuple(seen.shape))).to(seen.device)
    # The observed cell with the highest draw stays in each row; in each column, the two such.
    ranked = draws.where(seen, -1.0)
    kept = ranked >= ranked.amax(1, keepdim=True)
    few = min(2, len(seen))
    kept |= ranked >= ranked.topk(few, 0).values[-1:]
    return seen & ~kept & (draws < share)


def _scored(
    x: Tensor, left: Tensor, hidden: Tensor, noise: str, latent_dim: int, seed: int
) -> tuple[float, float, float]:
    ppca = PPCA.like(left, latent_dim, noise=noise, seed=seed)
    fit_em(ppca, left, tol=TOLERANCE, max_iterations=MAX_ITERATIONS)
    ppca.undetermined = None  # a score is of what a model says, determined or not
    filled = ppca.impute(left)
    truth, mean, sd = x[hidden], filled.mean[hidden], filled.sd[hidden]
    away = (truth - mean).abs()
    usual = (left - left.nanmean(0)).square().nanmean(0).sqrt().expand_as(x)[hidden]
    log_density = Normal(mean, sd).log_prob(truth).mean()
    varying = usual > 0
    error = (away / usual)[varying].square().mean().sqrt()
    return float(log_density), float(error), float((away < 1.96 * sd).double().mean())
