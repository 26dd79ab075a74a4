"""The result of comparing numbers of latent dimensions."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.results import UNSAVED, Result
from ppl_vae.core.text_table import render
from ppl_vae.core.validation import ArrayLike
from ppl_vae.inference.mcmc.samples import PosteriorSamples

if TYPE_CHECKING:
    import pandas

APPROXIMATIONS = ("vb_bound", "laplace", "minka", "bic")
"""Names of the approximations of the evidence, in the order of their columns."""


@dataclass(frozen=True, repr=False)
class LatentDims(Result):
    """Numbers of latent dimensions K, and what the data say about them.

    All values but ``held_out`` are in nats for the whole data set.

    Attributes:
        dims: the values of K, (M,).
        log_evidence: log p(x | K) by bridge sampling, (M,).
        evidence_error: its standard error, (M,).
        approximations: approximations of log p(x | K) by name, each (M,): ``"vb_bound"``, the
            bound of variational Bayes, which is at most log p(x | K) and, for K > 1, several nats
            less, since its q covers one rotation of W; ``"laplace"``, at the
            posterior mode, NaN where the Hessian is not positive definite or has more than 2,000
            rows;
            ``"minka"``, up to a constant that all K share and under a prior of its own, NaN with
            missing values or diagonal noise; ``"bic"``, the maximal log-likelihood
            - 1/2 P log N.
        held_out: log p(x_n | K, other data) in nats per datum, by Pareto-smoothed
            leave-one-out importance sampling over the draws, or of ``x_test``, (M,).
        held_out_error: its standard error over data, (M,).
        probability: p(K | x) under equal prior probabilities, (M,).
        probability_error: its Monte Carlo standard error, (M,).
        num_data: N.
        notes: caveats.
        samples: draws of the posterior for each K; not saved.
    """

    dims: tuple[int, ...]
    log_evidence: Float[Tensor, " M"]
    evidence_error: Float[Tensor, " M"]
    approximations: dict[str, Float[Tensor, " M"]]
    held_out: Float[Tensor, " M"]
    held_out_error: Float[Tensor, " M"]
    probability: Float[Tensor, " M"]
    probability_error: Float[Tensor, " M"]
    num_data: int
    notes: tuple[str, ...] = ()
    samples: tuple[PosteriorSamples, ...] = field(default=(), metadata=UNSAVED)

    @property
    def best(self) -> int:
        """The K with the largest p(K | x)."""
        return self.dims[int(self.probability.argmax())]

    @property
    def criteria(self) -> dict[str, Float[Tensor, " M"]]:
        """All criteria by name, of each of which larger values are better."""
        evidence = {"log_evidence": self.log_evidence}
        return evidence | self.approximations | {"held_out": self.held_out}

    def chosen_by(self, criterion: str) -> int | None:
        """The K that a criterion prefers; None if it has no value.

        Args:
            criterion: ``"log_evidence"``, ``"vb_bound"``, ``"laplace"``, ``"minka"``, ``"bic"`` or
                ``"held_out"``.
        """
        values = self.criteria[criterion]
        if bool(values.isnan().all()):
            return None
        return self.dims[int(values.nan_to_num(-math.inf).argmax())]

    def log_predictive(self, x: ArrayLike, mask: ArrayLike | None = None) -> Float[Tensor, " N"]:
        """The model average: log sum_K p(K | x) p(x_new | K, x), in nats per datum.

        Args:
            x: new rows, (N, D); NaN marks a missing value.
            mask: True where observed.

        Raises:
            ValueError: if the result was loaded from a file, which does not hold the draws.
        """
        if not self.samples:
            raise ValueError(
                "this result holds no draws of the posterior (they are not saved); run "
                "compare_latent_dims again"
            )
        each = [samples.log_predictive(x, mask=mask).value for samples in self.samples]
        values = torch.stack(each)
        weights = self.probability.log().to(values.device)
        return torch.logsumexp(values + weights.unsqueeze(-1), 0)

    def to_frame(self) -> "pandas.DataFrame":
        """One row for each K; all criteria and their errors as columns."""
        import pandas as pd

        columns = self.criteria | {
            "evidence_error": self.evidence_error,
            "held_out_error": self.held_out_error,
            "probability": self.probability,
            "probability_error": self.probability_error,
        }
        values = {name: column.numpy(force=True) for name, column in columns.items()}
        return pd.DataFrame(values, index=pd.Index(self.dims, name="latent_dim"))

    def __repr__(self) -> str:
        header = ("K", "p(K | x)", "log p(x | K)", "VB bound", "Laplace", "Minka", "BIC")
        rows = [self._cells(place) for place in range(len(self.dims))]
        lines = [
            f"p(K | x) of {self.num_data} data points, equal prior probabilities (± one standard "
            "error); evidence, bounds and criteria in nats, held-out log p in nats per datum",
            render(rows, (*header, "held-out log p"), indent="  "),
            f"  {self.verdict}",
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _cells(self, row: int) -> tuple[str, ...]:
        def number(values: Tensor, digits: int = 1) -> str:
            value = float(values[row])
            return "-" if math.isnan(value) else f"{value:.{digits}f}"

        return (
            str(self.dims[row]),
            f"{number(self.probability, 3)} ± {number(self.probability_error, 3)}",
            f"{number(self.log_evidence, 2)} ± {number(self.evidence_error, 2)}",
            *(number(self.approximations[name]) for name in APPROXIMATIONS),
            f"{number(self.held_out, 3)} ± {number(self.held_out_error, 3)}",
        )

    @property
    def verdict(self) -> str:
        """The most probable K, its probability and the disagreements, in one sentence."""
        place = int(self.probability.argmax())
        value, error = float(self.probability[place]), float(self.probability_error[place])
        others = [
            f"{name.replace('_', ' ')} prefers K = {found}"
            for name in (*APPROXIMATIONS, "held_out")
            if (found := self.chosen_by(name)) not in (None, self.best)
        ]
        text = f"K = {self.best} has probability {value:.3f} ± {error:.3f}"
        if error > 0.1:
            text += ", which is uncertain: draw more samples of the posterior"
        if place in (0, len(self.dims) - 1) and len(self.dims) > 1:
            text += "; it is at the end of the range that was compared, so compare more values"
        return text + ("; " + ", ".join(others) if others else "")


def posterior_probabilities(
    log_evidence: Float[Tensor, " M"], error: Float[Tensor, " M"]
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """p(K | x) under equal prior probabilities, and its standard error by the delta method.

    With p_i proportional to exp(l_i), d p_i / d l_j = p_i (1[i = j] - p_j).
    """
    probability = log_evidence.softmax(0)
    derivative = probability.diag() - torch.outer(probability, probability)
    return probability, (derivative.square() @ error.square()).sqrt()
