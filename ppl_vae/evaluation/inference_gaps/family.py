"""The parametric family of a guide's q, and whether its best member can be searched for."""

from dataclasses import dataclass
from typing import Any

import torch
from pyro import distributions as dist
from torch import distributions as td

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair, run_guide
from ppl_vae.core.traces import PairTraces
from ppl_vae.evaluation.local_guides.local_gaussian import can_be_refined
from ppl_vae.evaluation.local_guides.parametrization import (
    Parametrization,
    ParametrizationError,
)
from ppl_vae.guides.families import COVARIANCES
from ppl_vae.objectives.divergences import check_latents

"""Classes of Gaussians, and of exponentials of them, by their covariance."""
DIAGONAL = (dist.Normal, td.Normal, dist.LogNormal, td.LogNormal)
FULL = (dist.MultivariateNormal, td.MultivariateNormal)
LOW_RANK = (dist.LowRankMultivariateNormal, td.LowRankMultivariateNormal)


@dataclass(frozen=True)
class Family:
    """The family among whose members the best q of each datum is searched for.

    Attributes:
        name: a covariance of :mod:`ppl_vae.guides.families`, or the class of the guide's
            distributions.
        unsplit_reason: why log p - ELBO is not split, as a clause; empty where it is split.
        searchable: whether its best member can be searched for.
        gaussian: whether a Gaussian can be initialized at the guide's q, as a proposal for log p.
    """

    name: str
    unsplit_reason: str
    searchable: bool
    gaussian: bool


def family_of(pair: Pair, batch: Batch, requested: str | None = None) -> Family:
    """The family of a pair's guide, or the requested one.

    The guide's own attribute ``covariance`` is used if its q is of that family. Otherwise the
    family is the class of the distributions that it samples from, with parameters that are free
    for each datum.

    Args:
        pair: the pair.
        batch: data on which the guide is run.
        requested: a covariance of :mod:`ppl_vae.guides.families`.
    """
    with pair.dry_run():
        run = pair.run(batch)
        check_latents(run)
        repeated = run_guide(pair.guide, batch)
    found = run.drawn
    gaussian = found.keys() == run.latent.keys() and all(
        can_be_refined(site["fn"]) for site in found.values()
    )
    reason = _unsplit_reason(run, repeated)
    if requested is not None:
        if not reason and not _all_are(requested, run):
            reason = f"the guide's own q is not of the requested family ({requested})"
        return Family(requested, reason, True, gaussian)
    stated = getattr(pair.guide_owner, "covariance", None)
    declared = stated if isinstance(stated, str) else ""
    if not reason and declared in COVARIANCES and _all_are(declared, run):
        return Family(declared, "", True, True)
    kinds = {type(_inner(site["fn"])) for site in found.values()}
    for covariance, classes in (("diagonal", DIAGONAL), ("full", FULL)):
        if not reason and kinds <= set(classes):
            return Family(covariance, "", True, True)
    return Family(_class_names(run), reason, not reason, gaussian)


def _unsplit_reason(run: PairTraces, repeated: PairTraces) -> str:
    """Why no best member can be searched for, from two runs of a guide; empty if it can."""
    found, other = run.drawn, repeated.drawn
    if auxiliary := sorted(found.keys() - run.latent.keys()):
        return f"the guide transforms draws of the auxiliary sites {auxiliary}"
    for name, site in found.items():
        try:
            first, second = (Parametrization.of(s["fn"]) for s in (site, other[name]))
        except ParametrizationError as error:
            return f"the guide's site {name!r} {error}"
        if not _same(first, second):
            return f"the guide's q of site {name!r} depends on its earlier draws"
    return ""


def _same(one: Parametrization, other: Parametrization) -> bool:
    pairs = zip(one.parameters, other.parameters, strict=True)
    return all(torch.allclose(a.start, b.start, rtol=1e-4, atol=1e-5) for a, b in pairs)


def _class_names(run: PairTraces) -> str:
    names = {}
    for site in run.drawn.values():
        try:
            names[Parametrization.of(site["fn"]).name] = None
        except ParametrizationError:
            names[type(_inner(site["fn"])).__name__] = None
    return ", ".join(names)


def _inner(fn: Any) -> Any:
    while isinstance(fn, td.Independent):
        fn = fn.base_dist
    return fn


def _all_are(covariance: str, run: PairTraces) -> bool:
    return all(_is(site["fn"], covariance) for site in run.drawn.values())


def _is(fn: Any, covariance: str) -> bool:
    """Whether a distribution is a Gaussian of a family, or the exponential of one."""
    rank, inner = len(fn.event_shape), _inner(fn)
    if type(inner) in (*FULL, *LOW_RANK):
        return covariance == "full"
    if type(inner) not in DIAGONAL:
        return False
    scale = inner.scale.flatten(inner.scale.dim() - rank) if rank else inner.scale.unsqueeze(-1)
    if covariance == "unit":
        return bool(torch.allclose(scale, torch.ones_like(scale)))
    if covariance == "isotropic":
        return bool(torch.allclose(scale, scale[..., :1].expand_as(scale)))
    return covariance in COVARIANCES
