"""Pointwise held-out log-likelihoods as ArviZ's ``ELPDData``, and ArviZ's stacking weights."""

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.installed_arviz import installed_arviz

ElpdData: TypeAlias = Any
"""The class ``ELPDData`` of the installed ArviZ."""


def stacking_weights(names: Sequence[str], pointwise: Float[Tensor, "M N"]) -> Float[Tensor, " M"]:
    """Weights of the mixture of models under which held-out data are most probable, by ArviZ.

    The weights w >= 0, sum w = 1, maximize sum_n log sum_m w_m p_m(x_n). They measure what each
    model adds to the others, while a ranking compares single models.

    Args:
        names: the names of the models.
        pointwise: log p of each datum under each model, in nats.

    References:
        Yao, Vehtari, Simpson, Gelman: Using stacking to average Bayesian predictive distributions
        (2018).
    """
    if len(names) == 1:
        return torch.ones(1, dtype=pointwise.dtype)
    # A term that all models share changes no weight, and might overflow in exp.
    rows = zip(names, pointwise - pointwise.amax(0), strict=True)
    compared, models = installed_arviz().compare, {n: elpd_data(v, warning=False) for n, v in rows}
    exact = {"round_to": "none"} if "round_to" in inspect.signature(compared).parameters else {}
    with warnings.catch_warnings():
        # ArviZ uses features that pandas deprecates; the caller cannot change that.
        warnings.simplefilter("ignore")
        table = compared(models, method="stacking", **exact)
    return torch.tensor([float(table.loc[n, "weight"]) for n in names], dtype=pointwise.dtype)


def elpd_data(
    values: Float[Tensor, " N"],
    *,
    warning: bool,
    num_samples: int = 0,
    good_k: float = 0.7,
    pareto_k: Float[Tensor, " N"] | None = None,
) -> ElpdData:
    """log p(x_n) of a model as ``ELPDData`` of the installed ArviZ.

    Args:
        values: log p(x_n), in nats.
        warning: whether ArviZ should warn that the values are unreliable.
        num_samples: the number of draws of the estimates; 0 for exact values.
        good_k: the largest k-hat with which estimates are reliable.
        pareto_k: k-hat of each datum.
    """
    import pandas as pd
    import xarray as xr

    elpd_class = installed_arviz().ELPDData
    # Names of ArviZ 1.x; 0.x has a pandas Series with other names.
    content: dict[str, Any] = {
        "elpd": float(values.sum()),
        "se": math.sqrt(len(values) * float(values.var(correction=0))),
        "p": math.nan,
        "n_samples": num_samples,
        "n_data_points": len(values),
        "warning": warning,
        "elpd_i": xr.DataArray(values.numpy(force=True), dims=("datum",)),
        "scale": "log",
        "good_k": good_k,
    }
    if pareto_k is not None:
        content["pareto_k"] = xr.DataArray(pareto_k.numpy(force=True), dims=("datum",))
    if issubclass(elpd_class, pd.Series):
        old = {"elpd": "elpd_loo", "p": "p_loo", "elpd_i": "loo_i"}
        return elpd_class(list(content.values()), index=[old.get(name, name) for name in content])
    if "kind" in inspect.signature(elpd_class).parameters:
        return elpd_class(kind="loo", **content)
    return elpd_class(**content)
