"""NUTS over all continuous latent sites of a Pyro program."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from ppl_vae.core.arrays.inputs import as_data_and_mask, check_support
from ppl_vae.core.introspection import filter_kwargs
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import eval_mode, isolated_store, seeded, validation
from ppl_vae.core.traces import sites
from ppl_vae.core.validation import ArrayLike, check_option
from ppl_vae.inference.mcmc.external_nuts import NAMES, RUNNERS
from ppl_vae.inference.mcmc.hamiltonian import (
    MIN_COMPILED_ITERATIONS,
    DensityAndGradient,
    DensityGradient,
    LogDensity,
    value_and_gradient,
)
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.inference.mcmc.settings import DEFAULT_SETTINGS, ChainSettings
from ppl_vae.inference.svi.progress import progress_bar


@dataclass(frozen=True)
class ProgramPosterior:
    """log p(x, latent sites) of a program, as a function of one real vector.

    Attributes:
        potential: -log p as a function of unconstrained values by site.
        transforms: from the support of each site to the reals.
        shapes: the shapes of the unconstrained values, by site.
        starts: a starting point for each chain, (C, P).
    """

    potential: Callable[[dict[str, Tensor]], Tensor]
    transforms: dict[str, Any]
    shapes: dict[str, torch.Size]
    starts: Float[Tensor, "C P"]

    @classmethod
    def of(cls, model: ProgramLike, x: Tensor, keywords: dict[str, Tensor], chains: int) -> Self:
        """Check the program's sites and draw starting points, uniform on (-2, 2) in each
        coordinate.

        Raises:
            ValueError: if the program has discrete latent sites, or none at all.
        """
        with torch.no_grad():
            trace = poutine.trace(model).get_trace(x, **keywords)
        _check_continuous({k: s for k, s in sites(trace).items() if not s["is_observed"]})
        found = [initialize_model(model, (x,), keywords) for _ in range(chains)]
        _, potential, transforms, _ = found[0]
        first = [start for start, *_ in found]
        shapes = {name: value.shape for name, value in sorted(first[0].items())}
        flat = [torch.cat([start[name].flatten() for name in shapes]) for start in first]
        return cls(potential, transforms, shapes, torch.stack(flat))

    def _by_site(self, position: Float[Tensor, "*S P"]) -> dict[str, Tensor]:
        parts = position.split([shape.numel() for shape in self.shapes.values()], -1)
        pairs = zip(self.shapes.items(), parts, strict=True)
        return {name: part.reshape(part.shape[:-1] + shape) for (name, shape), part in pairs}

    def log_density(self, position: Float[Tensor, " P"]) -> Float[Tensor, ""]:
        """log p(x, latent sites) as a density of the position, in nats."""
        with validation(False):
            return -self.potential(self._by_site(position))

    def values(self, position: Float[Tensor, "*S P"]) -> dict[str, Tensor]:
        """The values of the latent sites."""
        with torch.no_grad():
            return {k: self.transforms[k].inv(v) for k, v in self._by_site(position).items()}


def _check_continuous(latent: dict[str, Any]) -> None:
    discrete = [name for name, site in latent.items() if site["fn"].support.is_discrete]
    if discrete:
        raise ValueError(
            f"NUTS needs continuous latent variables; discrete sites of the model: {discrete}. "
            "Sum over their values inside the model"
        )
    if not latent:
        raise ValueError(
            "the model has no latent site to sample; parameters need a prior "
            "(pyro.sample, or PyroSample in a module)"
        )


def _density(log_density: LogDensity, starts: Tensor, *, compiled: bool) -> DensityAndGradient:
    # The captured density, unless the program is not pure: then its values at other positions
    # than that of the capture are wrong, or it cannot be captured at all.
    captured = DensityGradient(log_density, starts[0], compiled=compiled)
    for start in [*starts[1:], starts.mean(0) + 0.1]:
        pairs = zip(captured(start), value_and_gradient(log_density, start), strict=True)
        if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in pairs):
            return lambda position: value_and_gradient(log_density, position)
    return captured


def sample_program(
    model: ProgramLike,
    x: ArrayLike,
    mask: ArrayLike | None = None,
    settings: ChainSettings = DEFAULT_SETTINGS,
    *,
    sampler: str = "nuts",
) -> PosteriorSamples:
    """Draws of all latent sites of a program given x by NUTS, those in the plate over data too.

    Args:
        model: a program with continuous latent sites; it needs no guide.
        x: the data, all of them; NaN marks a missing value.
        mask: True where observed.
        settings: the settings of the chains.
        sampler: ``"nuts"``, that of Pyro, or ``"nutpie"``.

    Raises:
        ValueError: if the model has discrete latent sites, or none at all; as
            :func:`~ppl_vae.core.arrays.inputs.as_data_and_mask`.
    """
    started = time.perf_counter()
    check_option("sampler", sampler, RUNNERS)
    data, observed = as_data_and_mask(x, mask, model=model)
    check_support(model, data, observed)
    keywords = filter_kwargs(model, {"mask": observed})
    with ExitStack() as stack:
        for context in (
            poutine.block(),
            isolated_store(),
            eval_mode(model),
            seeded(settings.seed),
        ):
            stack.enter_context(context)
        report = stack.enter_context(progress_bar(settings.total, settings.progress, "NUTS"))
        posterior = ProgramPosterior.of(model, data, keywords, settings.chains)
        found = RUNNERS[sampler](
            _density(
                posterior.log_density,
                posterior.starts,
                compiled=settings.total >= MIN_COMPILED_ITERATIONS,
            ),
            posterior.starts,
            settings,
            lambda step, value: report(step, value / len(data)),
        )
        values = posterior.values(found.positions)
    note = f"sampled are all latent sites of the model: {', '.join(values)}"
    return PosteriorSamples(
        draws={name: value.double() for name, value in values.items()},
        sampler=NAMES[sampler],
        seconds=time.perf_counter() - started,
        num_data=len(data),
        divergences=found.divergences,
        acceptance=found.acceptance,
        notes=(note,),
        model=model,
    )
