"""Where the ELBO loses its nats: log p - ELBO = approximation gap + amortization gap."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_vae.arguments import ArrayLike, at_least, choose_option
from ppl_vae.evaluation.likelihood import LogLikelihood, collect, estimate
from ppl_vae.evaluation.local import family_of
from ppl_vae.evaluation.rails import Refiner, block_size, rows_at_once
from ppl_vae.guides import COVARIANCES
from ppl_vae.objectives import ELBO, batch_keywords
from ppl_vae.program import ProgramLike, as_observed
from ppl_vae.results import Result
from ppl_vae.state import isolated_store, mode, seeded

ELBO_DRAWS = 200


@dataclass(frozen=True, repr=False)
class Gaps(Result):
    """log p - ELBO of each datum, split in two.

    With q* the member of the guide's family that is best for each datum,
    log p - ELBO[q] = (log p - ELBO[q*]) + (ELBO[q*] - ELBO[q]).

    Attributes:
        log_likelihood: log p(x_n), exact if it was given, else estimated, in nats.
        elbo: the guide's, in nats.
        best_elbo: ELBO[q*], in nats.
        covariance: the family of q*.
        estimate: how log p was estimated; None if it was given.
    """

    log_likelihood: Float[Tensor, " N"]
    elbo: Float[Tensor, " N"]
    best_elbo: Float[Tensor, " N"]
    covariance: str
    estimate: LogLikelihood | None

    @property
    def approximation(self) -> float:
        """Mean of log p - ELBO[q*]: what the family costs, in nats a datum."""
        return float((self.log_likelihood - self.best_elbo).mean())

    @property
    def amortization(self) -> float:
        """Mean of ELBO[q*] - ELBO[q]: what reading q off a network costs, in nats a datum."""
        return float((self.best_elbo - self.elbo).mean())

    @property
    def approximation_error(self) -> float:
        """Standard error of :attr:`approximation` over the data."""
        return _error(self.log_likelihood - self.best_elbo)

    @property
    def amortization_error(self) -> float:
        """Standard error of :attr:`amortization` over the data."""
        return _error(self.best_elbo - self.elbo)

    def __repr__(self) -> str:
        how = "given" if self.estimate is None else "estimated"
        return (
            f"Gaps in nats a datum: log p {self.log_likelihood.mean():.3f} ({how}), "
            f"ELBO {self.elbo.mean():.3f}\n"
            f"  approximation {self.approximation:.3f} +- {self.approximation_error:.3f} "
            f"(best {self.covariance} q a datum)\n"
            f"  amortization  {self.amortization:.3f} +- {self.amortization_error:.3f}"
        )


def _error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else float("nan")


def gaps(
    model: ProgramLike,
    guide: ProgramLike,
    x: ArrayLike,
    *,
    log_p: Float[Tensor, " N"] | None = None,
    best: ProgramLike | None = None,
    covariance: str | None = None,
    steps: int = 300,
    num_samples: int = 1000,
    mask: ArrayLike | None = None,
    rows: Int[Tensor, " R"] | None = None,
    seed: int | None = None,
) -> Gaps:
    """Split log p - ELBO of a pair into approximation and amortization gap.

    Both ELBOs are estimated from the same draws, so that their difference is less noisy.

    Args:
        model, guide: any pair under the contract.
        x: the whole data, (N, D).
        log_p: exact log p(x_n) of the rows looked at, if it is known; else it is estimated by
            importance sampling with a full-covariance Gaussian refined from q*.
        best: a guide known to be the best of the family for each datum; else it is sought.
        covariance: the family; by default the guide's own.
        steps: of the search for q*, and of the further refinement.
        num_samples: draws a datum for log p.
        mask: True where x is observed; NaN in x says the same.
        rows: look at these rows of x only; by default at all.
        seed: of the draws.

    Raises:
        ValueError: as :func:`~ppl_vae.evaluation.likelihood.log_likelihood`.
    """
    x, mask = as_observed(x, mask, model=model, guide=guide)
    at_least("steps", steps)
    at_least("num_samples", num_samples)
    rows = torch.arange(len(x)) if rows is None else rows
    if log_p is not None and torch.as_tensor(log_p).shape != rows.shape:
        raise ValueError(
            f"log_p must have one value for each of {len(rows)} rows; its shape is "
            f"{tuple(torch.as_tensor(log_p).shape)}"
        )
    blocks = rows.to(x.device).split(block_size(x, num_samples, refined=True))
    ours, top, parts = [], [], []
    with isolated_store(), seeded(seed), mode(model, guide, training=False):
        first = x[blocks[0]], batch_keywords(x, mask, blocks[0])
        family = covariance or family_of(model, guide, *first)
        choose_option("covariance", family, COVARIANCES)
        search = Refiner(model, steps=steps, covariance=family)
        widen = Refiner(model, steps=steps, covariance="full")
        for block_rows in blocks:
            block = x[block_rows], batch_keywords(x, mask, block_rows)
            optimum = best or search(guide, *block)
            common = int(torch.randint(2**31, ()))
            ours.append(_elbo(model, guide, *block, seed=common))
            top.append(_elbo(model, optimum, *block, seed=common))
            if log_p is None:
                wide = widen(optimum, *block)
                parts.append(estimate(model, wide, *block, num_samples))
    estimated = collect(parts, num_samples, "importance", steps) if parts else None
    value = log_p if estimated is None else estimated.value
    columns = [
        torch.as_tensor(values).detach().double().cpu()
        for values in (value, torch.cat(ours), torch.cat(top))
    ]
    return Gaps(*columns, covariance=family, estimate=estimated)


@torch.no_grad()
def _elbo(
    model: ProgramLike, guide: ProgramLike, x: Tensor, keywords: dict[str, Any], seed: int
) -> Float[Tensor, " B"]:
    # The same seed gives both guides the same standard normal draws. The KL is sampled too: where
    # q is close to the posterior the log weights hardly vary, and a closed-form KL would.
    draws = max(1, rows_at_once(x) // len(x))
    sizes = [draws] * (ELBO_DRAWS // draws) + [ELBO_DRAWS % draws]
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    with seeded(seed):
        for size in sizes:
            if size:
                reconstruction, kl = ELBO(size, kl="sampled").terms(model, guide, x, **keywords)
                total += size * (reconstruction - kl)
    return total / ELBO_DRAWS
