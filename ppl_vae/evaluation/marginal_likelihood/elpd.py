"""Pointwise held-out log-likelihoods in ArviZ's form, and the stacking weights it gives them."""

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

ElpdData: TypeAlias = Any
"""The installed ArviZ's ``ELPDData``."""


def stacking_weights(names: Sequence[str], pointwise: Float[Tensor, "M N"]) -> Float[Tensor, " M"]:
    """The mixture of the models under which held-out data are most probable, by ArviZ.

    The weights w >= 0, sum w = 1, that maximise sum_n log sum_m w_m p_m(x_n): by how much each
    model is needed beside the others, where ranks say who is best alone.

    Args:
        names: of the models.
        pointwise: log p of each datum by each model, in nats.

    References:
        Yao, Vehtari, Simpson, Gelman: Using stacking to average Bayesian predictive distributions
        (2018).
    """
    if len(names) == 1:
        return torch.ones(1, dtype=pointwise.dtype)
    # What all models have in common moves no weight, and might leave the range of exp.
    rows = zip(names, pointwise - pointwise.amax(0), strict=True)
    compared, models = installed_arviz().compare, {n: elpd_data(v, warning=False) for n, v in rows}
    exact = {"round_to": "none"} if "round_to" in inspect.signature(compared).parameters else {}
    with warnings.catch_warnings():
        # What ArviZ itself does that pandas deprecates is no fault of the caller.
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
    """log p(x_n) of a model in the form of the installed ArviZ.

    Args:
        values: log p(x_n), in nats.
        warning: whether ArviZ is to warn of them.
        num_samples: draws that they were estimated from; 0 where they are exact.
        good_k: up to which k-hat is good.
        pareto_k: k-hat of each datum.
    """
    form = installed_arviz().ELPDData
    # The names of ArviZ 1.x; 0.x has a pandas Series, its names with the estimator in them.
    content: dict[str, Any] = {
        "elpd": float(values.sum()),
        "se": math.sqrt(len(values) * float(values.var(correction=0))),
        "p": math.nan,
        "n_samples": num_samples,
        "n_data_points": len(values),
        "warning": warning,
        "elpd_i": xr.DataArray(values.numpy(), dims=("datum",)),
        "scale": "log",
        "good_k": good_k,
    }
    if pareto_k is not None:
        content["pareto_k"] = xr.DataArray(pareto_k.numpy(), dims=("datum",))
    if issubclass(form, pd.Series):
        old = {"elpd": "elpd_loo", "p": "p_loo", "elpd_i": "loo_i"}
        return form(list(content.values()), index=[old.get(name, name) for name in content])
    told = {"kind": "loo"} if "kind" in inspect.signature(form).parameters else {}
    return form(**told, **content)


def installed_arviz() -> Any:
    """The module, imported when it is asked for, since that takes long."""
    with warnings.catch_warnings():
        # Once a day ArviZ 0.x announces 1.x, for which this module is ready.
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz
