"""The traces of a pair, from which every objective is computed.

A pair is run under an outer plate of samples. Sites inside the plate ``"data"`` are *local*: each
site's ``fn.log_prob(value)`` is taken with its mask and without its scale, and summed to one
number per draw and datum. Sites outside it are *global*: parameters theta that all data share,
whose terms are summed to one number per draw. Sites for which that is not possible are refused by
name.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vae.core.program import DATA_PLATE

SAMPLE_PLATE = "_samples"
Site = dict[str, Any]


@dataclass(frozen=True)
class PairTraces:
    """One run of a pair: its two traces, checked against the contract.

    Attributes:
        model, guide: the traces.
        stated_num_data: the size of the data set, if it was passed to the model.
        repeats: the number of copies of each row, see :meth:`ppl_vae.core.pair.Pair.run`.
    """

    model: Trace
    guide: Trace
    stated_num_data: int | None = None
    repeats: int = 1

    @property
    def observed(self) -> dict[str, Site]:
        """The model's observed local sites."""
        return {n: s for n, s in _local(self.model).items() if s["is_observed"]}

    @property
    def latent(self) -> dict[str, Site]:
        """The model's latent local sites."""
        return {n: s for n, s in _local(self.model).items() if not s["is_observed"]}

    @property
    def drawn(self) -> dict[str, Site]:
        """The guide's local sites, auxiliary ones included."""
        return _local(self.guide)

    @property
    def global_latent(self) -> dict[str, Site]:
        """The model's latent global sites."""
        return {n: s for n, s in global_sites(self.model).items() if not s["is_observed"]}

    @property
    def num_data(self) -> int:
        """The size of the whole data, of which the plate may hold a part."""
        if self.stated_num_data is not None and self.repeats > 1:
            return self.stated_num_data  # repeated rows may be as many as the whole data
        frame = plates_of(next(iter(_local(self.model).values())))[DATA_PLATE]
        whole = frame.full_size in (None, frame.size)
        return frame.size // self.repeats if whole else frame.full_size

    def log_weights(self) -> Float[Tensor, "S B"]:
        """log p(x_n, z_sn | theta_s) - log q(z_sn | x_n, theta_s), the terms of local sites."""
        joint = [self.per_datum(s, log_prob(s)) for s in _local(self.model).values()]
        guide = [-self.per_datum(s, log_prob(s)) for s in self.drawn.values()]
        return torch.stack(torch.broadcast_tensors(*joint, *guide)).sum(0)

    def global_log_weights(self) -> Float[Tensor, "#S"]:
        """log p(theta_s) - log q(theta_s), the terms of global sites; 0 without any.

        Global sites that are observed (``poutine.condition``) are part of p.
        """
        joint = [per_draw(s, log_prob(s)) for s in global_sites(self.model).values()]
        guide = [-per_draw(s, log_prob(s)) for s in global_sites(self.guide).values()]
        if not joint and not guide:
            return self.log_weights().new_zeros(1)
        return torch.stack(torch.broadcast_tensors(*joint, *guide)).sum(0)

    def per_datum(self, site: Site, value: Tensor) -> Float[Tensor, "S B"]:
        """A local site's value summed over all dimensions but those of samples and data."""
        # The sample plate stands left of all others, so the order is (S, B) already.
        kept = _sum_except(site, value, (SAMPLE_PLATE, DATA_PLATE))
        return kept.reshape(-1, plates_of(site)[DATA_PLATE].size // self.repeats)


def per_draw(site: Site, value: Tensor) -> Float[Tensor, "#S"]:
    """A global site's value summed over all dimensions but that of samples."""
    return _sum_except(site, value, (SAMPLE_PLATE,)).reshape(-1)


def _sum_except(site: Site, value: Tensor, names: tuple[str, ...]) -> Tensor:
    """A site's value expanded to its plates, and summed over all but those with these names."""
    plates = plates_of(site)
    rank = max(value.dim(), *(-frame.dim for frame in plates.values()), 0)
    shape = [1] * rank
    for frame in plates.values():
        shape[frame.dim] = frame.size
    value = value.expand(torch.broadcast_shapes(value.shape, torch.Size(shape)))
    keep = [plates[name].dim for name in names if name in plates]
    drop = [dim for dim in range(-rank, 0) if dim not in keep]
    return value.sum(drop, keepdim=True) if drop else value


def sites(trace: Trace) -> dict[str, Site]:
    """The sample sites that carry a density: no subsampling, no ``pyro.deterministic``."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    }


def global_sites(trace: Trace) -> dict[str, Site]:
    """The sites of :func:`sites` outside the plate over data."""
    return {n: s for n, s in sites(trace).items() if DATA_PLATE not in plates_of(s)}


def _local(trace: Trace) -> dict[str, Site]:
    return {n: s for n, s in sites(trace).items() if DATA_PLATE in plates_of(s)}


def plates_of(site: Site) -> dict[str, Any]:
    """The vectorized plates around a site, by name."""
    return {frame.name: frame for frame in site["cond_indep_stack"] if frame.vectorized}


def free_dim(run: PairTraces) -> int:
    """The first dimension left of all plates of both programs."""
    plates = [plates_of(s) for t in (run.model, run.guide) for s in sites(t).values()]
    return min(frame.dim for found in plates for frame in found.values()) - 1


def data_sites(run: PairTraces) -> dict[str, Site]:
    """The observed sites that hold data. (A ``pyro.factor`` is an observed site with an empty
    value.)

    Raises:
        ValueError: if there is none.
    """
    found = {name: site for name, site in run.observed.items() if site["value"].numel()}
    if not found:
        raise ValueError("the model observes nothing; pass its data on as obs=x")
    return found


def by_draw_and_datum(run: PairTraces, site: Site, value: Tensor) -> Tensor:
    """A local site's value with its draws first and its data second, for any order of its plates.

    Returns:
        (S, B, ...): other plates and the event's dimensions follow, in their order; S is 1 where
        the value is the same for all draws.
    """
    value, rest = _to_front(site, value, (SAMPLE_PLATE, DATA_PLATE))
    return value.reshape(-1, plates_of(site)[DATA_PLATE].size // run.repeats, *rest)


def by_draw(site: Site, value: Tensor) -> Tensor:
    """A global site's value with its draws first, (S, ...), as :func:`by_draw_and_datum`."""
    value, rest = _to_front(site, value, (SAMPLE_PLATE,))
    return value.reshape(-1, *rest)


def _to_front(site: Site, value: Tensor, names: tuple[str, ...]) -> tuple[Tensor, list[int]]:
    """The value with the plates of these names first, and the sizes of the other dimensions.

    Dimensions of size one that are neither a plate's nor the event's are moved to the end.
    """
    event = len(site["fn"].event_shape)
    value = value.expand(torch.broadcast_shapes(value.shape, site["fn"].shape()))
    plates = {name: frame.dim - event for name, frame in plates_of(site).items()}
    front = [plates.pop(name) for name in names if name in plates]
    rest = [
        dim
        for dim in range(-value.dim(), 0)
        if dim not in front and (dim >= -event or dim in plates.values() or value.shape[dim] > 1)
    ]
    unit = [dim for dim in range(-value.dim(), 0) if dim not in front and dim not in rest]
    return value.permute([*front, *rest, *unit]), [value.shape[dim] for dim in rest]


def log_prob(site: Site) -> Tensor:
    """A site's log density with its mask, without its scale."""
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return masked(value, site["mask"])


def masked(value: Tensor, mask: Tensor | bool | None) -> Tensor:
    """The value where the mask is True, zero elsewhere."""
    if mask is None or mask is True:
        return value
    mask = mask if isinstance(mask, Tensor) else torch.as_tensor(mask, device=value.device)
    return torch.where(mask, value, torch.zeros_like(value))


def check_pair(traces: PairTraces, num_rows: int) -> None:
    """Check what two traces must have for log weights to be read from them.

    Raises:
        ValueError: naming the site and the way out.
    """
    model, guide = sites(traces.model), sites(traces.guide)
    latent = {name for name, site in model.items() if not site["is_observed"]}
    if missing := sorted(latent - guide.keys()):
        raise ValueError(
            f"latent sites of the model are missing from the guide: {missing}; "
            "the guide must sample each, under the same name"
        )
    if observed := sorted(guide.keys() & (model.keys() - latent)):
        raise ValueError(
            f"sites of the guide are observed in the model: {observed}; "
            "rename them, or stop observing them there"
        )
    for name, site in guide.items():
        if name not in model and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"site {name!r} of the guide is not in the model; give it the name of a latent "
                "site, or infer={'is_auxiliary': True}"
            )
    if not model:
        raise ValueError("the model has no sample sites")
    _check_locations(traces)
    for program, found in (("model", model), ("guide", guide)):
        for name, site in found.items():
            _check_plates(f"site {name!r} of the {program}", site, num_rows)


def _check_locations(traces: PairTraces) -> None:
    """Check that data are in the plate over data, and latent sites in both programs or neither."""
    outside = global_sites(traces.model)
    if not traces.observed and not traces.latent:
        raise ValueError(
            f"sites {sorted(outside)} of the model are outside the plate {DATA_PLATE!r}, and none "
            "is inside, so there is no value per datum; put what belongs to a datum under "
            f"pyro.plate({DATA_PLATE!r}, len(x))"
        )
    data = [name for name, site in outside.items() if site["is_observed"]]
    if data and not traces.observed:
        raise ValueError(
            f"sites {sorted(data)} of the model are observed outside the plate {DATA_PLATE!r}, "
            "and none inside, so their densities have no value per datum; put them under "
            f"pyro.plate({DATA_PLATE!r}, len(x))"
        )
    guide = sites(traces.guide)
    for name, site in sites(traces.model).items():
        inside = DATA_PLATE in plates_of(site)
        if not site["is_observed"] and inside != (DATA_PLATE in plates_of(guide[name])):
            raise ValueError(
                f"site {name!r} is {'inside' if inside else 'outside'} the plate {DATA_PLATE!r} "
                f"in the model and {'outside' if inside else 'inside'} it in the guide; a latent "
                "variable of each datum is inside in both, one that all data share outside"
            )


def _check_plates(who: str, site: Site, num_rows: int) -> None:
    plates = plates_of(site)
    deepest = max((-frame.dim for frame in plates.values()), default=0)
    if len(site["fn"].batch_shape) > deepest:
        raise ValueError(
            f"{who} has batch shape {tuple(site['fn'].batch_shape)}, more dimensions than plates; "
            "declare the others an event (.to_event(1)) or put them under a plate"
        )
    if DATA_PLATE in plates and (size := plates[DATA_PLATE].size) != num_rows:
        raise ValueError(
            f"{who} is in a plate {DATA_PLATE!r} of size {size}, and x has {num_rows} rows; "
            "pass x's own rows to the plate (subsample=index)"
        )
    # Scales are compared only where that needs no synchronisation with a device.
    scale, explained = site["scale"], _plate_scale(plates.values())
    if isinstance(scale, Tensor) or abs(scale / explained - 1) > 1e-6:
        raise ValueError(
            f"{who} has scale {scale}, where its plates explain {explained:g} "
            "(poutine.scale?), so its term is not a log density; remove the scale "
            "(for a weighted KL: ELBO(beta=...))"
        )


def _plate_scale(plates: Any) -> float:
    scale = 1.0
    for frame in plates:
        scale *= (frame.full_size or frame.size) / frame.size
    return scale
