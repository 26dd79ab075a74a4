"""Guides with a distribution of its own for every datum: what both kinds of them share."""

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

from ppl_vae.core.program import DATA_PLATE, Density, Program
from ppl_vae.core.traces import Site

LARGEST_LOSS = 0.03
"""By so much a standard normal number may be off that comes back from a draw made of it."""


@dataclass(frozen=True)
class Place:
    """A site's name and the plates it stands in: name, size, rows (None: all) and dim of each."""

    name: str
    plates: list[tuple[str, int, Tensor | None, int]]

    @classmethod
    def of(cls, trace: Any, site: Site) -> Self:
        """The place of a site of a trace."""
        found = [
            (f.name, f.full_size or f.size, _rows(trace, f), f.dim)
            for f in sorted(site["cond_indep_stack"], key=lambda f: f.dim)
            if f.vectorized
        ]
        return cls(site["name"], found)

    def rows(self) -> dict[str, Tensor]:
        """The rows of each plate that names them."""
        return {f"rows_{name}": rows for name, _, rows, _ in self.plates if rows is not None}

    def on(self, rows: dict[str, Tensor]) -> Self:
        """The same with other tensors for its rows."""
        plates = [(name, n, rows.get(f"rows_{name}"), dim) for name, n, _, dim in self.plates]
        return replace(self, plates=plates)

    def repeated(self, repeats: int) -> Self:
        """The same for data each of whose rows comes so many times."""
        if repeats == 1:
            return self
        plates = []
        for name, size, rows, dim in self.plates:
            if name == DATA_PLATE:
                rows = torch.arange(size) if rows is None else rows
                rows = rows.repeat(repeats)
            plates.append((name, size, rows, dim))
        return replace(self, plates=plates)

    def stretched(self, tensor: Tensor, repeats: int, rank: int) -> Tensor:
        """A tensor for the data as one for repeated data; it has ``rank`` dims right of plates."""
        if repeats == 1:
            return tensor
        axis = next(dim for name, _, _, dim in self.plates if name == DATA_PLATE)
        return torch.cat([tensor] * repeats, axis - rank)


def _rows(trace: Any, frame: Any) -> Tensor | None:
    node = trace.nodes.get(frame.name)
    rows = None if node is None else node["value"]
    return rows if isinstance(rows, Tensor) else None


class LocalGuide(Program):
    """Abstract: one distribution for every datum and latent site, with free numbers.

    Args:
        num_rows: how many rows of data it is for.
        places: of its sites, in their order.
        held: the fixed tensors of each site, by name.
    """

    def __init__(
        self, num_rows: int, places: Sequence[Place], held: Sequence[Mapping[str, Tensor]]
    ) -> None:
        super().__init__()
        self._num_rows = num_rows
        self._places = list(places)
        self._names = [list(tensors) for tensors in held]
        # All are buffers, so that what reads a program's tensors finds them.
        for which, (place, tensors) in enumerate(zip(places, held, strict=True)):
            for name, tensor in {**tensors, **place.rows()}.items():
                kept = tensor.detach().clone(memory_format=torch.contiguous_format)
                self.register_buffer(f"{name}_{which}", kept)

    @abstractmethod
    def density(self, which: int, *, repeats: int = 1, still: bool = False) -> Density:
        """The distribution of one of its sites.

        Args:
            which: its number in the order of the sites.
            repeats: how many times each row of the data comes.
            still: with free numbers that take no gradient.
        """

    def forward(self, x: Tensor, **_: Any) -> None:
        """The guide as a Pyro program, for the rows that it was made for."""
        repeats = len(x) // self._num_rows
        plates: dict[str, pyro.plate] = {}
        for which in range(len(self._places)):
            q = self.density(which, repeats=repeats)
            still = self.density(which, repeats=repeats, still=True)
            with ExitStack() as stack:
                for name, size, rows, dim in self._place(which).repeated(repeats).plates:
                    if name not in plates:
                        plates[name] = pyro.plate(name, size, subsample=rows, dim=dim)
                    stack.enter_context(plates[name])
                self._sample(which, StickTheLanding(q, still))

    def _sample(self, which: int, q: Density) -> None:
        pyro.sample(self._places[which].name, q)

    def _fixed(self, which: int) -> dict[str, Tensor]:
        return {name: getattr(self, f"{name}_{which}") for name in self._names[which]}

    def _place(self, which: int) -> Place:
        place = self._places[which]
        return place.on({name: getattr(self, f"{name}_{which}") for name in place.rows()})

    def check_figures(self) -> None:
        """Check that draws of each Gaussian can be told from one another by its density.

        Raises:
            FloatingPointError: if a covariance is so nearly singular that they cannot, in its
                dtype; weights would be anything then, far above one too.
        """
        for which, place in enumerate(self._places):
            q = self.density(which, still=True)
            if not isinstance(q, dist.MultivariateNormal):
                continue
            factor = q.scale_tril
            ones = torch.ones_like(factor[..., :1])
            again = torch.linalg.solve_triangular(factor, factor @ ones, upper=False)
            lost = ~((again - ones).abs() < LARGEST_LOSS).all(-1).all(-1)
            if num_lost := int(lost.sum()):
                raise FloatingPointError(
                    f"the refined q of site {place.name!r} is nearly singular for {num_lost} of "
                    f"{lost.numel()} data: {factor.dtype} has no figures left for its density. "
                    "Use covariance='diagonal', fewer steps, or the pair in float64: .double()"
                )


class StickTheLanding(TorchDistribution):
    """Draws from q with q's gradient, and q's log density without it.

    The gradient of an ELBO of sampled log weights then has no score term, whose mean is zero
    but whose variance is not: at q = p(z | x) the gradient is exactly zero for every draw.

    Args:
        q: the distribution.
        still: the same one with parameters that have no gradient.

    References:
        Roeder, Wu, Duvenaud: Sticking the landing (2017).
    """

    has_rsample = True

    def __init__(self, q: Density, still: Density) -> None:
        self.q, self.still = q, still
        super().__init__(q.batch_shape, q.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint | None:
        """That of q."""
        return self.q.support

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, differentiable in q's parameters."""
        return self.q.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(value), differentiable in the value alone."""
        return self.still.log_prob(value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "StickTheLanding":
        """The same distribution with further batch dimensions."""
        return StickTheLanding(self.q.expand(batch_shape), self.still.expand(batch_shape))
