"""Codes and predictions of any pair: means of q(z | x), and means and draws of x.

The *code* of a datum is the flattened values of its latent sites, in the order of the model.
Latent variables that all data share are no part of it; if q(z | x) depends on them, codes are
those of one draw. Decoding needs a pair in which they are fixed, see
:func:`ppl_vae.core.global_sites.condition_on_globals`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from ppl_vae.core.arrays.frame_labels import Frame
from ppl_vae.core.arrays.inputs import as_data_and_mask, labels_of
from ppl_vae.core.batch import Batch
from ppl_vae.core.global_sites import check_no_globals
from ppl_vae.core.introspection import filter_kwargs, placement
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import DATA_PLATE, ProgramLike
from ppl_vae.core.state import dry_run, eval_mode, isolated_store, seeded
from ppl_vae.core.traces import PairTraces, Site, plates_of, sites
from ppl_vae.core.validation import ArrayLike, as_matrix
from ppl_vae.evaluation.local_guides.site_override import SiteOverride
from ppl_vae.objectives.divergences import is_improper


@torch.no_grad()
def latent_means(
    model: ProgramLike, guide: ProgramLike, x: ArrayLike, *, mask: ArrayLike | None = None
) -> dict[str, Tensor]:
    """The mean of q(z | x) for each latent site.

    Args:
        model, guide: any pair under the contract; run in evaluation mode.
        x: the whole data set, (N, D).
        mask: True where x is observed; NaN in x is equivalent.

    Returns:
        One (N, K) tensor per site; further plates and dimensions are flattened.

    Raises:
        NotImplementedError: if the distribution of a site has no mean in closed form.
    """
    found = _guide_sites(model, guide, x, mask)
    return {name: _to_rows(site, site["fn"].mean) for name, site in found.items()}


def encode(
    model: ProgramLike, guide: ProgramLike, x: ArrayLike, *, mask: ArrayLike | None = None
) -> Float[Tensor, "N K"] | Frame:
    """The code of each row: the means of q(z | x), concatenated over all latent sites.

    Of a data frame it is a frame with its index and the columns z1, z2, ...

    Args:
        model, guide: any pair under the contract; run in evaluation mode.
        x: the whole data set, (N, D).
        mask: True where x is observed; NaN in x is equivalent.

    Raises:
        NotImplementedError: if the distribution of a site has no mean in closed form.
        ValueError: if the model has no latent variables of each datum.
    """
    labels, means = labels_of(x), latent_means(model, guide, x, mask=mask)
    names = list(_latent_sites(model, _one_row(x)))
    if not names:
        raise ValueError("the model has no latent variables of each datum, so there are no codes")
    return labels.codes(torch.cat([means[name] for name in names], 1))


def code_width(model: ProgramLike, template: ArrayLike) -> int:
    """The dimension K of codes; of ``template``, rows of data, only the width is used."""
    return sum(_widths(_latent_sites(model, _one_row(template))).values())


@torch.no_grad()
def decode(
    model: ProgramLike, codes: Float[Tensor, "N K"], template: ArrayLike
) -> Float[Tensor, "N D"]:
    """The mean of x given codes.

    Args:
        model: any model under the contract; run in evaluation mode.
        codes: codes as returned by :func:`encode`.
        template: rows of data, at least one; only their number of columns is used.

    Raises:
        ValueError: if the width of the codes differs from that of the model's latent sites.
    """
    rows = _one_row(template).expand(len(codes), -1)
    latents = _latent_sites(model, rows)
    widths = _widths(latents)
    if codes.shape[1] != sum(widths.values()):
        raise ValueError(f"codes have {codes.shape[1]} columns; the latent sites have {widths}")
    parts = zip(latents.items(), codes.split(list(widths.values()), 1), strict=True)
    values = {name: _from_rows(site, part) for (name, site), part in parts}
    return mean_data(model, values, rows)


def _one_row(template: ArrayLike) -> Float[Tensor, "1 D"]:
    return as_matrix(template, name="template", check_finite=False)[:1].nan_to_num()


def _latent_sites(model: ProgramLike, template: ArrayLike) -> dict[str, Site]:
    rows, mask = as_data_and_mask(template, model=model, allow_empty_rows=True)
    place = placement(model)

    def zeros_for_flat(site: Any) -> Tensor | None:  # a flat prior has no draws
        return torch.zeros(site["fn"].shape(), **place) if is_improper(site["fn"]) else None

    with isolated_store(), dry_run(model), eval_mode(model), SiteOverride(zeros_for_flat):
        trace = _trace(model, rows, mask)
    return {name: site for name, site in _local(trace).items() if not site["is_observed"]}


def _local(trace: Trace) -> dict[str, Site]:
    """The sites of a datum; global latent variables are no part of its code."""
    return {name: s for name, s in sites(trace).items() if DATA_PLATE in plates_of(s)}


def _widths(latents: Mapping[str, Site]) -> dict[str, int]:
    return {name: _to_rows(site, site["value"]).shape[1] for name, site in latents.items()}


@torch.no_grad()
def reconstruct(
    model: ProgramLike, guide: ProgramLike, x: ArrayLike, *, mask: ArrayLike | None = None
) -> Float[Tensor, "N D"] | Frame:
    """The mean of x given the mean of q(z | x) of each row, also for missing values.

    Of a data frame it is a frame with its index and columns.

    Args:
        model, guide, x, mask: as for :func:`latent_means`.

    Raises:
        NotImplementedError: if the distribution of a site has no mean in closed form.
        ValueError: if the observed sites together do not have the columns of x.
    """
    found = _guide_sites(model, guide, x, mask)
    means = {name: site["fn"].mean for name, site in found.items()}
    return labels_of(x, model).data(mean_data(model, means, x))


def _guide_sites(
    model: ProgramLike, guide: ProgramLike, x: ArrayLike, mask: ArrayLike | None
) -> dict[str, Site]:
    # Only means are read, but the program samples all the same, so it is run dry.
    pair = Pair(model, guide)
    data = pair.observe(x, mask, allow_empty_rows=True)
    with isolated_store(), pair.dry_run(), pair.eval_mode():
        return _local(_trace(guide, data.x, data.mask))


@torch.no_grad()
def mean_data(
    model: ProgramLike, latents: Mapping[str, Tensor], template: ArrayLike
) -> Float[Tensor, "N D"]:
    """The mean of x given its latents.

    Args:
        model: any model under the contract; run in evaluation mode.
        latents: a value for each latent site, in the shape that the model samples for N rows.
        template: N rows of data; only their shape is used.

    Raises:
        ValueError: if the observed sites together do not have the columns of x; if the model has
            global latent variables.
    """
    values = {name: value.to(**placement(model)) for name, value in latents.items()}
    with dry_run(model):
        return _data(poutine.condition(model, data=values), template, latents, _mean)


@torch.no_grad()
def draw_data(
    model: ProgramLike, template: ArrayLike, *, seed: int | None = None
) -> Float[Tensor, "N D"]:
    """Draws of x from the model, with latents drawn from their prior and observation noise.

    Args:
        model: any model under the contract; run in evaluation mode. It is run on ``template``, so
            it need not be able to run without data; its observed sites are drawn again.
        template: N rows of data; only their shape is used.
        seed: seed of the draws.

    Raises:
        ValueError: if the observed sites together do not have the columns of x.
    """
    with seeded(seed):
        return _data(model, template, {}, lambda site: site["fn"].sample())


def _data(
    model: ProgramLike,
    template: ArrayLike,
    latents: Mapping[str, Tensor],
    read: Callable[[Site], Tensor],
) -> Tensor:
    rows, mask = as_data_and_mask(template, model=model, allow_empty_rows=True)
    with isolated_store(), eval_mode(model):
        trace = _trace(model, rows, mask)
        if latents:
            check_no_globals(PairTraces(trace, trace), "decoding")
        observed = [s for n, s in _local(trace).items() if s["is_observed"] and n not in latents]
        values = torch.cat([_to_rows(site, read(site)) for site in observed], -1)
    if values.shape != rows.shape:
        raise ValueError(
            f"the observed sites have {values.shape[1]} entries per datum, and x has "
            f"{rows.shape[1]} columns"
        )
    return values


def _mean(site: Site) -> Tensor:
    return site["fn"].mean


def _trace(program: ProgramLike, x: Tensor, mask: Tensor | None) -> Trace:
    batch = Batch(x, mask, torch.arange(len(x), device=x.device), len(x))
    return poutine.trace(program).get_trace(x, **filter_kwargs(program, batch.keywords))


def _to_rows(site: Site, value: Tensor) -> Float[Tensor, "N K"]:
    """The value of a site as one flat row per datum."""
    shape, data_dim = _shape_and_data_dim(site)
    value = value.expand(torch.broadcast_shapes(value.shape, shape))
    return value.movedim(data_dim, 0).reshape(value.shape[data_dim], -1)


def _from_rows(site: Site, rows: Float[Tensor, "N K"]) -> Tensor:
    """The inverse of :func:`_to_rows`, for a site with the same number of rows."""
    shape, data_dim = _shape_and_data_dim(site)
    moved = torch.empty(shape, device="meta").movedim(data_dim, 0).shape
    return rows.reshape(moved).movedim(0, data_dim).to(site["value"])


def _shape_and_data_dim(site: Site) -> tuple[torch.Size, int]:
    # The shape of a value, and the (negative) dimension of the data plate in it.
    fn = site["fn"]
    return fn.batch_shape + fn.event_shape, plates_of(site)[DATA_PLATE].dim - len(fn.event_shape)
