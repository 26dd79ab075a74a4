"""Which site of a program is not finite, and for which rows of the data."""

from typing import Any

import torch
from jaxtyping import Float
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import constraints

from ppl_vae.core.batch import Batch
from ppl_vae.core.program import DATA_PLATE
from ppl_vae.core.traces import PairTraces, Site, log_prob, plates_of, sites

SHOWN = 5
"""The number of rows that a message names."""
CONSTRAINT_MESSAGE = "to satisfy the constraint"
"""A part of the message with which distributions refuse their parameters."""


def describe_nonfinite(trace: Trace, program: str, batch: Batch) -> str | None:
    """The first site of a trace that is not valid, what is wrong with it, and in which rows.

    Args:
        trace: the trace of a run in which arguments were not checked.
        program: ``"guide"`` or ``"model"``, for the text.
        batch: the rows that it was run on; rows are named by their places in the whole data.

    Returns:
        None if every site is valid.
    """
    for site in sites(trace).values():
        if found := describe_parameters(site, program, batch):
            return found
        if bool((invalid := ~log_prob(site).isfinite()).any()):
            return _text(site, program, "log density that is not finite", invalid, batch)
    return None


def describe_parameters(site: Site, program: str, batch: Batch) -> str | None:
    """The first parameter of a site's distribution that is not valid, and in which rows.

    Args:
        site: whose value need not have been drawn.
        program, batch: as for :func:`describe_nonfinite`.

    Returns:
        None if all are valid.
    """
    for what, invalid in _invalid_parameters(site):
        if bool(invalid.any()):
            return _text(site, program, what, invalid, batch)
    return None


def _text(site: Site, program: str, what: str, invalid: Tensor, batch: Batch) -> str:
    rows = _describe_rows(site, invalid, batch)
    return f"site {site['name']!r} of the {program} has a {what}{rows}"


def describe_nonfinite_pair(run: PairTraces, batch: Batch) -> str | None:
    """:func:`describe_nonfinite` of the guide's trace, or else of the model's."""
    return describe_nonfinite(run.guide, "guide", batch) or describe_nonfinite(
        run.model, "model", batch
    )


def check_no_nan(what: str, values: Float[Tensor, " B"], run: PairTraces, batch: Batch) -> None:
    """Check what was computed from a run for each row of its batch.

    Raises:
        FloatingPointError: if a value is NaN, naming the rows and the site.
    """
    wrong = values.isnan()
    if bool(wrong.any()):
        reason = describe_nonfinite_pair(run, batch) or "every site is finite"
        raise FloatingPointError(f"{what} is NaN in {name_rows(wrong, batch)}: {reason}")


def name_rows(invalid: Tensor, batch: Batch) -> str:
    """The rows of a batch that are marked, by their places in the whole data."""
    places = invalid.nonzero().flatten() % len(invalid)
    if batch.index is not None:
        places = batch.index[places.to(batch.index.device)]
    found = sorted(set(places.tolist()))
    listed = ", ".join(map(str, found[:SHOWN]))
    more = f" and {len(found) - SHOWN} others" if len(found) > SHOWN else ""
    return f"row{'s' if len(found) > 1 else ''} {listed}{more}"


def _invalid_parameters(site: Site) -> Any:
    """Pairs of a text and a tensor that is True where that parameter is not valid."""
    base: Any = site["fn"]
    while hasattr(base, "base_dist"):
        base = base.base_dist
    for name, constraint in getattr(base, "arg_constraints", {}).items():
        value = getattr(base, name, None)
        if not isinstance(value, Tensor) or constraints.is_dependent(constraint):
            continue
        if not constraint.is_discrete:
            invalid = ~constraint.check(value) | _nonfinite(value, constraint.event_dim)
            missing = " that is NaN" if bool(value.isnan().any()) else " out of range"
            shape = torch.broadcast_shapes(invalid.shape, base.batch_shape)
            yield f"parameter {name!r}{missing}", invalid.expand(shape)


def _nonfinite(value: Tensor, event_dim: int) -> Tensor:
    wrong = value.isnan()
    return wrong.flatten(-event_dim).any(-1) if event_dim else wrong


def _describe_rows(site: Site, invalid: Tensor, batch: Batch) -> str:
    """The rows for which an entry is marked; nothing for a site outside the plate over data."""
    plate = plates_of(site).get(DATA_PLATE)
    if plate is None:
        return ""
    # A distribution's own parameters have the dimensions of the event, too, right of the plates.
    dim = plate.dim - (invalid.dim() - len(site["fn"].batch_shape))
    if -dim > invalid.dim():
        return ""
    others = [d for d in range(-invalid.dim(), 0) if d != dim]
    marked = invalid.any(tuple(others)) if others else invalid
    if len(marked) % len(batch):
        return ""
    marked = marked.reshape(-1, len(batch)).any(0)
    if len(marked) > SHOWN and bool(marked.all()):
        return f" in all {len(marked)} rows"
    return f" in {name_rows(marked, batch)}"
