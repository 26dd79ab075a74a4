"""Bidirectional Monte Carlo: log p between two bounds, on data that the model itself drew.

For data drawn together with their z, that z is an exact draw of the posterior. Chains annealed
from q give a lower bound of log p(x) in expectation, and reverse chains from z an upper bound; the
difference bounds the error of both.
"""

import math
from contextlib import closing
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.global_sites import check_no_globals
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import Result
from ppl_vae.core.state import isolated_store, seeded
from ppl_vae.core.stats import mean_and_error
from ppl_vae.core.text import counted
from ppl_vae.core.traces import PairTraces
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.evaluation.marginal_likelihood.annealed import AISChains, AISWeights, Annealing
from ppl_vae.evaluation.marginal_likelihood.annealing_path import AnnealingPath
from ppl_vae.evaluation.marginal_likelihood.batching import check_log_weights
from ppl_vae.evaluation.marginal_likelihood.drawn_data import draw_batch
from ppl_vae.evaluation.marginal_likelihood.importance import prior_guide
from ppl_vae.evaluation.marginal_likelihood.reliability import effective_sample_size
from ppl_vae.objectives.divergences import check_importance_samplable


@dataclass(frozen=True, repr=False)
class Bidirectional(Result):
    """Stochastic bounds of log p(x_n), one per datum, for data that the model drew.

    The bounds of a single datum may be in the wrong order; the means are ordered up to their
    errors.

    Attributes:
        lower: log-mean-exp of the log weights of chains from q, in nats: at most log p(x_n) in
            expectation, and above it by b with probability at most exp(-b).
        upper: minus log-mean-exp of minus the sums of reverse chains from the z that generated
            x_n, in nats: at least log p(x_n) in expectation.
        lower_error, upper_error: their standard errors, from the spread of the chains, in nats;
            NaN with one chain.
        x: the generated data, (N, D), with zeros where the template has missing values.
        num_chains: chains per datum in each direction, S.
        num_temperatures: the number of temperatures, T.
        execution: how they were computed (eagerly, recorded or compiled), and the acceptance rate.
    """

    lower: Float[Tensor, " N"]
    upper: Float[Tensor, " N"]
    lower_error: Float[Tensor, " N"]
    upper_error: Float[Tensor, " N"]
    x: Float[Tensor, "N D"]
    num_chains: int
    num_temperatures: int
    execution: str = ""

    @property
    def gap(self) -> float:
        """The mean of upper - lower over the data, in nats per datum; it bounds both errors."""
        return float(self._gaps.mean())

    @property
    def gap_error(self) -> float:
        """Standard error of :attr:`gap`: the standard deviation over data / sqrt(N)."""
        if len(self.lower) < 2:
            return math.nan
        return mean_and_error(self._gaps)[1]

    @property
    def _gaps(self) -> Float[Tensor, " N"]:
        return self.upper - self.lower

    def __repr__(self) -> str:
        low, high = float(self.lower.mean()), float(self.upper.mean())
        chains = counted(self.num_chains, "chain")
        lines = [
            f"log-likelihood of {counted(len(self.lower), 'data point')} that the model drew: "
            "lower "
            f"bound {low:.3f}, upper bound {high:.3f} nats per datum",
            f"  gap {self.gap:.3f} ± {self.gap_error:.3f} (± one standard error; {chains} in each "
            f"direction, {counted(self.num_temperatures, 'temperature')})",
        ]
        if low > high:
            lines.append("  the bounds are in reverse order, within their Monte Carlo error")
        return "\n".join(lines)


@torch.no_grad()
def bidirectional(
    model: ProgramLike,
    guide: ProgramLike | None,
    x: ArrayLike,
    num_chains: int = 16,
    *,
    annealing: Annealing | None = None,
    mask: ArrayLike | None = None,
    capture: bool | str = "auto",
    precision: str = "float32",
    seed: int | None = None,
) -> Bidirectional:
    """Draw data like x from the model, and bound their log p by annealing in both directions.

    Args:
        model, guide: any pair under the contract whose model observes x itself; it is run in
            evaluation mode. Chains start from the guide's q, or from the prior if it is None.
        x: template rows, (N, D), which determine the number of rows to draw and their missing
            values. Their values are used only where a program is called with data.
        num_chains: chains per datum in each direction.
        annealing: the settings of the chains; by default ``Annealing()``.
        mask: True where x is observed; NaN in x has the same meaning.
        capture: run as compiled tensor code, see :func:`~ppl_vae.log_likelihood`.
        precision: precision of float32 matrix products, see
            :func:`ppl_vae.core.state.precision`.
        seed: seed of the draws.

    Raises:
        ValueError: if data or arguments are invalid; if the model observes anything else than x,
            or has factors (``pyro.factor``), of which no data can be drawn; if the guide has
            sites that the model has not; or if
            :mod:`ppl_vae.evaluation.marginal_likelihood.annealed` rejects
            the pair.
        FloatingPointError: if a log weight is NaN.

    References:
        Grosse, Ghahramani, Adams: Sandwiching the marginal likelihood using bidirectional Monte
        Carlo (2015). Wu, Burda, Salakhutdinov, Grosse: On the quantitative analysis of
        decoder-based generative models (2017).
    """
    num_chains, annealing = check_int("num_chains", num_chains), annealing or Annealing()
    pair = Pair(model, prior_guide(model) if guide is None else guide)
    template = pair.observe(x, mask)
    num_data = len(template)
    sampler = AISWeights(
        annealing, template.x, num_data, num_chains, capture=capture, precision=precision
    )
    with closing(sampler.runner), isolated_store(), seeded(seed), pair.eval_mode():
        parts = [
            _bounds(sampler, pair, batch, num_chains)
            for batch in template.split(torch.arange(num_data), sampler.block_size)
        ]
    return Bidirectional(
        *map(torch.cat, zip(*parts, strict=True)),
        num_chains=num_chains,
        num_temperatures=annealing.num_temperatures,
        execution=sampler.execution,
    )


def _bounds(
    sampler: AISWeights, pair: Pair, template: Batch, num_chains: int
) -> tuple[Tensor, ...]:
    """Lower bounds, upper bounds, the errors of both, and the data that were drawn."""
    check_importance_samplable(pair, template)
    drawn, latents = draw_batch(pair.model, template, "bidirectional")
    check_no_globals(PairTraces(latents, latents), "bidirectional")
    path = AnnealingPath(pair, drawn)
    point, chains = path.locate(latents), AISChains(sampler, path)
    lower, lower_error = _bound(chains.forward(num_chains), drawn)
    upper, upper_error = _bound(-chains.backward(num_chains, point), drawn)
    return lower, -upper, lower_error, upper_error, drawn.x.cpu()


def _bound(log_weights: Float[Tensor, "S B"], batch: Batch) -> tuple[Tensor, Tensor]:
    """log-mean-exp over chains, and its standard error by the delta method."""
    check_log_weights(log_weights, batch)
    number = len(log_weights)
    value = torch.logsumexp(log_weights, 0) - math.log(number)
    variance = (number / effective_sample_size(log_weights) - 1).clamp(min=0)
    if number == 1:
        return value.cpu(), torch.full_like(value, math.nan).cpu()
    return value.cpu(), (variance / (number - 1)).sqrt().cpu()
