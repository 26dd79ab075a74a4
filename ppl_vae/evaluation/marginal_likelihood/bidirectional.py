"""log p between two bounds, on data that the model itself drew: bidirectional Monte Carlo.

For data drawn together with their z, that z is an exact draw of the posterior. Chains annealed
from q give a lower bound of log p(x) in expectation, chains that walk back from z an upper one;
what lies between them bounds the error of both.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike, as_data_and_mask, filter_kwargs
from ppl_vae.core.results import Result
from ppl_vae.core.state import eval_mode, isolated_store, seeded
from ppl_vae.core.traces import PairTraces, Site, by_draw_and_datum, data_sites
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.evaluation.marginal_likelihood.annealed import AISChains, AISWeights, Annealing
from ppl_vae.evaluation.marginal_likelihood.annealing_path import Path
from ppl_vae.evaluation.marginal_likelihood.importance import prior_guide
from ppl_vae.evaluation.marginal_likelihood.reliability import effective_sample_size
from ppl_vae.objectives.bounds import batch_keywords
from ppl_vae.objectives.divergences import check_importance_samplable


@dataclass(frozen=True, repr=False)
class Bidirectional(Result):
    """Stochastic bounds of log p(x_n), one per datum, for data that the model drew.

    Single data may cross their bounds; it is the means that are ordered, up to their errors.

    Attributes:
        lower: log-mean-exp of the log weights of chains from q, in nats: at most log p(x_n) in
            expectation, and more than that by b with a chance of at most exp(-b).
        upper: minus log-mean-exp of minus the sums of chains from the z that made x_n, in nats:
            at least log p(x_n) in expectation.
        lower_error, upper_error: their standard errors, from the spread of the chains, in nats;
            NaN with one chain.
        x: the data drawn, (N, D), zeros where the template has missing values.
        num_chains: S, each way.
        temperatures: T.
        path: how it was computed, and how many moves were accepted.
    """

    lower: Float[Tensor, " N"]
    upper: Float[Tensor, " N"]
    lower_error: Float[Tensor, " N"]
    upper_error: Float[Tensor, " N"]
    x: Float[Tensor, "N D"]
    num_chains: int
    num_temperatures: int
    path: str = ""

    @property
    def gap(self) -> float:
        """The mean of upper - lower over the data, in nats per datum; it bounds both errors."""
        return float((self.upper - self.lower).mean())

    @property
    def gap_error(self) -> float:
        """Standard error of :attr:`gap`: the standard deviation over data / sqrt(N)."""
        spread = (self.upper - self.lower).std() if len(self.lower) > 1 else math.nan
        return float(spread) / math.sqrt(len(self.lower))

    def __repr__(self) -> str:
        low, high = float(self.lower.mean()), float(self.upper.mean())
        return (
            f"log-likelihood of {len(self.lower)} data that the model drew: between {low:.3f} and "
            f"{high:.3f} nats per datum\n"
            f"  gap {self.gap:.3f} +- {self.gap_error:.3f} ({self.num_chains} chains each way, "
            f"{self.num_temperatures} temperatures)"
        )


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
    """Draw data like x from the model, and hold their log p between annealed bounds.

    Args:
        model, guide: any pair under the contract whose model observes x itself; run in evaluation
            mode. Chains start from the guide's q, or with None from the prior.
        x: rows that say how many to draw, and where the missing values are, (N, D); their values
            are only what the model is called with, and their place that which a guide looks up.
        num_chains: chains per datum, each way.
        annealing: how chains walk; by default ``Annealing()``.
        mask: True where x is observed; NaN in x says the same.
        capture: run as compiled tensor code, see :func:`~ppl_vae.log_likelihood`.
        precision: of float32 matrix products, see :func:`ppl_vae.core.state.precision`.
        seed: of the draws.

    Raises:
        ValueError: bad data or arguments; a model that observes anything else than x, or has
            factors (``pyro.factor``), of which no data can be drawn; a guide whose own sites are
            not the model's; what
            :class:`ppl_vae.evaluation.marginal_likelihood.annealing_path.Path` refuses.
        FloatingPointError: if a log weight is NaN.

    References:
        Grosse, Ghahramani, Adams: Sandwiching the marginal likelihood using bidirectional Monte
        Carlo (2015). Wu, Burda, Salakhutdinov, Grosse: On the quantitative analysis of
        decoder-based generative models (2017).
    """
    num_chains, annealing = check_int("num_chains", num_chains), annealing or Annealing()
    x, mask = as_data_and_mask(x, mask, model=model, guide=guide)
    how: dict[str, Any] = {"capture": capture, "numbers": precision}
    annealer = AISWeights(model, annealing, x, len(x), num_chains, **how)
    start = prior_guide(model) if guide is None else guide
    parts = []
    with isolated_store(), seeded(seed), eval_mode(model, start):
        for rows in torch.arange(len(x), device=x.device).split(annealer.block_size):
            keywords = batch_keywords(x, mask, rows)
            check_importance_samplable(Pair(model, start), Batch(x[rows], **keywords))
            drawn, values = _draw(model, x[rows], keywords)
            path = Path(model, start, drawn, keywords)
            point, walk = path.place(values), AISChains(annealer, path)
            lower = _bound(walk.forward(num_chains))
            upper = _bound(-walk.backward(num_chains, point))
            parts.append((lower[0], -upper[0], lower[1], upper[1], drawn.cpu()))
    low, high, low_error, high_error, drawn = map(torch.cat, zip(*parts, strict=True))
    sizes = num_chains, annealing.num_temperatures
    return Bidirectional(low, high, low_error, high_error, drawn, *sizes, path=annealer.why)


def _bound(weights: Float[Tensor, "S B"]) -> tuple[Tensor, Tensor]:
    """log-mean-exp over chains, and its standard error by the delta method."""
    if bool(weights.isnan().any()):
        raise FloatingPointError(
            "log weights are NaN; do the model and the guide give finite densities on these data?"
        )
    number = len(weights)
    value = torch.logsumexp(weights, 0) - math.log(number)
    spread = (number / effective_sample_size(weights) - 1).clamp(min=0)
    error = (spread / (number - 1)).sqrt() if number > 1 else torch.full_like(spread, math.nan)
    return value.cpu(), error.cpu()


def _draw(model: ProgramLike, x: Tensor, keywords: dict[str, Any]) -> tuple[Tensor, Any]:
    """Rows drawn from the model, in x's form, and the trace that holds what made them."""
    mask = keywords.get("mask")
    run = Pair(model, prior_guide(model)).run(Batch(x, **keywords))
    _check_observes(run, x, mask)
    names = list(data_sites(run))
    made: Any = poutine.trace(poutine.uncondition(model)).get_trace(
        x, **filter_kwargs(model, keywords)
    )
    drawn = _cells(run, [made.nodes[name] for name in names]).to(x)
    return drawn if mask is None else torch.where(mask, drawn, 0.0), made


def _cells(run: PairTraces, observed: Iterable[Site]) -> Float[Tensor, "B D"]:
    values = [by_draw_and_datum(run, site, site["value"])[0] for site in observed]
    return torch.cat([value.reshape(len(value), -1) for value in values], -1)


def _check_observes(run: PairTraces, x: Tensor, mask: Tensor | None) -> None:
    names = list(found := data_sites(run))
    if factors := sorted(run.observed.keys() - found.keys()):
        raise ValueError(
            f"the model has factors, {factors}, so data drawn site by site are not drawn from its "
            "density; bidirectional needs a model of distributions alone"
        )
    seen = _cells(run, found.values())
    same = seen.shape == x.shape and torch.isclose(seen.to(x), x, rtol=1e-3)
    if not bool(torch.as_tensor(same if mask is None else same | ~mask).all()):
        raise ValueError(
            f"sites {names} of the model do not hold x as it is, column by column, so it is not "
            "known which x a draw is; bidirectional needs a model that observes x itself"
        )
