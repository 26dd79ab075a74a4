"""A pair's draws as labelled groups: what a variable is called, and what lies along its dims."""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any, TypeAlias

import numpy as np
import xarray as xr

from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.interop.draws import Arrays, PairDraws

Groups: TypeAlias = dict[str, dict[str, xr.Variable]]
"""Variables by group and name."""

ABOUT = {
    "posterior": {
        "about": "independent draws of the guide q(z | x), parted into chains; where the guide is "
        "not exact they are no draws of p(z | x): log_weight (sample_stats) re-weights them"
    },
    "posterior_predictive": {"about": "a draw of x given each draw of posterior, noise included"},
    "prior_predictive": {"about": "a datum a draw: x given z, z from its prior, noise included"},
    "observed_data": {"about": "NaN where missing"},
    "log_likelihood": {
        "about": "marginal: log p(x), z integrated out, one value per datum, so no group for loo "
        "or waic; compare held-out values by ppl_vae.interop.arviz.elpd",
        "units": "nats",
    },
    "sample_stats": {
        "about": "lp = log p(x, z), log_weight = log p(x, z) - log q(z | x), a draw and a datum",
        "units": "nats",
    },
}


def labels_of(name: str, given: Iterable[Any] | None, size: int) -> np.ndarray:
    """The coordinate of a dim: whole numbers or strings; without names, 0, 1, ...

    Raises:
        ValueError: if there are not ``size`` names; ``name`` is the argument they came by.
    """
    names = list(range(size) if given is None else given)
    if len(names) != size:
        raise ValueError(f"{name} must hold {size} names; it holds {len(names)}")
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
    """The draws of a pair with named dims, by group and variable.

    Args:
        draws: S a datum.
        num_chains: into which they are parted.
        width: D; observed sites with so many entries per datum have them along ``column``.
        stage: whose draws they are; its variables then bear its name.
    """

    def named(
        arrays: Arrays, lead: tuple[str, ...], entries: int | None = None
    ) -> dict[str, xr.Variable]:
        variables = {}
        for site, values in arrays.items():
            name = _name(site, stage, several=len(arrays) > 1)
            dims = _dims(name, values.shape[len(lead) :], entries)
            variables[name] = xr.Variable((*lead, *dims), values)
        return variables

    def chained(arrays: Arrays) -> Arrays:
        return {k: v.reshape(num_chains, -1, *v.shape[1:]) for k, v in arrays.items()}

    each = ("chain", "draw", "datum")
    stats = chained({"log_weight": draws.log_weight, "lp": draws.log_joint})
    return {
        "posterior": named(chained(draws.latent), each),
        "posterior_predictive": named(chained(draws.predictive), each, width),
        "prior_predictive": named(chained(draws.prior_predictive), each[:2], width),
        "observed_data": named(draws.observed, each[2:], width),
        "sample_stats": {
            f"{name} {_name('', stage)}".strip(): xr.Variable(each, values)
            for name, values in stats.items()
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
    """The groups as an ``xarray.DataTree``, each dim with a coordinate.

    Args:
        groups: variables by group and name.
        labels: the coordinates of some dims, of which a group uses as many as it has data; the
            others are numbered.
        attrs: what else to say of the whole.
    """
    library = {
        "inference_library": "pyro",
        "inference_library_version": version("pyro-ppl"),
        "creation_library": "ppl_vae",
        "creation_library_version": version("ppl_vae"),
    }
    datasets = {}
    for group, variables in groups.items():
        dataset = xr.Dataset(variables, attrs=library | ABOUT[group])
        coords = {
            dim: labels.get(str(dim), np.arange(size))[:size]
            for dim, size in dataset.sizes.items()
        }
        datasets[group] = dataset.assign_coords(coords)
    tree = xr.DataTree.from_dict(datasets)
    tree.attrs = library | dict(attrs)
    return tree
