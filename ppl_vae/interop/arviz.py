"""Pairs, lineages and comparisons for ArviZ: ``InferenceData`` for 0.x, ``DataTree`` for 1.x.

Data stand along the dim ``datum``, their entries along ``column``; a latent site z has the dims
``z_dim_0``, ..., as ArviZ itself calls what it has no name for. A "/" in a site's name, which
trees cannot hold, becomes ".". ArviZ is imported when it is asked for, since that takes long.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from ppl_vae.core.files import whole_file
from ppl_vae.core.program import ProgramLike, as_data_and_mask
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.evaluation.marginal_likelihood.compare import Comparison, compare
from ppl_vae.evaluation.marginal_likelihood.elpd import ElpdData, elpd_data, installed_arviz
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood, exact_result
from ppl_vae.evaluation.marginal_likelihood.importance import (
    log_likelihood as estimate_log_likelihood,
)
from ppl_vae.evaluation.marginal_likelihood.reliability import LARGEST_TAIL_INDEX
from ppl_vae.interop.draws import Arrays, PairDraws, pair_draws
from ppl_vae.interop.labelled import ABOUT, Groups, grouped, labelled_tree, labels_of, pointwise
from ppl_vae.lineage.metrics import is_per_datum
from ppl_vae.lineage.run import Lineage
from ppl_vae.lineage.stages import STAGES

ArvizData: TypeAlias = Any
"""``arviz.InferenceData`` where ArviZ 0.x is installed, ``xarray.DataTree`` where 1.x is."""

LINEAGE_CHAINS = 4
LARGEST_GROUP = 2**21
"""Numbers that a group of :func:`lineage_to_arviz` may hold."""


def to_arviz(
    model: ProgramLike,
    guide: ProgramLike,
    x: ArrayLike,
    *,
    num_samples: int = 1000,
    num_chains: int = 4,
    mask: ArrayLike | None = None,
    rows: ArrayLike | None = None,
    columns: Iterable[Any] | None = None,
    row_names: Iterable[Any] | None = None,
    log_likelihood: LogLikelihood | ArrayLike | None = None,
    seed: int | None = None,
) -> ArvizData:
    """Draws of a pair for ArviZ.

    ====================  =============================  =========================================
    posterior             chain, draw, datum, z_dim_0    latent sites, drawn from the guide
    posterior_predictive  chain, draw, datum, column     a draw of x, missing values imputed
    prior_predictive      chain, draw, column            one datum per draw
    observed_data         datum, column                  x, NaN where missing
    log_likelihood        chain (1), draw (1), datum     the *marginal* log p(x_n), nothing else
    sample_stats          chain, draw, datum             ``lp`` = log p(x, z), ``log_weight`` =
                                                         log p(x, z) - log q(z | x)
    ====================  =============================  =========================================

    Densities are in nats. The predictive draws are S B D numbers: of large data choose ``rows``.

    Args:
        model, guide: any pair under the contract; run in evaluation mode.
        x: the whole data, (N, D); rows are looked up by their place in it.
        num_samples: draws per datum, S, in all chains together.
        num_chains: into which the draws, all of them independent, are parted.
        mask: True where x is observed; NaN in x says the same.
        rows: look at these rows of x only, (B,); by default at all.
        columns: names of x's columns; by default those of a DataFrame, or numbers.
        row_names: names of all of x's rows; by default those of a DataFrame, or numbers.
        log_likelihood: log p(x_n) of the rows looked at, (B,): an estimate, or numbers taken as
            exact. By default estimated from ``num_samples`` draws of the guide.
        seed: of the draws.

    Raises:
        ValueError: if num_samples is no multiple of num_chains; rows that are not there; too few
            names or values; what :func:`ppl_vae.interop.draws.pair_draws` refuses.
    """
    _check_chains(num_samples, num_chains)
    if hasattr(x, "columns"):  # a pandas DataFrame
        columns = x.columns if columns is None else columns
        row_names = x.index if row_names is None else row_names
    data, seen = as_data_and_mask(x, mask, model=model, guide=guide)
    chosen = _chosen(rows, len(data))
    labels = {
        "datum": labels_of("row_names", row_names, len(data))[chosen.numpy()],
        "column": labels_of("columns", columns, data.shape[1]),
    }
    chosen = chosen.to(data.device)
    told: dict[str, Any] = {"mask": seen, "rows": chosen, "seed": seed}
    if log_likelihood is None:
        log_likelihood = estimate_log_likelihood(model, guide, data, num_samples, **told)
    log_p = _as_estimate(log_likelihood, len(chosen))
    draws = pair_draws(model, guide, data, num_samples=num_samples, **told)
    groups = grouped(draws, num_chains, data.shape[1])
    names = list(groups["observed_data"])
    groups["log_likelihood"] = {names[0] if len(names) == 1 else "log_p": pointwise(log_p)}
    return _as_installed(labelled_tree(groups, labels, {}))


def _check_chains(num_samples: int, num_chains: int) -> None:
    if check_int("num_samples", num_samples) % check_int("num_chains", num_chains):
        raise ValueError(
            f"num_samples must be a multiple of num_chains; got {num_samples} and {num_chains}"
        )


def _chosen(rows: ArrayLike | None, num_data: int) -> Int[Tensor, " B"]:
    chosen = torch.arange(num_data) if rows is None else _tensor(rows)
    whole = not (chosen.is_floating_point() or chosen.dtype == torch.bool)
    if chosen.dim() != 1 or not len(chosen) or not whole:
        raise ValueError(f"rows must be a list of row numbers of x; got {rows!r}")
    if chosen.min() < 0 or chosen.max() >= num_data:
        raise ValueError(
            f"rows must lie in 0..{num_data - 1}; they go from {chosen.min()} to {chosen.max()}"
        )
    return chosen


def _tensor(values: ArrayLike) -> Tensor:
    values = values if isinstance(values, Tensor) else torch.tensor(np.asarray(values))
    return values.detach().cpu()


def _as_estimate(value: LogLikelihood | ArrayLike, num_data: int) -> LogLikelihood:
    estimate = value if isinstance(value, LogLikelihood) else None
    values = _tensor(value) if estimate is None else estimate.value
    if values.shape != (num_data,):
        raise ValueError(
            f"log_likelihood must hold one value for each of the {num_data} rows; "
            f"its shape is {tuple(values.shape)}"
        )
    return estimate or exact_result(values)


def lineage_to_arviz(
    lineage: Lineage, *, num_data: int = 8, num_samples: int = 400, seed: int = 0
) -> ArvizData:
    """A climbed lineage for ArviZ: the groups of :func:`to_arviz`, with a variable a stage.

    ``posterior["vae"]``, ``posterior_predictive["vae"]``, ``sample_stats["lp vae"]``; the sites of
    a pair that has several are told apart, ``posterior["mine z1"]``. Draws are made for the first
    held-out rows; log_likelihood has all that were scored. Data and densities are in the data's
    units. Stages whose guide has a q for training rows only have no draws; the attribute
    ``left_out`` names them.

    Args:
        lineage: of :func:`ppl_vae.lineage.run.run_lineage`.
        num_data: held-out rows to draw for; fewer, and then fewer draws, where a group would hold
            more than 2^21 numbers.
        num_samples: draws per datum, in four chains.
        seed: of the draws; each stage's start from it anew.

    Raises:
        ValueError: if the lineage was read from a file, which holds no pairs; if num_samples is
            no multiple of four.
    """
    check_int("num_data", num_data)
    _check_chains(num_samples, LINEAGE_CHAINS)
    if lineage.data is None:
        raise ValueError("this lineage has no pairs to draw from; was it read from a file?")
    drawable = [name for name, pair in lineage.pairs.items() if not is_per_datum(pair[1])]
    single = sum(_rung_draws(lineage, name, 1, 1, seed).numbers for name in drawable)
    most = LARGEST_GROUP // max(single, 1)
    num_samples = max(LINEAGE_CHAINS, min(num_samples, most - most % LINEAGE_CHAINS))
    num_data = max(1, min(num_data, most // num_samples))
    width = lineage.data.test.shape[1]
    groups: Groups = {group: {} for group in ABOUT}
    for name in drawable:
        draws = _rung_draws(lineage, name, num_data, num_samples, seed)
        for group, variables in grouped(draws, LINEAGE_CHAINS, width, name).items():
            groups[group] |= variables
    scored = {row.stage: row.held_out for row in lineage.rows if row.held_out is not None}
    groups["log_likelihood"] = {name: pointwise(value) for name, value in scored.items()}
    labels = {
        "datum": lineage.data.test_rows.numpy(),
        "column": labels_of("columns", lineage.about.get("columns"), width),
    }
    return _as_installed(labelled_tree(groups, labels, {"left_out": _left_out(lineage)}))


def _left_out(lineage: Lineage) -> str:
    names = [name for name, pair in lineage.pairs.items() if is_per_datum(pair[1])]
    if not names:
        return "nothing"
    return f"{', '.join(names)}: no draws, since the guide has a q for training rows only"


def _rung_draws(
    lineage: Lineage, name: str, num_data: int, num_samples: int, seed: int
) -> PairDraws:
    """Draws of a stage for the first held-out rows, data and densities in the data's units."""
    assert lineage.data is not None and lineage.units is not None
    (model, guide), units = lineage.pairs[name], lineage.units
    x = lineage.data.test[:num_data]
    inner, mask = as_data_and_mask(
        units.apply(x) if name in STAGES else x, model=model, guide=guide
    )
    rows = torch.arange(len(x), device=inner.device)
    draws = pair_draws(
        model, guide, inner, num_samples=num_samples, mask=mask, rows=rows, seed=seed
    )
    if name not in STAGES:
        return draws

    def back(arrays: Arrays) -> Arrays:
        return {k: units.undo(torch.from_numpy(v)).numpy() for k, v in arrays.items()}

    shift = units.log_jacobian(x).numpy()
    return replace(
        draws,
        predictive=back(draws.predictive),
        prior_predictive=back(draws.prior_predictive),
        observed={site: x.numpy() for site in draws.observed},
        log_weight=draws.log_weight + shift,
        log_joint=draws.log_joint + shift,
    )


def elpd(value: LogLikelihood | ArrayLike) -> ElpdData:
    """Held-out log p(x_n) of a model as ArviZ's ``ELPDData``, for its compare and plot_compare.

    ``az.compare({"a": elpd(a), "b": elpd(b)})`` ranks by the sum over the same data. No parameter
    has seen these, so there is no number of effective parameters to take off: ``p`` is NaN. Where
    ArviZ must be told of an estimator it is told "loo", although nothing was left out. Unreliable
    estimates raise its flag ``warning``. The pooled tail index comes as ``pareto_k`` (infinite
    where an estimate is unreliable and has none, 0 where it is reliable and needs none), the
    largest of its limits as ``good_k``. ArviZ's default weights (stacking) are lost where log p
    leaves +-700 nats per datum, whose exponential no number
    holds; ask it for ``method="pseudo-BMA"`` there.

    Args:
        value: log p(x_n) in nats, (N,), an estimate or numbers taken as exact.

    Raises:
        ValueError: what :func:`ppl_vae.evaluation.marginal_likelihood.compare.compare` refuses.
    """
    values = compare({"elpd": value}).pointwise[0]
    if not isinstance(value, LogLikelihood) or value.method == "exact":
        return elpd_data(values, warning=False)
    index = value.k_hat if value.tail_index is None else value.tail_index
    unknown = torch.where(value.reliable, 0.0, math.inf).double()
    return elpd_data(
        values,
        warning=not bool(value.reliable.all()),
        num_samples=value.num_samples,
        good_k=LARGEST_TAIL_INDEX if value.limit is None else float(value.limit.max()),
        pareto_k=index.double().where(~index.isnan(), unknown),
    )


def compare_elpds(comparison: Comparison) -> dict[str, ElpdData]:
    """The models of a comparison for ``az.compare``, as :func:`elpd` gives them, without k-hat."""
    flags = (comparison.reliable < 1).tolist()
    rows = zip(comparison.names, comparison.pointwise, flags, strict=True)
    return {name: elpd_data(values, warning=flag) for name, values, flag in rows}


def write_netcdf(data: ArvizData, path: str | Path) -> None:
    """Write what :func:`to_arviz` gave to a file, which is complete or not there.

    ArviZ's own ``from_netcdf`` reads it too.
    """
    with whole_file(Path(path)) as partial:
        data.to_netcdf(str(partial), engine="h5netcdf")


def read_netcdf(path: str | Path) -> ArvizData:
    """Read a file of :func:`write_netcdf`, in the form of the installed ArviZ, all into memory.

    Raises:
        FileNotFoundError: if it is not there.
        OSError: if it is no netCDF file.
    """
    with xr.open_datatree(str(path), engine="h5netcdf") as tree:
        return _as_installed(tree.load())


def _as_installed(tree: xr.DataTree) -> ArvizData:
    convert = getattr(installed_arviz(), "from_datatree", None)  # ArviZ 1.x works on trees
    return tree if convert is None else convert(tree)
