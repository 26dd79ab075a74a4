"""Pyro's automatic guides: which of them can be used, and when.

Log weights are per datum, log w_n = log p(x_n, z_n) - log q(z_n | x_n), with rows given by
``index``. ``AutoNormal``, ``AutoDelta`` and the messengers have one q per datum and can be used;
guides that draw the latent variables of all data as one site cannot. Of global latent variables
any of them can be the guide: ``AutoMultivariateNormal(poutine.block(model, hide=["z"]))``.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from jaxtyping import Int
from pyro import poutine
from pyro.infer.autoguide import (
    AutoCallable,
    AutoContinuous,
    AutoDiscreteParallel,
    AutoGaussian,
    AutoGuide,
    AutoGuideList,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ppl_vae.core.batch import Batch
from ppl_vae.core.introspection import bound_object, filter_kwargs
from ppl_vae.core.program import DATA_PLATE, ProgramLike
from ppl_vae.core.state import dry_run, isolated_store
from ppl_vae.core.traces import plates_of, sites

PER_DATUM_GUIDES = (
    "PerDatumGuide(num_data, latent_dim), with covariance='full' for correlations within a "
    "datum, or AmortizedGuide(encoder, latent_dim)"
)
WITH_PLATES = "create_plates=ppl_vae.core.autoguides.plate_of_rows"


def plate_of_rows(
    x: Tensor,
    *,
    index: Int[Tensor, " B"] | None = None,
    num_data: int | None = None,
    dim: int | None = None,
    **_: Any,
) -> pyro.plate:
    """The plate over the rows that a program is called with, for Pyro's automatic guides:
    ``AutoNormal(model, create_plates=plate_of_rows)`` has one q per datum, in batches, too.

    Args:
        x, index, num_data: the arguments of the model.
        dim: the dimension of the plate, where the model names it (by ``functools.partial``).
    """
    rows = torch.arange(len(x), device=x.device) if index is None else index
    return pyro.plate(DATA_PLATE, num_data or len(x), subsample=rows, dim=dim)


def automatic_guide(guide: ProgramLike) -> AutoGuide | GuideMessenger | None:
    """The automatic guide under a program's Pyro handlers, or None."""
    owner = bound_object(guide)
    return owner if isinstance(owner, AutoGuide | GuideMessenger) else None


def is_per_datum(guide: ProgramLike, batch: Batch) -> bool:
    """Whether a guide is automatic and has parameters for each row of its training data.

    Args:
        guide: a guide of a pair.
        batch: rows on which it can be run.
    """
    owner = automatic_guide(guide)
    if isinstance(owner, GuideMessenger):
        known = type(owner).__module__ == AutoNormalMessenger.__module__
        if not known or DATA_PLATE in getattr(owner, "amortized_plates", ()):
            return False
    if owner is None:
        return False
    return any(_draws_local_sites(part, batch) for part in _parts(owner))


def check_automatic(guide: ProgramLike, batch: Batch, repeats: int = 1) -> None:
    """Check that an automatic guide has one q per datum, for these rows.

    Args:
        guide: a guide of a pair; one that is not automatic is accepted.
        batch: the rows, each of them once.
        repeats: the number of copies of each row.

    Raises:
        ValueError: naming the guide and the way out.
    """
    owner = automatic_guide(guide)
    if owner is None:
        return
    for part in _parts(owner):
        _check_not_joint(part, batch)
    check_automatic_batch(guide, batch)
    _check_number(owner, batch, repeats)


def check_parts_not_joint(modules: Sequence[nn.Module], batch: Batch) -> None:
    """Check that automatic guides that another guide calls do not draw all data as one site.

    Args:
        modules: the modules of the guide, which has run.
        batch: the rows.

    Raises:
        ValueError: naming the automatic guide and the way out.
    """
    for part in (part for module in modules for part in module.modules()):
        if isinstance(part, AutoGuide) and part.prototype_trace is not None:
            _check_not_joint(part, batch)


def check_automatic_batch(guide: ProgramLike, batch: Batch) -> None:
    """Check that an automatic guide selects the parameters of a batch's rows, if it is run on one.

    Args:
        guide: a guide of a pair; one that is not automatic is accepted.
        batch: the rows; with ``index`` they are a part of the data.

    Raises:
        ValueError: naming the guide and the way out.
    """
    owner = automatic_guide(guide)
    if owner is None or batch.index is None or not is_per_datum(guide, batch):
        return
    for part in _parts(owner):
        if isinstance(part, AutoContinuous | AutoGaussian | AutoStructured | AutoDiscreteParallel):
            raise ValueError(
                f"{_name(part)} cannot be used in batches: its parameters are those of one batch, "
                "and it would use them for the rows of every other batch. Train on all rows at "
                f"once, or use {_instead(part, batches=True)}"
            )
    passed = filter_kwargs(owner.model, {"index": 0, "num_data": 0})
    if missing := {"index", "num_data"} - passed.keys():
        raise ValueError(
            f"{_name(owner)} cannot be used in batches: its model takes no keyword "
            f"{' and no '.join(map(repr, sorted(missing)))}, so it does not know which rows of "
            "the data set a batch holds, and would use the parameters of one batch for all. Let "
            f"the model pass both on to its plate, pyro.plate({DATA_PLATE!r}, num_data, "
            f"subsample=index), train on all rows at once, or use {PER_DATUM_GUIDES}"
        )
    if isinstance(owner, AutoGuide) and owner.create_plates is None:
        raise ValueError(
            f"{_name(owner)} without create_plates subsamples rows of its own instead of a "
            f"batch's, so each q would be trained on other data. Use {_name(owner)}(model, ..., "
            f"{WITH_PLATES}), train on all rows at once, or use {PER_DATUM_GUIDES}"
        )


class RowCheck:
    """The check that a loop of steps gives an automatic guide the rows that its parameters are of.

    Args:
        guide: a guide of a pair; one that is not automatic is accepted.
    """

    def __init__(self, guide: ProgramLike) -> None:
        self.guide = guide
        self._first: Tensor | None = None
        self._is_needed: bool | None = None if automatic_guide(guide) is not None else False

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Check the arguments of a step; those of the first one, which makes the guide's
        parameters, are recorded.

        Raises:
            ValueError: if there is one q per row and the rows are others than in the first step,
                or if the guide cannot be used in batches.
        """
        if self._is_needed is False:
            return
        rows = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if rows is None or self._first is None:
            self._first = None if rows is None else rows.detach().clone()
            return
        batch = Batch.of(rows, {name: v for name, v in kwargs.items() if v is not rows})
        if self._is_needed is None:
            with isolated_store():
                self._is_needed = is_per_datum(self.guide, batch)
        if self._is_needed:
            check_automatic_batch(self.guide, batch)
            if kwargs.get("index") is None and not _same_rows(rows, self._first):
                raise ValueError(self._message())

    def _message(self) -> str:
        name = _name(automatic_guide(self.guide))
        return (
            f"{name} has one q per row of the first step, and this step is called with other "
            "rows, for which it would use the parameters of those. Train on all rows at once; or "
            "state which rows a batch holds, step(x[rows], index=rows, num_data=len(x)), if the "
            f"model takes both, with {name}(model, {WITH_PLATES}); or use {PER_DATUM_GUIDES}"
        )


def _same_rows(rows: Tensor, first: Tensor) -> bool:
    if rows.shape != first.shape:
        return False
    return bool(((rows == first) | (rows.isnan() & first.isnan())).all())


def _name(guide: Any) -> str:
    return type(guide).__name__


def _parts(owner: Any) -> Iterator[Any]:
    if isinstance(owner, AutoGuideList):
        for part in owner:
            yield from _parts(part)
    elif not isinstance(owner, AutoCallable):
        yield owner


def _draws_local_sites(part: Any, batch: Batch) -> bool:
    """Whether an automatic guide draws sites inside the plate over data."""
    trace = getattr(part, "prototype_trace", None)
    if trace is None:
        with dry_run(part.model):
            keywords = filter_kwargs(part.model, batch.keywords)
            trace = poutine.trace(part.model).get_trace(batch.x, **keywords)
    found = sites(trace).values()
    return any(DATA_PLATE in plates_of(site) and not site["is_observed"] for site in found)


def _check_not_joint(part: Any, batch: Batch) -> None:
    joint = isinstance(part, AutoContinuous | AutoGaussian)
    if isinstance(part, AutoStructured):
        kinds = part.conditionals
        joint = any(k != "delta" for k in ([kinds] if isinstance(kinds, str) else kinds.values()))
    if joint and _draws_local_sites(part, batch):
        raise ValueError(
            f"{_name(part)} draws the latent variables of all data as one site, outside the plate "
            f"{DATA_PLATE!r}, so there is no q(z | x_n) of one datum and no log weight of it. Use "
            f"{_instead(part)}. (With pyro.infer.Trace_ELBO as objective it can be trained on "
            "all rows at once. It can draw the variables outside the plate: "
            f"{_name(part)}(poutine.block(model, hide=...)) hides the others from it.)"
        )


def _instead(part: Any, *, batches: bool = False) -> str:
    if isinstance(part, AutoDiscreteParallel):
        return "a guide of your own that indexes its probabilities, as probs[index]"
    plates = f", {WITH_PLATES}" if batches else ""
    return f"AutoNormal(model{plates}), which has independent normals, {PER_DATUM_GUIDES}"


def _check_number(owner: Any, batch: Batch, repeats: int) -> None:
    prototype = getattr(owner, "_prototype_frames", None) or {}
    if repeats > 1 and isinstance(owner, AutoGuide):
        raise ValueError(
            f"{_name(owner)} needs a model that can be run for several draws under a plate around "
            "it, and this one cannot (a network that takes 2-d input alone?), so its rows are "
            f"repeated; use {PER_DATUM_GUIDES}, or num_samples=1"
        )
    if DATA_PLATE not in prototype:
        return
    known, given = prototype[DATA_PLATE], batch.num_data or len(batch)
    size = known.full_size or known.size
    if size != given:
        raise ValueError(
            f"{_name(owner)} has one q per datum for the {size} rows of its first run, "
            f"and this run has {given}; for new data use AmortizedGuide(encoder, latent_dim)"
        )


def without_data(guide: ProgramLike) -> ProgramLike:
    """A messenger runs the whole model; the guide is its latent sites."""
    if not isinstance(automatic_guide(guide), GuideMessenger):
        return guide
    hidden: ProgramLike = poutine.block(guide, hide_fn=_is_data)
    return hidden


def _is_data(site: Any) -> bool:
    return site["type"] == "sample" and site["is_observed"] and not site_is_subsample(site)
