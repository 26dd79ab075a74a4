"""What a pair says of codes and of data: means of q, and means and draws of x, for any pair."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from ppl_vae.arguments import ArrayLike
from ppl_vae.program import DATA_PLATE, ProgramLike, accepted, as_observed, placement
from ppl_vae.state import isolated_store, mode, probing, seeded
from ppl_vae.traces import Site, frames, sites


@torch.no_grad()
def latent_means(
    model: ProgramLike, guide: ProgramLike, x: ArrayLike, *, mask: ArrayLike | None = None
) -> dict[str, Tensor]:
    """The mean of q(z | x) for each latent site.

    Args:
        model, guide: any pair under the contract; run in evaluation mode.
        x: the whole data, (N, D).
        mask: True where x is observed; NaN in x says the same.

    Returns:
        (N, K) a site; what lies in further plates or dimensions is flattened.

    Raises:
        NotImplementedError: if the distribution of a site has no mean in closed form.
    """
    found = _guide_sites(model, guide, x, mask)
    return {name: _rows_first(site, site["fn"].mean) for name, site in found.items()}


@torch.no_grad()
def reconstruct(
    model: ProgramLike, guide: ProgramLike, x: ArrayLike, *, mask: ArrayLike | None = None
) -> Float[Tensor, "N D"]:
    """The mean of x given the mean of q(z | x) of each of its rows, in holes too.

    Args:
        model, guide: any pair under the contract; run in evaluation mode.
        x: the whole data, (N, D).
        mask: True where x is observed; NaN in x says the same.

    Raises:
        NotImplementedError: if the distribution of a site has no mean in closed form.
        ValueError: if the observed sites do not have x's columns.
    """
    found = _guide_sites(model, guide, x, mask)
    return mean_data(model, {name: site["fn"].mean for name, site in found.items()}, x)


def _guide_sites(
    model: ProgramLike, guide: ProgramLike, x: ArrayLike, mask: ArrayLike | None
) -> dict[str, Site]:
    # Means need no draws, but a program makes them.
    rows, seen = as_observed(x, mask, model=model, guide=guide)
    with isolated_store(), probing(model, guide), mode(model, guide, training=False):
        return sites(poutine.trace(guide).get_trace(rows, **_told(guide, rows, seen)))


@torch.no_grad()
def mean_data(
    model: ProgramLike, latents: Mapping[str, Tensor], like: ArrayLike
) -> Float[Tensor, "N D"]:
    """The mean of x given its latents.

    Args:
        model: any model under the contract; run in evaluation mode.
        latents: a value for each latent site, as the model samples it for N rows.
        like: N rows of data; only their number matters.

    Raises:
        ValueError: if the observed sites do not have x's columns.
    """
    placed = {name: value.to(**placement(model)) for name, value in latents.items()}
    with probing(model):
        return _data(poutine.condition(model, data=placed), like, latents, _mean)


@torch.no_grad()
def draw_data(
    model: ProgramLike, like: ArrayLike, *, seed: int | None = None
) -> Float[Tensor, "N D"]:
    """Draws of x from the model, latents from their prior and noise included.

    Args:
        model: any model under the contract; run in evaluation mode. It need not be able to draw
            without data: the distributions of its observed sites are drawn from.
        like: N rows of data; only their number matters.
        seed: of the draws.

    Raises:
        ValueError: if the observed sites do not have x's columns.
    """
    with seeded(seed):
        return _data(model, like, {}, lambda site: site["fn"].sample())


def _data(
    model: ProgramLike,
    like: ArrayLike,
    latents: Mapping[str, Tensor],
    read: Callable[[Site], Tensor],
) -> Tensor:
    rows, seen = as_observed(like, model=model)
    with isolated_store(), mode(model, training=False):
        trace = poutine.trace(model).get_trace(rows, **_told(model, rows, seen))
        found = [s for n, s in sites(trace).items() if s["is_observed"] and n not in latents]
        values = torch.cat([_rows_first(site, read(site)) for site in found], -1)
    if values.shape != rows.shape:
        raise ValueError(
            f"the observed sites have {values.shape[1]} entries a datum, and x has "
            f"{rows.shape[1]} columns"
        )
    return values


def _mean(site: Site) -> Tensor:
    return site["fn"].mean


def _told(program: ProgramLike, rows: Tensor, mask: Tensor | None) -> dict[str, Any]:
    index = torch.arange(len(rows), device=rows.device)
    return accepted(program, {"index": index, "num_data": len(rows), "mask": mask})


def _rows_first(site: Site, value: Tensor) -> Float[Tensor, "N K"]:
    plates = frames(site)
    event = len(site["fn"].event_shape)
    shape = torch.broadcast_shapes(value.shape, site["fn"].batch_shape + site["fn"].event_shape)
    place = plates[DATA_PLATE].dim - event
    return value.expand(shape).movedim(place, 0).reshape(shape[place], -1)
