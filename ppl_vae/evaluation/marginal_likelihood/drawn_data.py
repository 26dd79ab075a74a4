"""Data drawn from a model together with the latent variables that generated them."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.introspection import filter_kwargs
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.traces import PairTraces, Site, by_draw_and_datum, data_sites, global_sites
from ppl_vae.evaluation.marginal_likelihood.importance import prior_guide


def draw_batch(model: ProgramLike, template: Batch, purpose: str) -> tuple[Batch, Trace]:
    """A batch drawn from the model, and the trace that holds all values of the draw.

    Args:
        model: a program under the contract. Global sites that are observed keep their values.
        template: a batch of which the number of rows and of columns and the mask are used.
        purpose: what needs the draw, as the subject of a sentence.

    Raises:
        ValueError: if the model has factors, or does not observe the columns of x in their order.
    """
    run = Pair(model, prior_guide(model)).run(template)
    _check_observes_x(run, template, purpose)
    names = list(data_sites(run))
    fixed = {n: s["value"] for n, s in global_sites(run.model).items() if s["is_observed"]}
    drawing = poutine.condition(poutine.uncondition(model), data=fixed)
    trace: Any = poutine.trace(drawing).get_trace(
        template.x, **filter_kwargs(model, template.keywords)
    )
    x = _columns(run, [trace.nodes[name] for name in names]).to(template.x)
    if template.mask is not None:
        x = torch.where(template.mask, x, 0.0)
    return replace(template, x=x), trace


def _columns(run: PairTraces, observed: Iterable[Site]) -> Float[Tensor, "B D"]:
    values = [by_draw_and_datum(run, site, site["value"])[0] for site in observed]
    return torch.cat([value.reshape(len(value), -1) for value in values], -1)


def _check_observes_x(run: PairTraces, batch: Batch, purpose: str) -> None:
    found = data_sites(run)
    if factors := sorted(run.observed.keys() - found.keys()):
        raise ValueError(
            f"the model has factors, {factors}, so data drawn site by site are not drawn from its "
            f"density; {purpose} needs a model of distributions alone"
        )
    values = _columns(run, found.values())
    same = values.shape == batch.x.shape and torch.isclose(values.to(batch.x), batch.x, rtol=1e-3)
    if not bool(torch.as_tensor(same if batch.mask is None else same | ~batch.mask).all()):
        raise ValueError(
            f"sites {list(found)} of the model do not observe the columns of x in their order, so "
            f"data drawn at these sites cannot be arranged as x; {purpose} needs a model that "
            "observes x itself"
        )
