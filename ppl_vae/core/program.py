"""The contract of models and guides: base class, plate over data, names.

A *program* is a callable ``program(x, ...)`` that consists of Pyro statements: a function, a bound
method or a ``PyroModule``. A *model* and a *guide* are programs whose sites are in the plate
``"data"``. Everything in the package takes such pairs; its own models and guides derive from
:class:`Program`.
"""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import pyro
import torch
from jaxtyping import Float, Int
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.config import ConstructorCall, constructor_call

ProgramLike: TypeAlias = Callable[..., Any]
"""Any Pyro program, which is a function, a bound method or a ``PyroModule``."""

if TYPE_CHECKING:
    from pyro.distributions import TorchDistribution

    Density: TypeAlias = TorchDistribution
else:  # the common base of Pyro's distributions at run time
    from pyro.distributions.torch_distribution import TorchDistributionMixin

    Density = TorchDistributionMixin

DATA_PLATE = "data"
_instances = itertools.count()


class Program(PyroModule):
    """A ``PyroModule`` whose root name no other instance in the process has.

    Pyro's parameter store finds parameters by name and replaces a module's parameter by a stored
    one of the same name. Two instances with one name would thus share, or silently not train,
    their parameters. The name is drawn from a counter at construction, deep copy and unpickling.

    A program that is fitted to a data frame keeps the names of its columns as ``schema``; columns
    of later frames are matched by name.
    """

    _constructor_call: ConstructorCall | None = None
    _schema: TableSchema | None = None

    def __init__(self) -> None:
        super().__init__(self._fresh_name())

    def __repr__(self) -> str:
        call = constructor_call(self)
        return super().__repr__() if call is None else repr(call)

    @property
    def schema(self) -> TableSchema | None:
        """The columns of the frame that the program was fitted to; None after arrays.

        A model shares it with its guide.
        """
        return self._schema

    @schema.setter
    def schema(self, schema: TableSchema | None) -> None:
        for part in self.modules():
            if isinstance(part, Program):
                part._schema = schema

    def config(self) -> dict[str, Any] | None:
        """The recorded arguments of the constructor, see :mod:`ppl_vae.core.config`.

        None if the constructor is not recorded.
        """
        call = constructor_call(self)
        return None if call is None else call.arguments

    def __getattr__(self, name: str) -> Any:
        # Pyro's store would make a frozen parameter require a gradient, and train it.
        parameter = self.__dict__.get("_parameters", {}).get(name)
        if parameter is not None and not parameter.requires_grad:
            return parameter
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_random(self, name, value)
        super().__setattr__(name, value)

    @classmethod
    def _fresh_name(cls) -> str:
        return f"{cls.__name__.lower()}_{next(_instances)}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A new PyroModule's context is fresh; a copied one counts as used under the old name.
        self._pyro_set_supermodule(self._fresh_name(), PyroModule()._pyro_context)

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        _rename(self, name, context)


def refuse_random(program: Program, name: str, value: Any) -> None:
    """Refuse a ``PyroSample``, or a module with one, as part of a program of the package."""
    random = name if isinstance(value, PyroSample) else None
    if isinstance(value, nn.Module):
        parts = value.named_modules()
        found = [
            f"{prefix}.{k}" for prefix, part in parts for k in vars(part).get("_pyro_samples", ())
        ]
        random = f"{name}.{found[0].lstrip('.')}" if found else None
    if random is not None:
        raise ValueError(
            f"{type(program).__name__}.{random} may not be a PyroSample: the program reads it "
            f"inside the plate {DATA_PLATE!r}, where it would be drawn for each row separately, "
            "not once for all data. Keep it a parameter, which fit_svi estimates (weight decay in "
            "the optimizer acts as a prior on it), or write a model that reads it before it "
            "enters the plate: there it is a global latent variable, which any pair may have"
        )


def _rename(module: PyroModule, name: str, context: Any) -> None:
    # Pyro's own version refuses modules that have run, which a deep copy of a trained model has.
    module._pyro_name, module._pyro_context = name, context
    for key, child in module._modules.items():
        if isinstance(child, PyroModule):
            _rename(child, f"{name}.{key}", context)


def data_plate(
    num_rows: int,
    *,
    index: Int[Tensor, " B"] | None = None,
    num_data: int | None = None,
    device: torch.device | None = None,
) -> pyro.plate:
    """The plate over data: rows ``index`` of ``num_data``, or all ``num_rows`` of them.

    Raises:
        ValueError: if ``index`` has another length than there are rows.
    """
    if index is not None and len(index) != num_rows:
        raise ValueError(
            f"index has {len(index)} entries for {num_rows} rows of x; "
            "it must say, for each row, which row of the whole data it is"
        )
    rows = torch.arange(num_rows, device=device) if index is None else index
    return pyro.plate(DATA_PLATE, num_data or num_rows, subsample=rows)


def count_rows(x: Tensor | None, num_data: int | None) -> int:
    """The number of rows a program draws: those of ``x``, or ``num_data`` without it.

    Raises:
        ValueError: if neither is given.
    """
    if x is None and num_data is None:
        raise ValueError("give x, or num_data=n to draw n rows from the prior")
    return len(x) if x is not None else int(num_data or 0)


def fold_rows(
    network: Callable[[Tensor], Tensor], values: Float[Tensor, "*B K"], width: int, name: str
) -> Float[Tensor, "*B W"]:
    """Apply a network made for 2-d input (rows, K) to values with any leading dimensions.

    Raises:
        ValueError: if it does not return (rows, width); ``name`` is its name in the message.
    """
    rows = values.reshape(-1, values.shape[-1])
    out = network(rows)
    if out.shape != (len(rows), width):
        raise ValueError(
            f"the {name} must return (rows, {width}); for {len(rows)} rows it returned "
            f"{tuple(out.shape)}"
        )
    return out.reshape(*values.shape[:-1], width)
