"""The traces of a pair, from which every objective is computed.

A pair is run under an outer plate of samples. Each site's ``fn.log_prob(value)`` is taken with its
mask and without its scale, and summed to one number per draw and datum. Sites for which that is
not possible are refused by name.
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
        """The model's observed sites."""
        return {n: s for n, s in sites(self.model).items() if s["is_observed"]}

    @property
    def latent(self) -> dict[str, Site]:
        """The model's latent sites."""
        return {n: s for n, s in sites(self.model).items() if not s["is_observed"]}

    @property
    def num_data(self) -> int:
        """The size of the whole data, of which the plate may hold a part."""
        if self.stated_num_data is not None and self.repeats > 1:
            return self.stated_num_data  # repeated rows may be as many as the whole data
        frame = frames(next(iter(sites(self.model).values())))[DATA_PLATE]
        whole = frame.full_size in (None, frame.size)
        return frame.size // self.repeats if whole else frame.full_size

    def log_weights(self) -> Float[Tensor, "S B"]:
        """log p(x_n, z_sn) - log q(z_sn | x_n)."""
        joint = [self.per_datum(s, log_prob(s)) for s in sites(self.model).values()]
        guide = [-self.per_datum(s, log_prob(s)) for s in sites(self.guide).values()]
        return torch.stack(torch.broadcast_tensors(*joint, *guide)).sum(0)

    def per_datum(self, site: Site, value: Tensor) -> Float[Tensor, "S B"]:
        """A site's value summed over all dimensions but those of samples and data."""
        plates = frames(site)
        rank = max(value.dim(), *(-frame.dim for frame in plates.values()))
        shape = [1] * rank
        for frame in plates.values():
            shape[frame.dim] = frame.size
        value = value.expand(torch.broadcast_shapes(value.shape, torch.Size(shape)))
        keep = [plates[name].dim for name in (SAMPLE_PLATE, DATA_PLATE) if name in plates]
        drop = [dim for dim in range(-rank, 0) if dim not in keep]
        value = value.sum(drop, keepdim=True) if drop else value
        # The sample plate stands left of all others, so the order is (S, B) already.
        return value.reshape(-1, plates[DATA_PLATE].size // self.repeats)


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


def frames(site: Site) -> dict[str, Any]:
    """The vectorized plates around a site, by name."""
    return {frame.name: frame for frame in site["cond_indep_stack"] if frame.vectorized}


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
    """A site's value with its draws first and its data second, whatever its plates are.

    Returns:
        (S, B, ...): other plates and the event's dimensions follow, in their order; S is 1 where
        the value is the same for all draws.
    """
    event = len(site["fn"].event_shape)
    value = value.expand(torch.broadcast_shapes(value.shape, site["fn"].shape()))
    plates = {name: frame.dim - event for name, frame in frames(site).items()}
    front = [plates.pop(name) for name in (SAMPLE_PLATE, DATA_PLATE) if name in plates]
    rest = [
        dim
        for dim in range(-value.dim(), 0)
        if dim not in front and (dim >= -event or dim in plates.values() or value.shape[dim] > 1)
    ]
    unit = [dim for dim in range(-value.dim(), 0) if dim not in front and dim not in rest]
    num_rows = frames(site)[DATA_PLATE].size // run.repeats
    shape = [value.shape[dim] for dim in rest]
    return value.permute(*front, *rest, *unit).reshape(-1, num_rows, *shape)


def log_prob(site: Site) -> Tensor:
    """A site's log density with its mask, without its scale."""
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return masked(value, site["mask"])


def masked(value: Tensor, mask: Tensor | bool | None) -> Tensor:
    """The value where the mask is True, zero elsewhere."""
    if mask is None or mask is True:
        return value
    return torch.where(torch.as_tensor(mask, device=value.device), value, torch.zeros_like(value))


def check_pair(traces: PairTraces, num_rows: int) -> None:
    """Check what two traces must have for log weights per datum to be read from them.

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
    for program, found in (("model", model), ("guide", guide)):
        for name, site in found.items():
            _check_plates(f"site {name!r} of the {program}", site, num_rows)


def _check_plates(who: str, site: Site, num_rows: int) -> None:
    plates = frames(site)
    if DATA_PLATE not in plates:
        raise ValueError(
            f"{who} is outside the plate {DATA_PLATE!r}, so it has no value per datum; put it "
            f"under pyro.plate({DATA_PLATE!r}, len(x)). (Latent variables that all data share "
            "are not supported.)"
        )
    deepest = max(-frame.dim for frame in plates.values())
    if len(site["fn"].batch_shape) > deepest:
        raise ValueError(
            f"{who} has batch shape {tuple(site['fn'].batch_shape)}, more dimensions than plates; "
            "declare the others an event (.to_event(1)) or put them under a plate"
        )
    size = plates[DATA_PLATE].size
    if size != num_rows:
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
