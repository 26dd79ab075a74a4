"""The generative program that the package's models share: z_n ~ p(z), x_n | z_n ~ p(x | z_n)."""

from abc import abstractmethod
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Int
from pyro.nn import pyro_method
from torch import Tensor, nn

from ppl_vae.core.arrays.inputs import as_rows
from ppl_vae.core.program import Density, Program, count_rows, data_plate
from ppl_vae.core.text_table import preformatted_html, render_html
from ppl_vae.core.validation import ArrayLike
from ppl_vae.likelihoods.base import Mask, RowTensor

Codes = Float[Tensor, "*B K"]
RowDensity = Callable[[Tensor | None, Tensor | None], Density]
"""p(x | ...) of x, zero where missing, and the mask, in the plate; x is None if it is drawn."""


class RowProgram(Program):
    """Abstract: a generative program of rows that are independent given its parameters."""

    data_dim: int

    @abstractmethod
    def density_in_plate(self, observe: bool) -> tuple[Tensor, RowDensity]:
        """A tensor of the program's dtype and device, and the density of rows in the plate.

        Called once per run, outside the plate, where the program's parameters are drawn.

        Args:
            observe: whether x is scored, or only informs the density of its rows.
        """

    @pyro_method
    def model(
        self,
        x: ArrayLike | None = None,
        *,
        mask: Bool[Tensor, "B D"] | None = None,
        index: Int[Tensor, " B"] | None = None,
        num_data: int | None = None,
        observe: bool = True,
    ) -> Tensor:
        """The generative model as a Pyro program, under the package's contract."""
        like, density = self.density_in_plate(observe)
        x = None if x is None else as_rows(x, like, self.data_dim, self.schema)
        rows = count_rows(x, num_data)
        with data_plate(rows, index=index, num_data=num_data, device=like.device):
            if mask is not None and x is not None:
                # NaN under a mask would still make the gradient NaN.
                x = torch.where(mask, x, 0.0)
            return pyro.sample("x", density(x, mask), obs=x if observe else None)

    def _repr_html_(self) -> str:
        """The constructor call, and a table of the parameters, in a notebook."""
        rows = [_parameter_cells(self, name) for name, _ in self.named_parameters()]
        table = render_html(rows, ("parameter", "shape", "value")) if rows else ""
        return preformatted_html(repr(self)) + table


class LatentVariableModel(RowProgram):
    """Abstract: one latent vector per datum, z ~ p(z), and a density of the datum, x ~ p(x | z).

    Attributes:
        data_dim: D.
        latent_dim: K.
    """

    latent_dim: int

    @abstractmethod
    def prior(self) -> Density:
        """p(z), event shape (K,)."""

    @abstractmethod
    def conditional(
        self, z: Codes, x: RowTensor | None = None, mask: Mask | None = None, observe: bool = False
    ) -> Density:
        """p(x | z), event shape (D,), as a differentiable function of z and the parameters.

        Args:
            z: codes, of the model's dtype.
            x: the rows that z belongs to, where there are any; entries where ``mask`` is False
                may hold any finite number.
            mask: True where x is observed; the density scores these entries only.
            observe: whether x is scored, or only informs the density of its rows (their totals).
        """

    def density_in_plate(self, observe: bool) -> tuple[Tensor, RowDensity]:
        """See :class:`RowProgram`; z is drawn in the plate."""
        like = reference_tensor(self)

        def density(x: Tensor | None, mask: Tensor | None) -> Density:
            scored = self._scored_entries(mask, like)
            z = pyro.sample("z", self.prior())
            return self.conditional(z.to(like.dtype), x, None if x is None else scored, observe)

        return like, density

    def _scored_entries(self, mask: Tensor | None, like: Tensor) -> Bool[Tensor, "*B D"] | None:
        """The entries of x that p(x | z) scores; None for all of them."""
        return mask


def _parameter_cells(module: nn.Module, name: str) -> tuple[str, str, str]:
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    # A PyroParam is stored without its constraint, under another name.
    if attribute.removesuffix("_unconstrained") in getattr(owner, "_pyro_params", ()):
        name, attribute = (text.removesuffix("_unconstrained") for text in (name, attribute))
    value = getattr(owner, attribute)
    shape = " × ".join(map(str, value.shape)) or "one number"
    return name, shape, "" if value.dim() else f"{float(value.detach()):.4g}"


def standard_normal(size: int, like: Tensor) -> Density:
    """N(0, I), event shape (size,), of a tensor's dtype and device.

    A scale of 1.0 would be copied to the device at each call.
    """
    return dist.Normal(like.new_zeros(size), like.new_ones(size)).to_event(1)


def reference_tensor(module: nn.Module) -> Tensor:
    """A module's first floating-point parameter, whose dtype and device are the module's.

    An empty tensor of the default dtype on the CPU if there is none.
    """
    return next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
