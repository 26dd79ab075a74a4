"""Which family a guide's q is of, read off the guide: whether its best member can be sought."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor
from torch import distributions as td

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair, run_guide
from ppl_vae.core.program import ProgramLike, bound_object
from ppl_vae.core.state import dry_run
from ppl_vae.core.traces import PairTraces, sites
from ppl_vae.evaluation.local_guides.distribution_forms import Form, NoForm
from ppl_vae.evaluation.local_guides.local_gaussian import can_be_refined
from ppl_vae.guides.families import COVARIANCES
from ppl_vae.objectives.divergences import check_latents

DIAGONAL = (dist.Normal, td.Normal, dist.LogNormal, td.LogNormal)
FULL = (dist.MultivariateNormal, td.MultivariateNormal)
LOW_RANK = (dist.LowRankMultivariateNormal, td.LowRankMultivariateNormal)


@dataclass(frozen=True)
class Family:
    """The family that the best q of each datum is sought in.

    Attributes:
        name: a covariance of :mod:`ppl_vae.guides.families`, or the class of the guide's
            distributions.
        why: why log p - ELBO is not split by it, as the end of a sentence; empty where it is.
        sought: whether its best member can be sought.
        gaussian: whether a Gaussian can be started at the guide's q, to draw from for log p.
    """

    name: str
    why: str
    sought: bool
    gaussian: bool


def family_of(
    model: ProgramLike,
    guide: ProgramLike,
    x: Tensor,
    keywords: Mapping[str, Any],
    asked: str | None = None,
) -> Family:
    """The family of a guide, or the one asked for.

    What a guide says of itself (``covariance``) is believed if its q is of that family. Else the
    family is the class of the distributions it samples from, with parameters free for each datum.

    Args:
        model, guide: the pair.
        x: a block of data.
        keywords: what the pair is told of it.
        asked: a covariance of :mod:`ppl_vae.guides.families`.
    """
    with dry_run(model, guide):
        run = Pair(model, guide).run(Batch(x, **keywords))
        check_latents(run)
        again = run_guide(guide, Batch(x, **keywords))
    found = sites(run.guide)
    gaussian = found.keys() == run.latent.keys() and all(
        can_be_refined(site["fn"]) for site in found.values()
    )
    why = _unsplit(run, again)
    if asked is not None:
        if not why and not _all_are(asked, run):
            why = f"the guide's own q is not of the family asked for ({asked})"
        return Family(asked, why, True, gaussian)
    stated = getattr(bound_object(guide), "covariance", None)
    declared = stated if isinstance(stated, str) else ""
    if not why and declared in COVARIANCES and _all_are(declared, run):
        return Family(declared, "", True, True)
    kinds = {type(_inner(site["fn"])) for site in found.values()}
    for covariance, classes in (("diagonal", DIAGONAL), ("full", FULL)):
        if not why and kinds <= set(classes):
            return Family(covariance, "", True, True)
    return Family(_named(run), why, not why, gaussian)


def _unsplit(run: PairTraces, again: PairTraces) -> str:
    """Why no best member is sought in the family of a guide that was run twice."""
    found, other = sites(run.guide), sites(again.guide)
    if auxiliary := sorted(found.keys() - run.latent.keys()):
        return f"the guide makes its draws from others, at the auxiliary sites {auxiliary}"
    for name, site in found.items():
        try:
            form, repeated = Form.of(site["fn"]), Form.of(other[name]["fn"])
        except NoForm as error:
            return f"the guide's site {name!r} {error}"
        if not _same(form, repeated):
            return f"the guide's q of site {name!r} depends on what it draws before"
    return ""


def _same(form: Form, other: Form) -> bool:
    pairs = zip(form.parameters, other.parameters, strict=True)
    return all(torch.allclose(a.start, b.start, rtol=1e-4, atol=1e-5) for a, b in pairs)


def _named(run: PairTraces) -> str:
    names = {}
    for site in sites(run.guide).values():
        try:
            names[Form.of(site["fn"]).name] = None
        except NoForm:
            names[type(_inner(site["fn"])).__name__] = None
    return ", ".join(names)


def _inner(fn: Any) -> Any:
    while isinstance(fn, td.Independent):
        fn = fn.base_dist
    return fn


def _all_are(covariance: str, run: PairTraces) -> bool:
    return all(_is(site["fn"], covariance) for site in sites(run.guide).values())


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
