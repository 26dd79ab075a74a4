"""Global latent variables: the guide's part that draws them, and pairs in which they are fixed.

Global latent variables theta are sites outside the plate over data: all data share them.
"""

from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vae.core.introspection import filter_kwargs, modules_of
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import DATA_PLATE, Program, ProgramLike
from ppl_vae.core.state import isolated_store, seeded
from ppl_vae.core.traces import PairTraces, global_sites, plates_of
from ppl_vae.core.validation import ArrayLike


def global_part(guide: ProgramLike) -> ProgramLike:
    """The guide as a program of its global sites; its other sites are drawn and hidden."""
    hidden: ProgramLike = poutine.block(guide, hide_fn=_is_local)
    return hidden


def _is_local(site: Any) -> bool:
    return site["type"] == "sample" and (site_is_subsample(site) or DATA_PLATE in plates_of(site))


def with_globals_of(pair: Pair, run: PairTraces) -> Pair:
    """The pair whose guide repeats the draws of the global sites in a run."""
    drawn = poutine.Trace()
    for name, site in global_sites(run.guide).items():
        drawn.add_node(name, **site)
    return pair.with_guide(poutine.replay(pair.guide, trace=drawn))


@torch.no_grad()
def condition_on_globals(
    model: ProgramLike,
    guide: ProgramLike,
    x: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    seed: int | None = None,
) -> tuple[ProgramLike, ProgramLike]:
    """A pair given one draw of its global latent variables from the guide.

    In the new pair they are constants, and only the latent variables of each datum are left:
    log p(x_n) of it is log p(x_n | theta). It serves what is not defined with a random theta.

    Args:
        model, guide: any pair under the contract; run in evaluation mode.
        x: the whole data, (N, D), on which the guide is run.
        mask: True where x is observed; NaN in x has the same meaning.
        seed: the seed of the draw.

    Returns:
        The model, conditioned on the draw, and the guide of the remaining variables.

    Raises:
        ValueError: if the model has no global latent variables; as
            :func:`ppl_vae.core.traces.check_pair`.
    """
    pair = Pair(model, guide)
    batch = pair.observe(x, mask)
    with isolated_store(), seeded(seed), pair.eval_mode():
        run = pair.run(batch)
    if not run.global_latent:
        raise ValueError(
            "the model has no latent variables outside the plate over data, so there is nothing "
            "to condition on; use the pair itself"
        )
    given = conditioned(pair, run)
    return given.model, given.guide


def conditioned(pair: Pair, run: PairTraces) -> Pair:
    """The pair given the global variables of a run: :func:`condition_on_globals` for one draw."""
    values: dict[str, Tensor] = {n: site["value"] for n, site in run.global_latent.items()}
    names = list(global_sites(run.guide))
    guide = poutine.block(with_globals_of(pair, run).guide, hide=names)
    return Pair(poutine.condition(pair.model, data=values), guide)


class PriorProposal(Program):
    """Draws global variables from a guide, and those of each datum from the prior given them.

    Args:
        model, guide: the pair.
    """

    def __init__(self, model: ProgramLike, guide: ProgramLike) -> None:
        super().__init__()
        self._programs = model, guide
        self._held = tuple(modules_of(guide))

    def forward(self, x: Tensor, **keywords: Any) -> None:
        """The proposal as a Pyro program."""
        model, guide = self._programs
        with poutine.trace() as drawn:
            global_part(guide)(x, **filter_kwargs(guide, keywords))
        latent = poutine.block(poutine.replay(model, trace=drawn.trace), hide_fn=_is_not_latent)
        latent(x, **filter_kwargs(model, keywords))


def _is_not_latent(site: Any) -> bool:
    """Whether a site of the model is none of the latent sites of each datum."""
    if site["type"] != "sample" or site_is_subsample(site):
        return False
    return bool(site["is_observed"]) or DATA_PLATE not in plates_of(site)


def check_no_globals(run: PairTraces, purpose: str) -> None:
    """Check that the model has no global latent variables.

    Args:
        run: the traces of the pair.
        purpose: what needs that, as the subject of a sentence.

    Raises:
        ValueError: naming the variables and the way out.
    """
    if run.global_latent:
        raise ValueError(
            f"{purpose} needs a model without global latent variables, and "
            f"{sorted(run.global_latent)} are outside the plate {DATA_PLATE!r}; fix them at a "
            "draw of the guide: ppl_vae.core.condition_on_globals(model, guide, x)"
        )
