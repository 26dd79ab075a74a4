"""The command ``ppl-vae evaluate``: log p, gaps and posterior collapse of a saved model."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch

from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import Result
from ppl_vae.core.text import counted
from ppl_vae.data.tables import Table
from ppl_vae.evaluation.inference_gaps.gaps import gaps
from ppl_vae.evaluation.inference_gaps.result import Gaps
from ppl_vae.evaluation.latent_space.collapse import collapse
from ppl_vae.evaluation.latent_space.collapse_result import Collapse
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
    """The evaluation of a saved model on the rows of a table.

    Attributes:
        model, data: their names.
        log_likelihood: log p of each row, exact for PPCA.
        cross_check: log p of some rows by several methods; None where it is exact or not
            requested.
        gaps: the approximation and amortization gaps.
        collapse: the information that the codes carry.
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
        """Load the model and evaluate it on the first rows of the table.

        Args:
            folder: written by :func:`~ppl_vae.models.storage.save`, with a PPCA or a VAE.
            table: in the units that the model was fitted in; missing values are integrated out.
            draws: draws per row, where log p is estimated.
            refine: steps of the optimization of each row's q.
            rows: maximal number of rows.
            annealed: maximal number of rows of the cross-check, if log p is estimated.
            annealing: the settings of its chains.
            seed: of the draws.

        Raises:
            FileNotFoundError: if there is no such folder.
            ValueError: if it holds another object, or the table has another number of columns.
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
            pair, checked = (program.model, ExactGuide(program)), None
            exact = exact_result(program.log_likelihood(x))
            cells = torch.from_numpy((~np.isnan(x)).sum(1)).to(exact.value)
            estimate = replace(exact, cells=cells)
            split = gaps(*pair, x, log_p=exact.value, best=pair[1], seed=seed)
        else:
            pair = program.model, program.guide
            estimate = log_likelihood(*pair, x, draws, refine=refine, seed=seed)
            checked = None
            if annealed:
                checked = _cross_check(pair, x, estimate.first(annealed), annealing, seed)
            split = gaps(*pair, x, steps=max(refine, 1), num_samples=draws, seed=seed)
        found = collapse(*pair, x, seed=seed)
        return cls(_label(program, folder), table.name, estimate, checked, split, found)

    def sentences(self) -> Iterator[str]:
        """The findings, the reliability of log p first."""
        rows = counted(len(self.log_likelihood.value), "row")
        yield f"{self.model} on {rows} of {self.data}"
        parts = (self.log_likelihood, self.cross_check, self.gaps, self.collapse)
        yield from (str(part) for part in parts if part is not None)


def _cross_check(
    pair: tuple[ProgramLike, ProgramLike],
    x: np.ndarray,
    estimate: LogLikelihood,
    annealing: Annealing | None,
    seed: int,
) -> EstimatorComparison:
    """Compare an importance sampling estimate for the first rows with other methods."""
    rows, found = torch.arange(len(estimate.value)), {"importance": estimate}
    if estimate.refine:
        plain = log_likelihood(*pair, x, estimate.num_samples, rows=rows, seed=seed + 1)
        found = {"importance": plain, "refined": estimate}
    found["annealed"] = log_likelihood(
        *pair, x, NUM_CHAINS, rows=rows, method="annealed", annealing=annealing, seed=seed + 2
    )
    return EstimatorComparison.of(found)


def _label(program: PPCA | VAE, folder: Path) -> str:
    sizes = f"D = {program.data_dim}, K = {program.latent_dim}"
    return f"{type(program).__name__} in {folder} ({sizes})"
