"""Simulation-based calibration of posteriors and of guides.

With theta drawn from the prior and x from p(x | theta), theta is a draw of p(theta | x): among
draws of an exact posterior given x its rank is uniform. The same holds for any function of theta
and x. Functions of theta alone do not reveal a posterior that ignores the data and repeats the
prior; the density of the data, which is among the default quantities, does.

References:
    Talts, Betancourt, Simpson, Vehtari, Gelman: Validating Bayesian inference algorithms with
    simulation-based calibration (2018).
    Modrak, Moon, Kim, Buerkner, Huurre, Faltejskova, Gelman, Vehtari: Simulation-based calibration
    checking for Bayesian computation: the choice of test quantities shapes sensitivity (2023).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ppl_vae.core.introspection import bound_object
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import eval_mode, isolated_store, seeded
from ppl_vae.core.validation import check_int
from ppl_vae.evaluation.calibration.posterior_draws import posterior_draws
from ppl_vae.evaluation.calibration.quantities import Evaluated, Quantities, Quantity
from ppl_vae.evaluation.calibration.result import SimulationBasedCalibration, dependence_notes
from ppl_vae.evaluation.calibration.simulation import Simulation, draw_from_guide, zeros
from ppl_vae.evaluation.marginal_likelihood.batching import rows_at_once
from ppl_vae.inference.mcmc.samples import PosteriorSamples

ESS_SIMULATIONS = 100
"""The number of simulations in which effective sample sizes are computed."""

Fit: TypeAlias = Callable[[Tensor], PosteriorSamples | ProgramLike | Mapping[str, Tensor]]
"""A function of x that returns draws, or a guide to draw from."""


def simulation_based_calibration(
    model: ProgramLike,
    fit: ProgramLike | Fit,
    *,
    num_simulations: int = 200,
    num_draws: int = 99,
    num_data: int | None = None,
    data_dim: int | None = None,
    quantities: Mapping[str, Quantity] | None = None,
    seed: int | None = None,
) -> SimulationBasedCalibration:
    """Check an algorithm, or an amortized guide, on data that the model itself draws.

    Args:
        model: a model under the contract, without factors; run in evaluation mode.
        fit: a function of x, (N, D), that returns the posterior given x:
            :class:`~ppl_vae.inference.mcmc.samples.PosteriorSamples`, a guide, or independent
            draws by the names of sites, each (S, ...). Or the guide of an amortized pair itself,
            a ``PyroModule`` or a method of one, which is not refitted; a guide that is a plain
            function is passed as ``lambda x: guide``.
        num_simulations: simulated data sets, M. For an amortized guide without global latent
            variables each of M data is a simulation.
        num_draws: L, draws per simulation. Longer Markov chains are thinned to this number, and
            shorter ones are refused.
        num_data: rows of each data set, N; not used where each datum is a simulation.
        data_dim: columns of x, D; None: the model's attribute ``data_dim``.
        quantities: functions of ``(draws, x)`` by name, in place of the default ones. ``draws``
            has the values of the sites by name, (S, ...), and (S, B, ...) for sites of each datum;
            the result has a value for each draw, (S, ...), or (S, B, ...) where each datum is a
            simulation. By default they are the elements of all global sites and of those of the
            first datum, and log p(x, draws); of ``BayesianPPCA``, whose loadings are not
            identified, they are mu, sigma, W W' + Psi, sorted relevances and
            log p(x | parameters).
        seed: seed of the simulations, and of draws in ``fit``, which should not set a fixed seed
            of its own.

    Returns:
        The ranks, with a verdict.

    Raises:
        TypeError: if ``fit`` returns something else.
        ValueError: if an argument is out of range or missing; if the model has factors, or does
            not observe x itself; if ``fit`` returns fewer draws than ``num_draws``, or draws of
            other shapes than the sites.
        FloatingPointError: if a draw is NaN or infinite, or a quantity is NaN.
    """
    check_int("num_simulations", num_simulations, 10)
    check_int("num_draws", num_draws, 4)
    guide = fit if isinstance(bound_object(fit), nn.Module) else None
    with isolated_store(), seeded(seed):
        width = _data_dim(model, data_dim)
        if guide is not None and not _has_globals(model, guide, width):
            of_datum = Quantities(model, quantities, each_datum=True)
            whole = Simulation.of(model, num_simulations, width)
            return _result(_rank_data(guide, whole, of_datum, num_draws), num_draws, 1)
        if num_data is None:
            raise ValueError(
                "num_data is missing: the number of rows of each simulated data set, on which the "
                "posterior depends"
            )
        of_data = Quantities(model, quantities, each_datum=False)
        found = []
        for number in range(num_simulations):
            one = Simulation.of(model, check_int("num_data", num_data), width)
            answer = fit(one.batch.x) if guide is None else guide
            with_ess = number < ESS_SIMULATIONS
            found.append(_rank(answer, one, of_data, num_draws, with_ess))
    return _result(found, num_draws, num_data)


def _data_dim(model: ProgramLike, data_dim: int | None) -> int:
    width = getattr(bound_object(model), "data_dim", None) if data_dim is None else data_dim
    if width is None:
        raise ValueError(
            "data_dim is missing: the number of columns of x, since the model has no attribute "
            "data_dim"
        )
    return check_int("data_dim", width)


@torch.no_grad()
def _has_globals(model: ProgramLike, guide: ProgramLike, width: int) -> bool:
    with eval_mode(model, guide):
        return Pair(model, guide).has_globals(zeros(model, 2, width))


class _Ranks(NamedTuple):
    # Ranks in B simulations, effective sample sizes, and caveats.
    ranks: Int[Tensor, "B E"]
    names: tuple[str, ...]
    effective: Float[np.ndarray, " E"] | None = None
    note: str = ""


@torch.no_grad()
def _rank_data(
    guide: ProgramLike, whole: Simulation, quantities: Quantities, num_draws: int
) -> list[_Ranks]:
    # Ranks of the latent variables of each datum under an amortized guide.
    x, names, local = whole.batch.x, list(whole.latent), whole.local
    true = quantities(whole.draws, x, local, lambda: whole.log_joint.local).values
    pair, found = Pair(whole.model, guide), []
    size = max(1, rows_at_once(x) // num_draws)
    with pair.eval_mode():
        for rows in torch.arange(len(x), device=x.device).split(size):
            batch = whole.batch.rows(rows)
            draws, density = draw_from_guide(pair, batch, names, num_draws)
            drawn = quantities(draws, batch.x, local, lambda value=density.local: value)
            found.append(_Ranks(_below(drawn.values, true[:, rows]), drawn.names))
    return found


@torch.no_grad()
def _rank(
    answer: Any, one: Simulation, quantities: Quantities, num_draws: int, with_ess: bool
) -> _Ranks:
    # Ranks of what generated one simulated data set.
    x, local = one.batch.x, one.local
    posterior = posterior_draws(answer, one, num_draws)
    drawn = quantities(posterior.draws, x, local, posterior.log_joint)
    kept = {name: one.draws[name] for name in posterior.draws}
    missing = sorted(one.draws.keys() - kept.keys())
    true = quantities(kept, x, local, lambda: None if missing else one.log_joint.total)
    effective, note = None, ""
    if with_ess and posterior.chains is not None:
        effective = _effective_sample_sizes(drawn, posterior.chains)
    if missing and quantities.given is None and not quantities.is_ppca(kept):
        note = (
            f"fit returned no draws of {missing}, so log p(x, draws) is not known and no test "
            "quantity depends on the data: draws from the prior would pass; give quantities"
        )
    return _Ranks(_below(drawn.values, true.values), drawn.names, effective, note)


def _below(drawn: Float[Tensor, "S B E"], true: Float[Tensor, "1 B E"]) -> Int[Tensor, "B E"]:
    # The number of draws below the true value; a place among ties is drawn uniformly.
    below, ties = (drawn < true).sum(0), (drawn == true).sum(0)
    return below + (torch.rand_like(true[0]) * (ties + 1)).floor().long()


def _effective_sample_sizes(drawn: Evaluated, chains: int) -> Float[np.ndarray, " E"]:
    from arviz_stats.base.array import array_stats

    each = len(drawn.values) // chains
    by_chain = drawn.values[: each * chains, 0].unflatten(0, (each, chains)).cpu().numpy()
    found = array_stats.ess(
        by_chain.transpose(2, 1, 0), chain_axis=-2, draw_axis=-1, method="bulk"
    )
    return np.asarray(found)


def _result(found: list[_Ranks], num_draws: int, num_data: int) -> SimulationBasedCalibration:
    names = found[0].names
    effective = [one.effective for one in found if one.effective is not None]
    mean = np.mean(effective, 0) if effective else np.full(len(names), np.nan)
    notes = tuple(dict.fromkeys(one.note for one in found if one.note))
    return SimulationBasedCalibration(
        quantities=names,
        ranks=torch.cat([one.ranks for one in found]).cpu(),
        num_draws=num_draws,
        num_data=num_data,
        effective_draws=torch.as_tensor(mean),
        notes=(*notes, *dependence_notes(mean, names, num_draws)),
    )
