"""Names the tensor on another device that a program computes with, and the line that made it.

A tensor that a program makes without ``device=`` is on the CPU. torch reports a mix of devices
where two tensors meet, which is often in a library and far from that line. Therefore a program
that mixes devices is run once more, while the origin of each tensor is recorded.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ppl_vae.core.introspection import bound_object
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.traces import sites

MIXED = re.compile("same device|indices should be either on|device type for generator")
"""What torch's errors about several devices have in common."""
LIBRARIES = tuple(str(Path(str(module.__file__)).parent) for module in (torch, pyro))
CORE = str(Path(__file__).parents[1])
"""The folder of pairs and programs, whose code runs that of users."""


def is_device_mix(error: Exception) -> bool:
    """Whether an error says that tensors of several devices met."""
    return isinstance(error, RuntimeError) and MIXED.search(str(error)) is not None


def find_misplaced_site(trace: Trace, device: torch.device) -> tuple[str, Tensor] | None:
    """The first site with a tensor on another device than the data, and that tensor.

    Single numbers, of shape (), may be on the CPU.
    """
    for name, site in sites(trace).items():
        value: Any = site["value"]
        if _is_misplaced(value, device):
            return name, next(_misplaced(_tensors(site["fn"]), device), value)
        if device.type != "cpu":
            for tensor in _misplaced([*_tensors(site["fn"]), site["mask"]], device):
                return name, tensor
    return None


def describe_mix(
    name: str, program: ProgramLike, run: Callable[[], Any], device: torch.device
) -> str:
    """Run a program that mixes devices, and describe the tensor that is on another one.

    Args:
        name: ``"model"`` or ``"guide"``.
        program: the program.
        run: runs it; returns its trace, or raises torch's error.
        device: that of the data.
    """
    origins = _Origins(device)
    recorder = _SiteRecorder(device, origins)
    found = None
    try:
        with torch.no_grad(), origins, recorder:
            found = find_misplaced_site(run(), device)
    except RuntimeError:
        pass
    if found is None and recorder.misplaced is not None:
        found = recorder.site, recorder.misplaced
    site, tensor = found or (origins.site or recorder.site, origins.misplaced)
    what = "a tensor on another device"
    if tensor is not None:
        tensor, line = origins.of(tensor)
        what = f"a tensor of shape {tuple(tensor.shape)} on {tensor.device}"
        what += f", made at {line}" if line else _variable(tensor, program, origins)
    return (
        f"the {name} mixes devices at site {site!r}: x is on {device}, {what}. Make it there "
        "(device=x.device, x.new_zeros(...)), or let a module of the pair hold it as a buffer"
    )


def _variable(tensor: Tensor, program: ProgramLike, origins: "_Origins") -> str:
    for variable, value, owner in _variables(program):
        if value is tensor:
            return f", the variable {variable!r}{_assigned(owner, variable.split('.')[-1])}"
    return f", first used at {line}" if (line := origins.first_use(tensor)) else ""


class _Origins(TorchFunctionMode):
    """Records which line made each tensor on another device.

    Attributes:
        misplaced: the tensor on another device that the first failing operation was given.
        site: the site that this operation was for, as far as the source says.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.misplaced: Tensor | None = None
        self.site = ""
        self._origin: dict[int, tuple[Tensor, Tensor, str]] = {}
        self._first_use: dict[int, tuple[Tensor, str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_misplaced(tree_leaves((args, kwargs)), self.device))
        for tensor in given:
            if id(tensor) not in self._origin and id(tensor) not in self._first_use:
                self._first_use[id(tensor)] = tensor, _calling_line()
        try:
            result = func(*args, **kwargs)
        except RuntimeError:
            if self.misplaced is None:
                self.misplaced = next(iter(given), None)
                self.site = _site_of_statement()
            raise
        for tensor in _misplaced(tree_leaves(result), self.device):
            first, line = self.of(given[0]) if given else (tensor, _calling_line())
            self._origin[id(tensor)] = tensor, first, line
        return result

    def record(self, tensor: Tensor) -> None:
        """Let the line that is executed be the one that made a tensor, unless it is known."""
        if not self.of(tensor)[1]:  # a constrained parameter was computed from another tensor
            self._origin[id(tensor)] = tensor, tensor, _calling_line()

    def of(self, tensor: Tensor) -> tuple[Tensor, str]:
        """The first tensor that a tensor was computed from, and the line that made it; an empty
        line for one that was made before."""
        return self._origin.get(id(tensor), (tensor, tensor, ""))[1:]

    def first_use(self, tensor: Tensor) -> str:
        """The line that was the first to compute with a tensor that was made before."""
        return self._first_use.get(id(tensor), (tensor, ""))[1]


class _SiteRecorder(Messenger):
    """Keeps the site at which a program is, and the first value drawn on another device.

    Parameters of the parameter store that are on another device are recorded as made where the
    program asks for them.
    """

    def __init__(self, device: torch.device, origins: _Origins) -> None:
        super().__init__()
        self.device, self.origins, self.site = device, origins, "(before the first one)"
        self.misplaced: Tensor | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if self.misplaced is None and not site_is_subsample(msg):
            self.site = msg["name"]

    def _pyro_post_param(self, msg: Any) -> None:
        if _is_misplaced(msg["value"], self.device):
            self.origins.record(msg["value"])

    def _pyro_post_sample(self, msg: Any) -> None:
        is_first = self.misplaced is None and not site_is_subsample(msg)
        if is_first and _is_misplaced(msg["value"], self.device):
            self.site, self.misplaced = msg["name"], msg["value"]


def _is_misplaced(value: Any, device: torch.device) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.device != device


def _misplaced(values: Any, device: torch.device) -> Iterator[Tensor]:
    return (value for value in values if _is_misplaced(value, device))


def _tensors(fn: Any) -> Iterator[Tensor]:
    """The tensors of a distribution, and of those that it is made of."""
    for value in list(vars(fn).values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, torch.distributions.Distribution):
            yield from _tensors(value)


def _frames() -> Iterator[Any]:
    """The frames of code that is neither a library's nor in ``CORE``, innermost first."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith((*LIBRARIES, CORE, "<")):
            yield frame
        frame = frame.f_back


def _calling_line() -> str:
    """``file:line`` of the innermost such code."""
    frame = next(_frames(), None)
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _site_of_statement() -> str:
    """The name in the next ``sample`` statement at or after the line that is executed."""
    for frame in _frames():
        try:
            lines, start = inspect.getsourcelines(frame.f_code)
            tree = ast.parse(textwrap.dedent("".join(lines)))
        except (OSError, SyntaxError):
            continue
        line = frame.f_lineno - start + 1
        names = [
            (node.lineno, node.args[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] == "sample"
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and (node.end_lineno or 0) >= line
        ]
        if names:
            return str(min(names)[1])
    return ""


def _variables(program: ProgramLike) -> Iterator[tuple[str, Tensor, Any]]:
    """The tensors in the variables around a program and of its file, and in the attributes of the
    object that it belongs to: name, tensor, and the object whose source assigns to the name."""
    function: Any = program.forward if isinstance(program, nn.Module) else program
    function = getattr(inspect.unwrap(function), "__func__", inspect.unwrap(function))
    owner = bound_object(program)
    if inspect.isfunction(function):
        around = inspect.getclosurevars(function).nonlocals
        for name, value in [*around.items(), *function.__globals__.items()]:
            yield from _held(name, value, owner)
    if not inspect.isfunction(owner):
        for name, value in getattr(owner, "__dict__", {}).items():
            yield from _held(name, value, owner)


def _held(name: str, value: Any, owner: Any, depth: int = 4) -> Iterator[tuple[str, Tensor, Any]]:
    """The tensors of a variable: itself, or in containers, modules and distributions."""
    if isinstance(value, Tensor):
        yield name, value, owner
    elif depth and isinstance(value, nn.Module):
        tensors = [*value.named_parameters(), *value.named_buffers()]
        attributes = [(k, part) for k, part in vars(value).items() if not k.startswith("_")]
        for key, part in [*tensors, *attributes]:
            yield from _held(f"{name}.{key}", part, value, depth - 1)
    elif depth and isinstance(value, list | tuple | dict):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _held(f"{name}[{key!r}]", part, owner, depth - 1)
    elif depth and isinstance(value, torch.distributions.Distribution):
        for part in vars(value).values():
            yield from _held(name, part, owner, depth - 1)


def _assigned(owner: Any, name: str) -> str:
    """Where the source of a function or of an object's class last assigns to a name, before the
    end of it, as text; empty for code of a library."""
    kind = owner if inspect.isfunction(owner) else type(owner)
    try:
        file = inspect.getsourcefile(kind)
        tree = ast.parse(Path(str(file)).read_text())
        lines, start = inspect.getsourcelines(kind)
    except (OSError, TypeError, SyntaxError):
        return ""
    found = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and name == (node.id if isinstance(node, ast.Name) else node.attr)
        and node.lineno < start + len(lines)
    ]
    is_known = bool(found) and not str(file).startswith(LIBRARIES)
    return f", made at {file}:{max(found)}" if is_known else ""
