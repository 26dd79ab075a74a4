"""Export of pairs, lineages and comparisons to ArviZ: ``InferenceData`` (0.x), ``DataTree`` (1.x).

Data are indexed by the dimension ``datum`` and their columns by ``column``; a latent site z has
the dimensions ``z_dim_0``, ..., the default names of ArviZ. A "/" in the name of a site, which a
tree does not allow, is replaced by ".". ArviZ is imported only when it is used, because the import
is slow.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from ppl_vae.core.arrays.inputs import labels_of
from ppl_vae.core.files import atomic_file
from ppl_vae.core.installed_arviz import ArvizData, as_installed
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.validation import ArrayLike, as_vector, check_int
from ppl_vae.evaluation.marginal_likelihood.compare import Comparison, compare
from ppl_vae.evaluation.marginal_likelihood.coverage import MAX_TAIL_INDEX
from ppl_vae.evaluation.marginal_likelihood.elpd import ElpdData, elpd_data
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood, exact_result
from ppl_vae.evaluation.marginal_likelihood.importance import (
    log_likelihood as estimate_log_likelihood,
)
from ppl_vae.interop.draws import Arrays, PairDraws, pair_draws
from ppl_vae.interop.labelled import (
    GROUP_ATTRS,
    Groups,
    coordinate,
    grouped,
    labelled_tree,
    pointwise,
)
from ppl_vae.lineage.metrics import has_parameters_per_row
from ppl_vae.lineage.result import Lineage
from ppl_vae.lineage.stages import STAGES

LINEAGE_CHAINS = 4
MAX_GROUP_SIZE = 2**21
"""The largest number of values in a group of :func:`lineage_to_arviz`."""


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
    """Export draws of a pair to ArviZ.

    ====================  =============================  =========================================
    posterior             chain, draw, datum, z_dim_0    latent sites, drawn from the guide; those
                                                         that all data share without ``datum``
    posterior_predictive  chain, draw, datum, column     a draw of x for each draw of z, with
                                                         missing values drawn too
    prior_predictive      chain, draw, column            one datum per draw
    observed_data         datum, column                  x, NaN where missing
    log_likelihood        chain (1), draw (1), datum     the *marginal* log p(x_n) only
    sample_stats          chain, draw, datum             ``lp`` = log p(x, z), ``log_weight`` =
                                                         log p(x, z) - log q(z | x)
    ====================  =============================  =========================================

    Log densities are in nats. With global latent variables theta those of ``sample_stats`` are
    given theta, ``global_log_weight`` = log p(theta) - log q(theta), (chain, draw), and
    ``log_likelihood`` is the posterior predictive density. The predictive draws are S x B x D
    values: for large data choose ``rows``.

    Args:
        model, guide: any pair under the contract; run in evaluation mode.
        x: the whole data set, (N, D); a guide with per-datum parameters finds rows by position.
        num_samples: draws per datum, S, over all chains.
        num_chains: number of chains among which the independent draws are divided.
        mask: True where x is observed; NaN in x is equivalent.
        rows: indices of the rows of x to export, (B,); by default all.
        columns: names of the columns of x; by default those of a DataFrame, or integers.
        row_names: names of all rows of x; by default those of a DataFrame, or integers.
        log_likelihood: log p(x_n) of the exported rows, (B,): an estimate, or values that are
            taken as exact. By default it is estimated from ``num_samples`` draws of the guide.
        seed: seed of the draws.

    Raises:
        ValueError: if num_samples is not a multiple of num_chains; if rows are out of range; if
            the number of names or values is wrong; if the model observes nothing; as
            :func:`ppl_vae.core.traces.check_pair`.
    """
    _check_chains(num_samples, num_chains)
    pair, named = Pair(model, guide), labels_of(x, model)
    columns = named.columns if columns is None else columns
    row_names = named.row_names if row_names is None else row_names
    data = pair.observe(x, mask)
    index = _row_index(rows, len(data))
    labels = {
        "datum": coordinate("row_names", row_names, len(data))[index.numpy(force=True)],
        "column": coordinate("columns", columns, data.x.shape[1]),
    }
    index = index.to(data.x.device)
    if log_likelihood is None:
        log_likelihood = estimate_log_likelihood(
            model, guide, data.x, num_samples, mask=data.mask, rows=index, seed=seed
        )
    log_p = _as_estimate(log_likelihood, len(index))
    draws = pair_draws(pair, data, index, num_samples, seed=seed)
    groups = grouped(draws, num_chains, data.x.shape[1])
    names = list(groups["observed_data"])
    groups["log_likelihood"] = {names[0] if len(names) == 1 else "log_p": pointwise(log_p)}
    return as_installed(labelled_tree(groups, labels, {}))


def _check_chains(num_samples: int, num_chains: int) -> None:
    if check_int("num_samples", num_samples) % check_int("num_chains", num_chains):
        raise ValueError(
            f"num_samples must be a multiple of num_chains; got {num_samples} and {num_chains}"
        )


def _row_index(rows: ArrayLike | None, num_data: int) -> Int[Tensor, " B"]:
    index = torch.arange(num_data) if rows is None else _tensor(rows)
    is_integer = not (index.is_floating_point() or index.dtype == torch.bool)
    if index.dim() != 1 or not len(index) or not is_integer:
        raise ValueError(f"rows must be a list of row indices of x; got {rows!r}")
    if index.min() < 0 or index.max() >= num_data:
        raise ValueError(
            f"rows must lie in 0..{num_data - 1}; they range from {index.min()} to {index.max()}"
        )
    return index


def _tensor(values: ArrayLike) -> Tensor:
    return as_vector(values, name="log_likelihood").cpu()


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
    """Export a lineage to ArviZ: the groups of :func:`to_arviz`, with one variable per stage.

    The variables are ``posterior["vae"]``, ``posterior_predictive["vae"]``,
    ``sample_stats["lp vae"]``, ...; a pair with several sites has one variable for each, such as
    ``posterior["mine z1"]``. Draws are made for the first held-out rows; ``log_likelihood``
    contains all evaluated rows. Data and densities are in the units of the data. Stages whose
    guide has per-datum parameters for training rows only have no draws; the attribute ``left_out``
    names them.

    Args:
        lineage: the result of :func:`ppl_vae.lineage.run.run_lineage`.
        num_data: number of held-out rows to draw for; it is reduced, and then the number of draws,
            if a group would contain more than 2^21 values.
        num_samples: draws per datum, in four chains.
        seed: seed of the draws of each stage.

    Raises:
        ValueError: if the lineage was read from a file, which contains no pairs; if num_samples is
            not a multiple of four.
    """
    check_int("num_data", num_data)
    _check_chains(num_samples, LINEAGE_CHAINS)
    if lineage.data is None:
        raise ValueError("this lineage has no pairs to draw from; was it read from a file?")
    drawable = [
        name for name, pair in lineage.pairs.items() if not has_parameters_per_row(pair[1])
    ]
    single = sum(_stage_draws(lineage, name, 1, 1, seed).size for name in drawable)
    limit = MAX_GROUP_SIZE // max(single, 1)
    num_samples = max(LINEAGE_CHAINS, min(num_samples, limit - limit % LINEAGE_CHAINS))
    num_data = max(1, min(num_data, limit // num_samples))
    width = lineage.data.test.shape[1]
    groups: Groups = {group: {} for group in GROUP_ATTRS}
    for name in drawable:
        draws = _stage_draws(lineage, name, num_data, num_samples, seed)
        for group, variables in grouped(draws, LINEAGE_CHAINS, width, name).items():
            groups[group] |= variables
    estimates = {row.stage: row.held_out for row in lineage.rows if row.held_out is not None}
    groups["log_likelihood"] = {name: pointwise(value) for name, value in estimates.items()}
    labels = {
        "datum": lineage.data.test_rows.numpy(force=True),
        "column": coordinate("columns", lineage.about.get("columns"), width),
    }
    return as_installed(labelled_tree(groups, labels, {"left_out": _left_out(lineage)}))


def _left_out(lineage: Lineage) -> str:
    reasons = {
        "no draws, because the guide has per-datum parameters for training rows only": [
            name for name, pair in lineage.pairs.items() if has_parameters_per_row(pair[1])
        ],
        "draws of the parameters are in the lineage's samples": [
            row.stage for row in lineage.rows if row.posterior is not None
        ],
    }
    found = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items() if names]
    return "; ".join(found) or "nothing"


def _stage_draws(
    lineage: Lineage, name: str, num_data: int, num_samples: int, seed: int
) -> PairDraws:
    """Draws of a stage for the first held-out rows, in the units of the data."""
    assert lineage.data is not None and lineage.units is not None
    pair, units = Pair(*lineage.pairs[name]), lineage.units
    x = lineage.data.test[:num_data]
    data = pair.observe(units.apply(x) if name in STAGES else x)
    draws = pair_draws(pair, data, torch.arange(len(x)), num_samples, seed=seed)
    if name not in STAGES:
        return draws

    def in_data_units(arrays: Arrays) -> Arrays:
        return {k: units.undo(torch.from_numpy(v)).numpy(force=True) for k, v in arrays.items()}

    shift = units.log_jacobian(x).numpy(force=True)
    return replace(
        draws,
        predictive=in_data_units(draws.predictive),
        prior_predictive=in_data_units(draws.prior_predictive),
        observed={site: x.numpy(force=True) for site in draws.observed},
        log_weight=draws.log_weight + shift,
        log_joint=draws.log_joint + shift,
    )


def elpd(value: LogLikelihood | ArrayLike) -> ElpdData:
    """Convert held-out log p(x_n) to ArviZ's ``ELPDData``, for its compare and plot_compare.

    ``az.compare({"a": elpd(a), "b": elpd(b)})`` ranks models by the sum over the same data. No
    parameter was fitted to these data, so there is no effective number of parameters: ``p`` is
    NaN. Where ArviZ requires the name of an estimator it is "loo", although nothing was left out.
    Unreliable estimates set the flag ``warning``. The pooled tail index becomes ``pareto_k``
    (infinite where an estimate is unreliable and has none, 0 where it is reliable and needs none),
    and the largest of its limits becomes ``good_k``. ArviZ's default weights (stacking) overflow
    if log p exceeds 700 nats per datum in size; use ``method="pseudo-BMA"`` then.

    Args:
        value: log p(x_n) in nats, (N,): an estimate, or values that are taken as exact.

    Raises:
        ValueError: as :func:`ppl_vae.evaluation.marginal_likelihood.compare.compare`.
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
        good_k=MAX_TAIL_INDEX if value.limit is None else float(value.limit.max()),
        pareto_k=index.double().where(~index.isnan(), unknown),
    )


def compare_elpds(comparison: Comparison) -> dict[str, ElpdData]:
    """Convert the models of a comparison for ``az.compare``, as :func:`elpd` but without k-hat."""
    warnings = (comparison.reliable < 1).tolist()
    rows = zip(comparison.names, comparison.pointwise, warnings, strict=True)
    return {name: elpd_data(values, warning=warning) for name, values, warning in rows}


def write_netcdf(data: ArvizData, path: str | Path) -> None:
    """Write the result of :func:`to_arviz` to a file, completely or not at all.

    ``arviz.from_netcdf`` reads it too.
    """
    with atomic_file(Path(path)) as partial:
        data.to_netcdf(str(partial), engine="h5netcdf")


def read_netcdf(path: str | Path) -> ArvizData:
    """Read a file of :func:`write_netcdf` into memory, as a type of the installed ArviZ.

    Raises:
        FileNotFoundError: if the file does not exist.
        OSError: if it is not a netCDF file.
    """
    with xr.open_datatree(str(path), engine="h5netcdf") as tree:
        return as_installed(tree.load())
