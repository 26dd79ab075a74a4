"""The command ``ppl-vae evaluate``: log p, gaps and posterior collapse of a saved model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import Result
from ppl_vae.core.text import counted
from ppl_vae.evaluation.inference_gaps.gaps import gaps
from ppl_vae.evaluation.inference_gaps.result import Gaps
from ppl_vae.evaluation.latent_space.collapse import collapse
from ppl_vae.evaluation.latent_space.collapse_result import Collapse
from ppl_vae.evaluation.marginal_likelihood.annealed import Annealing
from ppl_vae.evaluation.marginal_likelihood.cross_check import NUM_CHAINS, EstimatorComparison
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.fitted.model import FittedModel
from ppl_vae.guides.guides import ExactGuide
from ppl_vae.models.ppca import PPCA
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
        fitted: FittedModel,
        values: Float[np.ndarray, "N D"],
        data: str,
        *,
        draws: int = 1000,
        refine: int = 300,
        annealed: int = 40,
        annealing: Annealing | None = None,
        seed: int = 0,
    ) -> Self:
        """Evaluate a PPCA or a VAE on rows with at least one observed value each.

        Args:
            fitted: the model.
            values: the rows, in the units and in the order of the model's columns; missing values
                are integrated out.
            data: the name of the data.
            draws: draws per row, where log p is estimated.
            refine: steps of the optimization of each row's q.
            annealed: maximal number of rows of the cross-check, if log p is estimated.
            annealing: the settings of its chains.
            seed: of the draws.

        Raises:
            ValueError: if the model is another one, or the rows have another number of columns.
        """
        program, x = fitted.program, fitted.in_model_units(values)
        nats = fitted.units.log_jacobian(x)
        checked, estimate = (
            None,
            fitted.log_likelihood(values, draws=draws, refine=refine, seed=seed),
        )
        if isinstance(program, PPCA):
            pair = program.model, ExactGuide(program)
            exact = program.log_likelihood(x)
            split = gaps(*pair, x, log_p=exact, best=pair[1], seed=seed)
        elif isinstance(program, VAE):
            pair = program.model, program.guide
            if annealed:
                first = estimate.shifted(-nats).first(annealed)
                checked = _cross_check(pair, x, first, annealing, nats, seed)
            split = gaps(*pair, x, steps=max(refine, 1), num_samples=draws, seed=seed)
        else:
            raise ValueError(
                f"{fitted.name} holds a {type(program).__name__}; give the folder of a PPCA or a "
                "VAE (ppl-vae score computes log p of other models)"
            )
        found = collapse(*pair, x, seed=seed)
        return cls(fitted.describe(), data, estimate, checked, split.shifted(nats), found)

    def sentences(self) -> Iterator[str]:
        """The findings, the reliability of log p first."""
        rows = counted(len(self.log_likelihood.value), "row")
        yield f"{self.model} on {rows} of {self.data}"
        parts = (self.log_likelihood, self.cross_check, self.gaps, self.collapse)
        yield from (str(part) for part in parts if part is not None)


def _cross_check(
    pair: tuple[ProgramLike, ProgramLike],
    x: Tensor,
    estimate: LogLikelihood,
    annealing: Annealing | None,
    nats: Tensor,
    seed: int,
) -> EstimatorComparison:
    """Compare an importance sampling estimate for the first rows with other methods.

    ``nats`` converts log densities to the units of the table.
    """
    rows, found = torch.arange(len(estimate.value)), {"importance": estimate}
    if estimate.refine:
        plain = log_likelihood(*pair, x, estimate.num_samples, rows=rows, seed=seed + 1)
        found = {"importance": plain, "refined": estimate}
    found["annealed"] = log_likelihood(
        *pair, x, NUM_CHAINS, rows=rows, method="annealed", annealing=annealing, seed=seed + 2
    )
    shift = nats[: len(rows)]
    return EstimatorComparison.of({name: e.shifted(shift) for name, e in found.items()})
