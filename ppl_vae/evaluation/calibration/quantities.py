"""Test quantities of simulation-based calibration: functions of draws and of the data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.introspection import bound_object
from ppl_vae.core.program import ProgramLike
from ppl_vae.evaluation.calibration.simulation import SiteDraws
from ppl_vae.inference.mcmc.invariants import covariance
from ppl_vae.models.bayesian_ppca import BayesianPPCA, ParameterDraws
from ppl_vae.models.linear.integrated_likelihood import integrated_log_likelihood
from ppl_vae.models.linear.table_statistics import TableStatistics

Quantity: TypeAlias = Callable[[SiteDraws, Tensor], Tensor]
"""A function of draws and of the data x, (N, D); it returns a value for each draw, (S, ...)."""
PARAMETERS = ("loadings", "loc", "noise_scale")


class Evaluated(NamedTuple):
    """Elements of test quantities.

    Attributes:
        values: (S, B, E), with B the simulations.
        names: the names of the elements.
    """

    values: Float[Tensor, "S B E"]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Quantities:
    """The test quantities of one calibration.

    Attributes:
        model: the model.
        given: quantities in place of the default ones.
        each_datum: whether each datum is a simulation of its own, or the whole data are one.
    """

    model: ProgramLike
    given: Mapping[str, Quantity] | None
    each_datum: bool

    def __call__(
        self,
        draws: SiteDraws,
        x: Float[Tensor, "N D"],
        local: set[str],
        log_joint: Callable[[], Tensor | None],
    ) -> Evaluated:
        """The quantities of draws.

        Args:
            draws: the draws of the latent sites.
            x: the data.
            local: the names of the sites of each datum.
            log_joint: computes log p(x, draws), (S,) or (S, B); None where it is not known.

        Raises:
            FloatingPointError: if a value is NaN.
        """
        if self.given is not None:
            found = {name: function(draws, x) for name, function in self.given.items()}
        elif self.is_ppca(draws):
            found = ppca_quantities(draws, x)
        else:
            found = draws if self.each_datum else _of_first_datum(draws, local)
            density = log_joint()
            found = found if density is None else found | {"log_joint": density}
        return self._elements(found)

    def is_ppca(self, draws: Mapping[str, Tensor]) -> bool:
        """Whether draws are those of the parameters of :class:`BayesianPPCA`."""
        return isinstance(bound_object(self.model), BayesianPPCA) and set(PARAMETERS) <= {*draws}

    def _elements(self, found: Mapping[str, Tensor]) -> Evaluated:
        first = 2 if self.each_datum else 1
        parts, names = [], []
        for name, value in found.items():
            if bool(value.isnan().any()):
                raise FloatingPointError(
                    f"the test quantity {name!r} is NaN; are the draws and the density finite?"
                )
            batch = value.shape[:2] if self.each_datum else (len(value), 1)
            parts.append(value.reshape(*batch, -1).double())
            places = np.ndindex(*value.shape[first:])
            names += [name + (str(list(place)) if place else "") for place in places]
        return Evaluated(torch.cat(parts, -1), tuple(names))


def _of_first_datum(draws: SiteDraws, local: set[str]) -> SiteDraws:
    # One datum stands for all values of a local site, since all data are alike.
    return {
        (f"{n}[0]" if n in local else n): v[:, 0] if n in local else v for n, v in draws.items()
    }


def ppca_quantities(draws: SiteDraws, x: Float[Tensor, "N D"]) -> dict[str, Tensor]:
    """Quantities of Bayesian PPCA that rotations of the latent space leave as they are.

    These are mu, sigma, the elements of W W' + Psi, the relevances in increasing order, and
    log p(x | parameters), z integrated out, which depends on the data.
    """
    loadings, loc, noise_scale = (draws[name].double() for name in PARAMETERS)
    relevance = draws.get("relevance")
    whole = covariance(ParameterDraws(loadings, loc, noise_scale, None))
    lower = torch.tril_indices(*whole.shape[-2:]).T.tolist()
    found = {"loc": loc, "noise_scale": noise_scale}
    found |= {f"covariance[{i}, {j}]": whole[..., i, j] for i, j in lower}
    if relevance is not None:
        found["sorted_relevance"] = relevance.sort(-1).values
    statistics = TableStatistics.of(x.double())
    log_p = integrated_log_likelihood(statistics, loadings, loc, noise_scale)
    return found | {"log_likelihood": log_p}
