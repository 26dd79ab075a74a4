"""Objectives of Pyro that are equal to objectives of this package."""

from typing import Any

import pyro.infer

from ppl_vae.objectives.bounds import ELBO, IWAE


def as_capturable(objective: Any) -> ELBO | IWAE | None:
    """The objective itself, or for two of Pyro's, whose code reads values, one of equal value.

    ``Trace_ELBO`` and ``TraceMeanField_ELBO`` of a pair under the contract, with reparameterized
    guides, are ELBOs of this package; for any other pair these refuse. None where there is none.
    """
    if isinstance(objective, ELBO | IWAE):
        return objective
    kinds: dict[type, str] = {
        pyro.infer.Trace_ELBO: "sampled",
        pyro.infer.TraceMeanField_ELBO: "auto",
    }
    kind = kinds.get(type(objective))
    return None if kind is None else ELBO(objective.num_particles, kl=kind)
