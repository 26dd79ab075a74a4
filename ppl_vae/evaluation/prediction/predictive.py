"""What a pair says of codes and of data: means of q, and means and draws of x, for any pair.

The *code* of a datum is one row: the values of its latent sites, in the model's order, flat.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from ppl_vae.core.program import (
    DATA_PLATE,
    ProgramLike,
    as_data_and_mask,
    filter_kwargs,
    placement,
)
from ppl_vae.core.state import dry_run, eval_mode, isolated_store, seeded
from ppl_vae.core.traces import Site, frames, sites
from ppl_vae.core.validation import ArrayLike, as_matrix
from ppl_vae.evaluation.local_guides.site_override import Imposed
from ppl_vae.objectives.divergences import is_improper


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


def encode(
    model: ProgramLike, guide: ProgramLike, x: ArrayLike, *, mask: ArrayLike | None = None
) -> Float[Tensor, "N K"]:
    """The code of each row: the means of q(z | x), all latent sites beside one another.

    Args:
        model, guide: any pair under the contract; run in evaluation mode.
        x: the whole data, (N, D).
        mask: True where x is observed; NaN in x says the same.

    Raises:
        NotImplementedError: if the distribution of a site has no mean in closed form.
    """
    means = latent_means(model, guide, x, mask=mask)
    return torch.cat([means[name] for name in _latent_sites(model, _one_row(x))], 1)


def code_width(model: ProgramLike, like: ArrayLike) -> int:
    """K, of all latent sites together; of the rows of data only the width matters."""
    return sum(_widths(_latent_sites(model, _one_row(like))).values())


@torch.no_grad()
def decode(
    model: ProgramLike, codes: Float[Tensor, "N K"], like: ArrayLike
) -> Float[Tensor, "N D"]:
    """The mean of x given codes.

    Args:
        model: any model under the contract; run in evaluation mode.
        codes: as :func:`encode` gives them.
        like: rows of data; only their width matters, one is enough.

    Raises:
        ValueError: if codes have another width than the model's latent sites.
    """
    rows = _one_row(like).expand(len(codes), -1)
    found = _latent_sites(model, rows)
    widths = _widths(found)
    if codes.shape[1] != sum(widths.values()):
        raise ValueError(f"codes have {codes.shape[1]} columns; the latent sites have {widths}")
    parts = zip(found.items(), codes.split(list(widths.values()), 1), strict=True)
    return mean_data(model, {name: _as_site(site, part) for (name, site), part in parts}, rows)


def _one_row(like: ArrayLike) -> Float[Tensor, "1 D"]:
    return as_matrix(like, name="like", check_finite=False)[:1].nan_to_num()


def _latent_sites(model: ProgramLike, like: ArrayLike) -> dict[str, Site]:
    rows, seen = as_data_and_mask(like, model=model)
    place = placement(model)

    def anything(site: Any) -> Tensor | None:  # a flat prior cannot be drawn from
        return torch.zeros(site["fn"].shape(), **place) if is_improper(site["fn"]) else None

    still = eval_mode(model)
    with isolated_store(), dry_run(model), still, Imposed(anything):
        trace = poutine.trace(model).get_trace(rows, **_told(model, rows, seen))
    return {name: site for name, site in sites(trace).items() if not site["is_observed"]}


def _widths(found: Mapping[str, Site]) -> dict[str, int]:
    return {name: _rows_first(site, site["value"]).shape[1] for name, site in found.items()}


@torch.no_grad()
def reconstruct(
    model: ProgramLike, guide: ProgramLike, x: ArrayLike, *, mask: ArrayLike | None = None
) -> Float[Tensor, "N D"]:
    """The mean of x given the mean of q(z | x) of each of its rows, in missing values too.

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
    rows, seen = as_data_and_mask(x, mask, model=model, guide=guide)
    with isolated_store(), dry_run(model, guide), eval_mode(model, guide):
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
    to_device = {name: value.to(**placement(model)) for name, value in latents.items()}
    with dry_run(model):
        return _data(poutine.condition(model, data=to_device), like, latents, _mean)


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
    rows, seen = as_data_and_mask(like, model=model)
    with isolated_store(), eval_mode(model):
        trace = poutine.trace(model).get_trace(rows, **_told(model, rows, seen))
        found = [s for n, s in sites(trace).items() if s["is_observed"] and n not in latents]
        values = torch.cat([_rows_first(site, read(site)) for site in found], -1)
    if values.shape != rows.shape:
        raise ValueError(
            f"the observed sites have {values.shape[1]} entries per datum, and x has "
            f"{rows.shape[1]} columns"
        )
    return values


def _mean(site: Site) -> Tensor:
    return site["fn"].mean


def _told(program: ProgramLike, rows: Tensor, mask: Tensor | None) -> dict[str, Any]:
    index = torch.arange(len(rows), device=rows.device)
    return filter_kwargs(program, {"index": index, "num_data": len(rows), "mask": mask})


def _rows_first(site: Site, value: Tensor) -> Float[Tensor, "N K"]:
    shape, place = _layout(site)
    value = value.expand(torch.broadcast_shapes(value.shape, shape))
    return value.movedim(place, 0).reshape(value.shape[place], -1)


def _as_site(site: Site, rows: Float[Tensor, "N K"]) -> Tensor:
    """The inverse of :func:`_rows_first`, for a site of as many rows."""
    shape, place = _layout(site)
    moved = torch.empty(shape, device="meta").movedim(place, 0).shape
    return rows.reshape(moved).movedim(0, place).to(site["value"])


def _layout(site: Site) -> tuple[torch.Size, int]:
    # The shape of a value, and which of its dimensions, from the right, is the data's.
    fn = site["fn"]
    return fn.batch_shape + fn.event_shape, frames(site)[DATA_PLATE].dim - len(fn.event_shape)
