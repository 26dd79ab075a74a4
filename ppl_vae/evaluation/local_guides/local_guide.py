"""The base class of guides with free parameters for each datum."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ppl_vae.core.introspection import filter_kwargs, modules_of
from ppl_vae.core.program import DATA_PLATE, Density, Program, ProgramLike
from ppl_vae.core.traces import Site

ROUND_TRIP_TOLERANCE = 0.03
"""Tolerance on the round trip noise -> draw -> noise, beyond which a Cholesky factor is rejected
as ill-conditioned."""


@dataclass(frozen=True)
class SitePlates:
    """The plates that enclose a site.

    Attributes:
        name: the name of the site.
        plates: for each plate its name, its full size, its rows (None: all) and its dimension.
    """

    name: str
    plates: list[tuple[str, int, Tensor | None, int]]

    @classmethod
    def of(cls, trace: Any, site: Site) -> Self:
        """The plates of a site in a trace."""
        found = [
            (f.name, f.full_size or f.size, _rows(trace, f), f.dim)
            for f in sorted(site["cond_indep_stack"], key=lambda f: f.dim)
            if f.vectorized
        ]
        return cls(site["name"], found)

    def rows(self) -> dict[str, Tensor]:
        """The rows of each plate that is subsampled."""
        return {f"rows_{name}": rows for name, _, rows, _ in self.plates if rows is not None}

    def with_rows(self, rows: dict[str, Tensor]) -> Self:
        """The same plates with other tensors of rows."""
        plates = [(name, n, rows.get(f"rows_{name}"), dim) for name, n, _, dim in self.plates]
        return replace(self, plates=plates)

    def repeated(self, repeats: int) -> Self:
        """The plates for data of which each row is repeated this many times."""
        if repeats == 1:
            return self
        plates = []
        for name, size, rows, dim in self.plates:
            if name == DATA_PLATE:
                rows = torch.arange(size) if rows is None else rows
                rows = rows.repeat(repeats)
            plates.append((name, size, rows, dim))
        return replace(self, plates=plates)

    def repeat_rows(self, tensor: Tensor, repeats: int, event_dim: int) -> Tensor:
        """A tensor for the data, repeated; ``event_dim`` of its dimensions are right of all
        plates."""
        if repeats == 1:
            return tensor
        axis = next(dim for name, _, _, dim in self.plates if name == DATA_PLATE)
        return torch.cat([tensor] * repeats, axis - event_dim)


def _rows(trace: Any, frame: Any) -> Tensor | None:
    node = trace.nodes.get(frame.name)
    rows = None if node is None else node["value"]
    return rows if isinstance(rows, Tensor) else None


class LocalGuide(Program):
    """Abstract: a guide with one distribution, with free parameters, per datum and latent site.

    Args:
        num_rows: the number of rows of data that it is for.
        sites: the plates of each site, in the order of the sites.
        fixed: the fixed tensors of each site, by name.
        global_guide: a program that draws the global variables, if there are some.
    """

    def __init__(
        self,
        num_rows: int,
        sites: Sequence[SitePlates],
        fixed: Sequence[Mapping[str, Tensor]],
        global_guide: ProgramLike | None = None,
    ) -> None:
        super().__init__()
        self._num_rows = num_rows
        # Tuples keep the modules of the other guide from becoming parts of this one.
        self._global_guides = () if global_guide is None else (global_guide,)
        self._held = tuple(modules_of(*self._global_guides))
        self._sites = list(sites)
        self._names = [list(tensors) for tensors in fixed]
        # Tensors are buffers, so that they are inputs of captured code.
        for k, (plates, tensors) in enumerate(zip(sites, fixed, strict=True)):
            for name, tensor in {**tensors, **plates.rows()}.items():
                copy = tensor.detach().clone(memory_format=torch.contiguous_format)
                self.register_buffer(f"{name}_{k}", copy)

    @abstractmethod
    def density(self, k: int, *, repeats: int = 1, detached: bool = False) -> Density:
        """The distribution of the k-th site.

        Args:
            k: the position of the site.
            repeats: how often each row of the data is repeated.
            detached: whether the distribution has no gradient in the free parameters.
        """

    def forward(self, x: Tensor, **keywords: Any) -> None:
        """The guide as a Pyro program, for the rows that it was constructed for."""
        for global_guide in self._global_guides:
            global_guide(x, **filter_kwargs(global_guide, keywords))
        repeats = len(x) // self._num_rows
        plates: dict[str, pyro.plate] = {}
        for k in range(len(self._sites)):
            q = self.density(k, repeats=repeats)
            detached = self.density(k, repeats=repeats, detached=True)
            with ExitStack() as stack:
                for name, size, rows, dim in self._site(k).repeated(repeats).plates:
                    if name not in plates:
                        plates[name] = pyro.plate(name, size, subsample=rows, dim=dim)
                    stack.enter_context(plates[name])
                self._sample(k, StickTheLanding(q, detached))

    def _sample(self, k: int, q: Density) -> None:
        pyro.sample(self._sites[k].name, q)

    def _fixed(self, k: int) -> dict[str, Tensor]:
        return {name: getattr(self, f"{name}_{k}") for name in self._names[k]}

    def _site(self, k: int) -> SitePlates:
        plates = self._sites[k]
        return plates.with_rows({name: getattr(self, f"{name}_{k}") for name in plates.rows()})

    def check_conditioning(self) -> None:
        """Check that the covariance of each Gaussian is well-conditioned in its dtype.

        Raises:
            FloatingPointError: if a covariance is nearly singular, so that log densities, and
                thereby log weights, would be wrong by any amount.
        """
        for k, site in enumerate(self._sites):
            q = self.density(k, detached=True)
            if not isinstance(q, dist.MultivariateNormal):
                continue
            factor = q.scale_tril
            ones = torch.ones_like(factor[..., :1])
            round_trip = torch.linalg.solve_triangular(factor, factor @ ones, upper=False)
            singular = ~((round_trip - ones).abs() < ROUND_TRIP_TOLERANCE).all(-1).all(-1)
            if num_singular := int(singular.sum()):
                raise FloatingPointError(
                    f"the refined q of site {site.name!r} is nearly singular for {num_singular} "
                    f"of {singular.numel()} data points: its density is inaccurate in "
                    f"{factor.dtype}. "
                    "Use covariance='diagonal', fewer steps, or the pair in float64: .double()"
                )


class StickTheLanding(TorchDistribution):
    """A distribution whose draws have a gradient in its parameters, and whose log density has
    none.

    The gradient of an ELBO of sampled log weights then has no score term, which has mean zero
    but positive variance: at q = p(z | x) the gradient is exactly zero for every draw.

    :func:`ppl_vae.objectives.gradients.sticking_the_landing` gives the same estimator for any
    guide, at the price of a second backward pass through the draws. Local guides need none,
    because they can build their distributions from detached parameters. Both are kept, since
    their gradients differ by rounding.

    Args:
        q: the distribution.
        detached: the same distribution with detached parameters.

    References:
        Roeder, Wu, Duvenaud: Sticking the landing (2017).
    """

    has_rsample = True

    def __init__(self, q: Density, detached: Density) -> None:
        self.q, self.detached = q, detached
        super().__init__(q.batch_shape, q.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint | None:
        """The support of q."""
        return self.q.support

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of q, differentiable in its parameters."""
        return self.q.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(value), differentiable in the value only."""
        return self.detached.log_prob(value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "StickTheLanding":
        """The same distribution with further batch dimensions."""
        return StickTheLanding(self.q.expand(batch_shape), self.detached.expand(batch_shape))
