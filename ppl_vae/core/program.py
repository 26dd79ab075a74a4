"""The contract of models and guides: base class, plate over data, names, dtypes and devices.

A *program* is a callable ``program(x, ...)`` that consists of Pyro statements: a function, a bound
method or a ``PyroModule``. A *model* and a *guide* are programs whose sites are in the plate
``"data"``. Everything in the package takes such pairs; its own models and guides derive from
:class:`Program`.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import pyro
import torch
from jaxtyping import Bool, Float, Int
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule, PyroSample
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import _bound_partial
from torch import Tensor, nn

from ppl_vae.core.closures import used_modules
from ppl_vae.core.config import ConstructorCall, constructor_call
from ppl_vae.core.validation import ArrayLike, as_matrix, check_rows_observed, observed_mask

ProgramLike: TypeAlias = Callable[..., Any]
"""Any Pyro program: a function, a bound method, a ``PyroModule``."""

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
    """

    _constructor_call: ConstructorCall | None = None

    def __init__(self) -> None:
        super().__init__(self._fresh_name())

    def __repr__(self) -> str:
        call = constructor_call(self)
        return super().__repr__() if call is None else repr(call)

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
        _refuse_random(self, name, value)
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


def _refuse_random(program: Program, name: str, value: Any) -> None:
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
            "not once for all data. (Latent variables that all data share are not supported.) "
            "Keep it a parameter, which fit_svi estimates; weight decay in the optimizer acts as "
            "a prior on it"
        )


def check_parameters_not_random(*programs: ProgramLike) -> None:
    """Check that no attribute of the package's programs was replaced by a ``PyroSample``.

    Raises:
        ValueError: naming the attribute.
    """
    for program in own_modules(*programs):
        if isinstance(program, Program):
            for name, part in program.named_children():
                _refuse_random(program, name, part)


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


def accepted_kwargs(program: ProgramLike) -> tuple[set[str], bool]:
    """The keywords in a program's signature, and whether it takes any others (``**kwargs``)."""
    program = _inside_handlers(program)
    if isinstance(program, AutoGuide | GuideMessenger) and program._model is not None:
        return accepted_kwargs(program.model)  # they pass all keywords on to it
    target = program.forward if isinstance(program, nn.Module) else program
    parameters = inspect.signature(target).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def filter_kwargs(program: ProgramLike, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``keywords`` that are not None and that the program's signature takes."""
    named, anything = accepted_kwargs(program)
    return {k: v for k, v in keywords.items() if v is not None and (anything or k in named)}


def bound_object(program: ProgramLike) -> Any:
    """The object of a bound method, a module, or the function itself.

    ``functools.partial`` and Pyro's handlers (``poutine.condition(model, ...)``) are unwrapped.
    """
    while not isinstance(program := _inside_handlers(program), nn.Module):
        bound_to = getattr(program, "__self__", None)
        if bound_to is not None:
            return bound_to
        # A handler is a partial too, but of Pyro's own function: what it wraps comes first.
        inner = getattr(program, "__wrapped__", None) or getattr(program, "func", None)
        if inner is None:
            return program
        program = inner
    return program


def _inside_handlers(program: Any) -> Any:
    # A handler or plate called on a program gives _bound_partial(partial(wrap, handler, program)).
    while isinstance(program, _bound_partial):
        inner: Any = program.func
        program = inner.args[1]
    return program


def own_modules(*programs: ProgramLike) -> list[nn.Module]:
    """The modules that programs are, are methods of, or hold (as an ``ExactGuide`` its model)."""
    owners = [bound_object(program) for program in programs]
    parts = [part for owner in owners for part in (owner, *getattr(owner, "_held", ()))]
    return _distinct(part for part in parts if isinstance(part, nn.Module))


def modules_of(*programs: ProgramLike) -> list[nn.Module]:
    """:func:`own_modules`, and the modules that a plain function uses from around it."""
    around = [part for p in programs for part in used_modules(p, _home(p))]
    return _distinct([*own_modules(*programs), *around])


def _home(program: ProgramLike) -> str | None:
    return getattr(bound_object(program), "__module__", None)


def _distinct(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for module in modules}.values())


def notes_of(*programs: ProgramLike) -> tuple[str, ...]:
    """The caveats (``notes()``) that the programs' modules state about their numbers, each
    once."""
    parts = [part for module in modules_of(*programs) for part in module.modules()]
    owners = [bound_object(program) for program in programs]
    methods: list[Any] = [getattr(part, "notes", None) for part in (*owners, *parts)]
    lists: list[Any] = [notes() for notes in methods if callable(notes)]
    return tuple(dict.fromkeys(itertools.chain.from_iterable(lists)))


def tensors_of(*programs: ProgramLike) -> Iterator[Tensor]:
    """Parameters and buffers of the programs' modules, in order."""
    for module in modules_of(*programs):
        yield from itertools.chain(module.parameters(), module.buffers())


def placement(*programs: ProgramLike) -> dict[str, Any]:
    """``dtype`` and ``device`` of the programs' first floating-point tensor; empty without one."""
    for tensor in tensors_of(*programs):
        if tensor.is_floating_point():
            return {"dtype": tensor.dtype, "device": tensor.device}
    return {}


def as_data_and_mask(
    x: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    model: ProgramLike,
    guide: ProgramLike | None = None,
    name: str = "x",
) -> tuple[Float[Tensor, "N D"], Bool[Tensor, "N D"] | None]:
    """Data where a pair can use them: zeros in place of missing values, and the mask that says
    where they are.

    Args:
        x: the data; NaN marks a missing value.
        mask: True where observed, of x's shape; missing values are where it is False or x is NaN.
        model, guide: the pair, for dtype, device, and whether the model takes ``mask``.
        name: the name of x in messages.

    Returns:
        x with zeros in place of missing values, and the mask, or None if nothing is missing.

    Raises:
        ValueError: if something is missing and the model takes no ``mask``, if mask has another
            shape, or if a row has nothing observed; and as
            :func:`ppl_vae.core.validation.as_matrix`.
    """
    programs = [model] if guide is None else [model, guide]
    check_parameters_not_random(*programs)
    place = placement(*programs)
    if not place and not isinstance(x, Tensor):
        place = {"dtype": torch.get_default_dtype()}
    x = as_matrix(x, name=name, check_finite=True, **place)
    width = getattr(bound_object(model), "data_dim", x.shape[1])
    if x.shape[1] != width:
        raise ValueError(
            f"{name} must have shape (rows, {width}) for this model; it has {tuple(x.shape)}"
        )
    observed = observed_mask(x, mask, name=name)
    return (x, None) if observed is None else _with_zeros(x, observed, model, name)


def _with_zeros(
    x: Tensor, observed: Tensor, model: ProgramLike, name: str
) -> tuple[Tensor, Tensor]:
    if "mask" not in filter_kwargs(model, {"mask": observed}):
        raise ValueError(
            f"{name} has {int((~observed).sum())} missing entries, but the model takes no keyword "
            "'mask'; let it take one (p(x given z).mask(mask).to_event(1)), or fill the missing "
            "values"
        )
    check_rows_observed(observed, name=name)
    return torch.where(observed, x, torch.zeros_like(x)), observed


def check_support(model: ProgramLike, x: Tensor, mask: Tensor | None) -> None:
    """Call the model's ``check_data(x, mask)``, if it has one: it refuses data outside its
    support."""
    check = getattr(bound_object(model), "check_data", None)
    if check is not None:
        check(x, mask)


def notes_on(model: ProgramLike, x: Tensor, mask: Tensor | None) -> tuple[str, ...]:
    """The caveats of a model's ``notes_on(x, mask)`` about a fit to these data, if it has one."""
    notes = getattr(bound_object(model), "notes_on", None)
    return () if notes is None else tuple(notes(x, mask))


def as_rows(x: ArrayLike, like: Tensor, width: int | None = None) -> Tensor:
    """x as a program's own tensor: its dtype and device, 2-d, of the stated width.

    Raises:
        ValueError: if x is not 2-d or has another width.
    """
    x = x if isinstance(x, Tensor) else as_matrix(x)
    if x.dim() != 2 or (width is not None and x.shape[1] != width):
        raise ValueError(
            f"x must have shape (rows, {width or 'columns'}) here; it has shape {tuple(x.shape)}"
        )
    return x.to(like)
