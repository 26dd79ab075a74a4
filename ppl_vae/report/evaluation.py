"""A saved model on a table: how well it explains rows, where its bound loses, what codes hold."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import Result
from ppl_vae.data.tables import Table
from ppl_vae.evaluation.inference_gaps.gaps import Gaps, gaps
from ppl_vae.evaluation.latent_space.collapse import Collapse, collapse
from ppl_vae.evaluation.marginal_likelihood.annealed import Annealing
from ppl_vae.evaluation.marginal_likelihood.cross_check import NUM_CHAINS, EstimatorComparison
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood, exact_result
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.guides.guides import ExactGuide
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.storage import load
from ppl_vae.models.vae import VAE


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """What a saved model says of a table's rows.

    Attributes:
        model, data: their names.
        log_likelihood: log p of each row, exact for PPCA.
        cross-checks: log p of some rows by three methods; None where it is exact, or not wanted.
        gaps: where the ELBO loses its nats.
        collapse: what the codes hold.
    """

    model: str
    data: str
    log_likelihood: LogLikelihood
    cross_check: EstimatorComparison | None
    gaps: Gaps
    collapse: Collapse

    @classmethod
    def of(
        cls,
        folder: Path,
        table: Table,
        *,
        draws: int = 1000,
        refine: int = 300,
        rows: int = 500,
        annealed: int = 40,
        annealing: Annealing | None = None,
        seed: int = 0,
    ) -> Self:
        """Load the model and look at the first rows of the table.

        Args:
            folder: what :func:`~ppl_vae.models.storage.save` wrote, a PPCA or a VAE.
            table: in the units that the model was fitted in; missing values are integrated out.
            draws: a row, where log p is estimated.
            refine: steps of the search for each row's own q.
            rows: at most so many are looked at.
            annealed: at most so many get a cross-check, if log p is estimated.
            annealing: of their chains.
            seed: of the draws.

        Raises:
            FileNotFoundError: if there is no such folder.
            ValueError: if it holds anything else, or the table another number of columns.
        """
        program = load(folder)
        if not isinstance(program, PPCA | VAE):
            raise ValueError(
                f"{folder} holds a {type(program).__name__}; give the folder of a PPCA or a VAE"
            )
        x = table.values[:rows]
        if x.shape[1] != program.data_dim:
            raise ValueError(
                f"{table.name} has {x.shape[1]} columns, and the model in {folder} "
                f"data_dim={program.data_dim}"
            )
        if isinstance(program, PPCA):
            pair = program.model, ExactGuide(program)
            told, exact = None, exact_result(program.log_likelihood(x))
            cells = torch.from_numpy((~np.isnan(x)).sum(1)).to(exact.value)
            estimate = replace(exact, cells=cells)
            split = gaps(*pair, x, log_p=exact.value, best=pair[1], seed=seed)
        else:
            pair = program.model, program.guide
            estimate = log_likelihood(*pair, x, draws, refine=refine, seed=seed)
            told = None
            if annealed:
                told = _second_opinion(pair, x, estimate.first(annealed), annealing, seed)
            split = gaps(*pair, x, steps=max(refine, 1), num_samples=draws, seed=seed)
        found = collapse(*pair, x, seed=seed)
        return cls(_described(program, folder), table.name, estimate, told, split, found)

    def sentences(self) -> Iterator[str]:
        """What there is to say, the verdict on log p first."""
        yield f"{self.model} on {len(self.log_likelihood.value)} rows of {self.data}"
        parts = (self.log_likelihood, self.cross_check, self.gaps, self.collapse)
        yield from (str(part) for part in parts if part is not None)


def _second_opinion(
    pair: tuple[ProgramLike, ProgramLike],
    x: np.ndarray,
    at_hand: LogLikelihood,
    annealing: Annealing | None,
    seed: int,
) -> EstimatorComparison:
    """Of the first rows, whose estimate by importance sampling is at hand."""
    how: dict[str, Any] = {"rows": torch.arange(len(at_hand.value))}
    found = {"importance": at_hand}
    if at_hand.refine:
        plain = log_likelihood(*pair, x, at_hand.num_samples, **how, seed=seed + 1)
        found = {"importance": plain, "refined": at_hand}
    how |= {"method": "annealed", "annealing": annealing}
    found["annealed"] = log_likelihood(*pair, x, NUM_CHAINS, **how, seed=seed + 2)
    return EstimatorComparison.of(found)


def _described(program: PPCA | VAE, folder: Path) -> str:
    sizes = f"D = {program.data_dim}, K = {program.latent_dim}"
    return f"{type(program).__name__} in {folder} ({sizes})"
