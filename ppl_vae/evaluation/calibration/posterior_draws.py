"""The draws given simulated data, from any result that a fit may return."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_vae.core.pair import Pair
from ppl_vae.evaluation.calibration.simulation import (
    Simulation,
    SiteDraws,
    draw_from_guide,
    log_joint_of_draws,
)
from ppl_vae.inference.mcmc.samples import PosteriorSamples


@dataclass(frozen=True)
class PosteriorDraws:
    """Draws of latent sites given simulated data.

    Attributes:
        draws: by the names of sites, (L, ...).
        log_joint: computes log p(x, draws), (L,); None if a latent site was not drawn.
        chains: the number of Markov chains; draw s is of chain s modulo this number. None for
            draws that are taken as independent.
    """

    draws: SiteDraws
    log_joint: Callable[[], Tensor | None]
    chains: int | None = None


def posterior_draws(answer: Any, simulation: Simulation, num_draws: int) -> PosteriorDraws:
    """Draws from the posterior that a fit returned for a simulation.

    Args:
        answer: what the fit returned.
        simulation: the data.
        num_draws: L.

    Raises:
        TypeError: if it is none of the kinds that a fit may return.
        ValueError: if it holds fewer draws, or draws of other shapes than the sites have.
        FloatingPointError: if a draw is NaN or infinite.
    """
    if isinstance(answer, PosteriorSamples):
        chains = answer.num_chains
        each = -(-num_draws // chains)
        by_chain = {n: _thinned(n, v, each, 1) for n, v in answer.draws.items()}
        # One draw of each chain after the other.
        flat = {n: v.transpose(0, 1).flatten(0, 1)[:num_draws] for n, v in by_chain.items()}
        return _given(flat, simulation, chains)
    if isinstance(answer, Mapping):
        thinned = {n: _thinned(n, v, num_draws, 0) for n, v in answer.items()}
        return _given(thinned, simulation, None)
    if not callable(answer):
        raise TypeError(
            "fit must return PosteriorSamples, a guide, or a dictionary of draws by the names of "
            f"sites; it returned {type(answer).__name__}. If fit is a guide itself, pass "
            "lambda x: guide"
        )
    pair = Pair(simulation.model, answer)
    with pair.eval_mode():
        draws, density = draw_from_guide(
            pair, simulation.batch, list(simulation.latent), num_draws
        )
    return PosteriorDraws(draws, lambda: density.total)


def _thinned(name: str, values: Tensor, number: int, dim: int) -> Tensor:
    # This number of draws along a dimension, evenly spaced, the last one included.
    values = torch.as_tensor(values)
    size = values.shape[dim]
    if size < number:
        raise ValueError(
            f"num_draws needs {number} draws of {name!r}{' in each chain' if dim else ''}; fit "
            f"returned {size}. Draw more, or lower num_draws"
        )
    places = (torch.arange(1, number + 1) * size) // number - 1
    return values.index_select(dim, places.to(values.device))


def _given(draws: SiteDraws, simulation: Simulation, chains: int | None) -> PosteriorDraws:
    true = simulation.draws
    if unknown := sorted(draws.keys() - true.keys()):
        raise ValueError(
            f"fit returned draws of {unknown}, which are no latent sites of the model; its latent "
            f"sites are {sorted(true)}"
        )
    for name, value in draws.items():
        if value.shape[1:] != true[name].shape[1:]:
            raise ValueError(
                f"fit returned draws of {name!r} of shape {tuple(value.shape[1:])}; the site has "
                f"shape {tuple(true[name].shape[1:])}"
            )
        if not bool(value.isfinite().all()):
            raise FloatingPointError(f"fit returned draws of {name!r} that are NaN or infinite")
    whole = draws.keys() == true.keys()
    model, batch = simulation.model, simulation.batch
    return PosteriorDraws(
        draws, lambda: log_joint_of_draws(model, batch, draws) if whole else None, chains
    )
