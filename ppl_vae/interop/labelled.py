"""Draws of a pair as labelled groups of variables with named dimensions."""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any, TypeAlias

import numpy as np
import xarray as xr

from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.interop.draws import Arrays, PairDraws

Groups: TypeAlias = dict[str, dict[str, xr.Variable]]
"""Variables by group and name."""

GROUP_ATTRS = {
    "posterior": {
        "about": "independent draws of the guide q(z | x), divided into chains; unless the guide "
        "is exact they are not draws of p(z | x): log_weight (sample_stats) reweights them. "
        "Variables that all data share have no dimension datum"
    },
    "posterior_predictive": {
        "about": "a draw of x given each draw of z in posterior, noise included"
    },
    "prior_predictive": {"about": "one datum per draw: x given z from its prior, noise included"},
    "observed_data": {"about": "NaN where missing"},
    "log_likelihood": {
        "about": "marginal: log p(x) with z integrated out, one value per datum; not suitable for "
        "loo or waic; compare held-out values with ppl_vae.interop.arviz.elpd",
        "units": "nats",
    },
    "sample_stats": {
        "about": "lp = log p(x, z), log_weight = log p(x, z) - log q(z | x), per draw and datum, "
        "given the variables that all data share, whose log p - log q is global_log_weight",
        "units": "nats",
    },
}


def coordinate(argument: str, labels: Iterable[Any] | None, size: int) -> np.ndarray:
    """The coordinate of a dimension: integers or strings; without labels, 0, 1, ...

    Raises:
        ValueError: unless there are ``size`` labels; ``argument`` is the name of the argument.
    """
    names = list(range(size) if labels is None else labels)
    if len(names) != size:
        raise ValueError(f"{argument} must hold {size} names; it holds {len(names)}")
    if all(isinstance(item, int | np.integer) for item in names):
        return np.array(names, dtype=np.int64)
    return np.array([str(item) for item in names])


def pointwise(estimate: LogLikelihood) -> xr.Variable:
    """Estimates of log p(x_n) as a variable of the log_likelihood group."""
    about = {
        "method": estimate.method,
        "num_samples": estimate.num_samples,
        "num_reliable": int(estimate.reliable.sum()),
        "num_data": len(estimate.value),
    }
    value = estimate.value.detach().cpu().numpy()
    return xr.Variable(("chain", "draw", "datum"), value[None, None], about)


def grouped(draws: PairDraws, num_chains: int, width: int, stage: str = "") -> Groups:
    """The draws of a pair with named dimensions, by group and variable.

    Args:
        draws: S draws per datum.
        num_chains: number of chains among which they are divided.
        width: D; an observed site with D entries per datum has the dimension ``column``.
        stage: the name of the stage in a lineage, which then becomes part of variable names.
    """

    def named(
        arrays: Arrays, lead: tuple[str, ...], entries: int | None = None, others: int = 0
    ) -> dict[str, xr.Variable]:
        variables = {}
        for site, values in arrays.items():
            name = _name(site, stage, several=len(arrays) + others > 1)
            dims = _dims(name, values.shape[len(lead) :], entries)
            variables[name] = xr.Variable((*lead, *dims), values)
        return variables

    def chained(arrays: Arrays) -> Arrays:
        return {k: v.reshape(num_chains, -1, *v.shape[1:]) for k, v in arrays.items()}

    each = ("chain", "draw", "datum")
    stats = {"log_weight": draws.log_weight, "lp": draws.log_joint}
    if draws.global_latent:
        stats["global_log_weight"] = draws.global_log_weight
    local, shared = chained(draws.latent), chained(draws.global_latent)
    return {
        "posterior": named(local, each, others=len(shared))
        | named(shared, each[:2], others=len(local)),
        "posterior_predictive": named(chained(draws.predictive), each, width),
        "prior_predictive": named(chained(draws.prior_predictive), each[:2], width),
        "observed_data": named(draws.observed, each[2:], width),
        "sample_stats": {
            f"{name} {_name('', stage)}".strip(): xr.Variable(each[: values.ndim], values)
            for name, values in chained(stats).items()
        },
    }


def _name(site: str, stage: str, *, several: bool = False) -> str:
    name = f"{stage} {site}" if stage and several else stage or site
    return name.replace("/", ".")


def _dims(name: str, shape: tuple[int, ...], width: int | None) -> tuple[str, ...]:
    return (
        ("column",) if shape == (width,) else tuple(f"{name}_dim_{k}" for k in range(len(shape)))
    )


def labelled_tree(
    groups: Groups, labels: Mapping[str, np.ndarray], attrs: Mapping[str, Any]
) -> xr.DataTree:
    """The groups as an ``xarray.DataTree``, with a coordinate for each dimension.

    Args:
        groups: variables by group and name.
        labels: coordinates of some dimensions; a group with fewer data uses the first ones, and
            all other dimensions are numbered.
        attrs: further attributes of the tree.
    """
    library = {
        "inference_library": "pyro",
        "inference_library_version": version("pyro-ppl"),
        "creation_library": "ppl_vae",
        "creation_library_version": version("ppl_vae"),
    }
    datasets = {}
    for group, variables in groups.items():
        dataset = xr.Dataset(variables, attrs=library | GROUP_ATTRS[group])
        coords = {
            dim: labels.get(str(dim), np.arange(size))[:size]
            for dim, size in dataset.sizes.items()
        }
        datasets[group] = dataset.assign_coords(coords)
    tree = xr.DataTree.from_dict(datasets)
    tree.attrs = library | dict(attrs)
    return tree
