"""The evaluation of a fitted model: log p, gaps, collapse and reconstructions."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import Result
from ppl_vae.core.stage_callback import StageCallback, ignore_stages
from ppl_vae.core.text import counted
from ppl_vae.evaluation.inference_gaps.gaps import gaps
from ppl_vae.evaluation.inference_gaps.result import Gaps
from ppl_vae.evaluation.latent_space.collapse import collapse
from ppl_vae.evaluation.latent_space.collapse_result import Collapse
from ppl_vae.evaluation.marginal_likelihood.annealed import Annealing
from ppl_vae.evaluation.marginal_likelihood.cross_check import NUM_CHAINS, EstimatorComparison
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.fitted.held_out import ReconstructionError
from ppl_vae.fitted.model import FittedModel
from ppl_vae.guides.guides import ExactGuide
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE

NO_DENSITY = (
    "log p is not given: the guide of an autoencoder is a point mass, so that the model has no "
    "density of x; a VAE has one (ppl-vae fit --model vae)"
)
GLOBAL_PARAMETERS = (
    "log p is the posterior predictive density of each row. The gaps and the information in the "
    "codes are not given: they depend on the values of the parameters, which have a posterior"
)
SINGLE_ROW = "the information in the codes is not given: it needs two rows or more"


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """The evaluation of a saved model on the rows of a table.

    Attributes:
        model, data: their names.
        num_rows: the number of rows.
        reconstruction: the error of the rows' reconstructions.
        log_likelihood: log p of each row, exact for PPCA; None for a model without log p.
        cross_check: log p of some rows by several methods; None where it is exact, not requested
            or not defined.
        gaps: the approximation and amortization gaps; None where they are not computed.
        collapse: the information that the codes carry; None where it is not computed.
        reasons: why parts are None, in sentences.
    """

    model: str
    data: str
    num_rows: int
    reconstruction: ReconstructionError
    log_likelihood: LogLikelihood | None = None
    cross_check: EstimatorComparison | None = None
    gaps: Gaps | None = None
    collapse: Collapse | None = None
    reasons: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        fitted: FittedModel,
        values: Float[np.ndarray, "N D"],
        data: str,
        *,
        num_samples: int = 1000,
        refine: int = 300,
        annealed: int = 40,
        annealing: Annealing | None = None,
        seed: int = 0,
        on_stage: StageCallback = ignore_stages,
    ) -> Self:
        """Evaluate a model on rows with at least one observed value each.

        An autoencoder has no log p: only its reconstructions are evaluated. log p of Bayesian
        PPCA is the posterior predictive density.

        Args:
            fitted: the model.
            values: the rows, in the units and in the order of the model's columns; missing values
                are integrated out.
            data: the name of the data.
            num_samples: draws of z per row, where log p is estimated.
            refine: steps of the optimization of each row's q.
            annealed: maximal number of rows of the cross-check, if log p is estimated.
            annealing: the settings of its chains.
            seed: the seed of the draws.
            on_stage: a callback that receives what is done next.

        Raises:
            ValueError: if the rows have another number of columns.
        """
        on_stage("reconstructing the rows")
        found = cls(fitted.describe(), data, len(values), ReconstructionError.of(fitted, values))
        if not fitted.has_density:
            return replace(found, reasons=(NO_DENSITY,))
        on_stage("estimating log p")
        estimate = fitted.log_likelihood(values, num_samples=num_samples, refine=refine, seed=seed)
        found = replace(found, log_likelihood=estimate)
        program = fitted.program
        if not isinstance(program, PPCA | VAE):
            return replace(found, reasons=(GLOBAL_PARAMETERS,))
        x = fitted.in_model_units(values)
        nats = fitted.units.log_jacobian(x)
        pair = program.model, ExactGuide(program) if isinstance(program, PPCA) else program.guide
        if isinstance(program, VAE) and annealed:
            on_stage("cross-checking log p by annealing")
            first = estimate.shifted(-nats).first(annealed)
            checked = _cross_check(pair, x, first, annealing, nats, seed)
            found = replace(found, cross_check=checked)
        on_stage("computing the gaps")
        if isinstance(program, PPCA):
            exact = program.log_likelihood(x)
            split = gaps(*pair, x, log_p=exact, best=pair[1], seed=seed)
        else:
            split = gaps(*pair, x, steps=max(refine, 1), num_samples=num_samples, seed=seed)
        found = replace(found, gaps=split.shifted(nats))
        if len(x) < 2:
            return replace(found, reasons=(SINGLE_ROW,))
        on_stage("computing the information in the codes")
        return replace(found, collapse=collapse(*pair, x, seed=seed))

    def sentences(self) -> Iterator[str]:
        """The findings, the reliability of log p first."""
        yield f"{self.model} on {counted(self.num_rows, 'row')} of {self.data}"
        parts = (self.log_likelihood, self.cross_check, self.gaps, self.collapse)
        yield from (str(part) for part in parts if part is not None)
        yield str(self.reconstruction)
        yield from self.reasons


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
