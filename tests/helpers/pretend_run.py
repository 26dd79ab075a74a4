"""``pytest --pretend-gpu``: tests that name no device run with their tensors on a pretended one.

Tensors that tests make, and modules that they make themselves or by the package's models, guides
and networks, are on the device. Whatever else the package makes is where the package puts it, so
that a factory without ``device=`` is found out. Tests may compare results with numbers of their
own without moving them.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map

from pretend_device import PretendTensor, Wait, in_tests, pretended_device, project_frames

BUILDERS = tuple(
    f"/ppl_vae/{name}/" for name in ("core", "networks", "likelihoods", "guides", "models")
)
"""Folders whose functions make modules; those that tests call make them for the tests."""

ON_THE_CPU = tuple(
    f"/ppl_vae/{name}/" for name in ("cli", "data", "fitted", "interop", "plots", "report")
)
"""Folders whose functions take tables, and compute with them on the CPU."""
CONVERTER = "/ppl_vae/core/validation.py"
"""The module that makes tensors of the arrays that the package is given."""


class TestsFactories(TorchFunctionMode):
    """Tensors that code of the tests makes, for which it names no device, are on the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.factories = device, set(_device_constructors())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.factories and kwargs.get("device") is None and self._is_of_tests(func):
            kwargs["device"] = self.device
        return func(*args, **kwargs)

    def _is_of_tests(self, func: Any) -> bool:
        """Whether tests call a factory, or the package converts an array that they pass."""
        owner, frame = next(project_frames(), ("", None))
        if owner == "package" and func is torch.as_tensor:
            is_converter = frame.f_code.co_filename.endswith(CONVERTER)
            return is_converter and not is_called_in(ON_THE_CPU)
        return owner == "tests"


@contextmanager
def arrays_on(device: torch.device) -> Iterator[None]:
    """Arrays that tests convert are on the device; comparisons take results of any device."""
    convert, compare = torch.from_numpy, torch.testing.assert_close

    def from_numpy(array: Any) -> torch.Tensor:
        return convert(array).to(device) if in_tests() else convert(array)

    def assert_close(actual: Any, expected: Any, **options: Any) -> None:
        compare(*tree_map(on_host, (actual, expected)), **options)

    torch.from_numpy, torch.testing.assert_close = from_numpy, assert_close
    try:
        yield
    finally:
        torch.from_numpy, torch.testing.assert_close = convert, compare


def on_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, PretendTensor) else value


def is_made_for_tests() -> bool:
    """Whether a module is made by a test, or by a function of :data:`BUILDERS` that it calls."""
    return is_called_in(BUILDERS, otherwise=True)


def is_called_in(folders: tuple[str, ...], *, otherwise: bool = False) -> bool:
    """Whether the function of the package that a test has called is in one of these folders.

    Args:
        folders: the folders.
        otherwise: the answer where no function of the package is active.
    """
    entry = None
    for owner, frame in project_frames():
        if owner == "tests":
            break
        entry = frame.f_code.co_filename
    return otherwise if entry is None else any(name in entry for name in folders)


def is_on_cpu(tensor: Any) -> bool:
    """Whether a tensor is on the CPU, and not on the pretended device."""
    is_tensor = isinstance(tensor, torch.Tensor) and not isinstance(tensor, PretendTensor)
    return is_tensor and tensor.device.type == "cpu"


def stays_on_cpu(module: nn.Module) -> bool:
    """Whether a module was moved to the CPU, as one that is made like a table on the CPU is."""
    return any(map(is_on_cpu, (*module._parameters.values(), *module._buffers.values())))


@contextmanager
def modules_on(device: torch.device) -> Iterator[None]:
    """Parameters and buffers of modules that are made for tests are on the device."""
    parameter, buffer = nn.Module.register_parameter, nn.Module.register_buffer

    def move(module: nn.Module, tensor: Any) -> None:
        if is_on_cpu(tensor) and not stays_on_cpu(module) and is_made_for_tests():
            moved = tensor.detach().to(device)
            if isinstance(tensor, nn.Parameter):
                moved = nn.Parameter(moved, tensor.requires_grad)
            torch.utils.swap_tensors(tensor, moved)

    def register_parameter(self: Any, name: str, param: Any) -> None:
        move(self, param)
        parameter(self, name, param)

    def register_buffer(self: Any, name: str, tensor: Any, persistent: bool = True) -> None:
        move(self, tensor)
        buffer(self, name, tensor, persistent)

    nn.Module.register_parameter, nn.Module.register_buffer = register_parameter, register_buffer
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.Module.register_buffer = parameter, buffer


@contextmanager
def sizes_of_the_cpu() -> Iterator[None]:
    """As many rows go through a pair at once as on the CPU, so that draws are the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of an import, which pytest does not filter here
        from ppl_vae.evaluation.marginal_likelihood import batching

    limits = batching.ROWS_AT_ONCE, batching.ENTRIES_AT_ONCE
    before = [dict(limit) for limit in limits]
    for limit in limits:
        limit["accelerator"] = limit["cpu"]
    try:
        yield
    finally:
        for limit, values in zip(limits, before, strict=True):
            limit.update(values)


@contextmanager
def on_pretended_device() -> Iterator[None]:
    """Whatever tests make, from their import on, is on the pretended device."""
    with ExitStack() as stack:
        stack.enter_context(sizes_of_the_cpu())
        device = stack.enter_context(pretended_device(is_lenient=True))
        for context in (modules_on(device), arrays_on(device), TestsFactories(device)):
            stack.enter_context(context)
        yield


def counted_report(waits: Counter[Wait], most: int = 40) -> list[str]:
    """Lines of a report: where the package made the host wait for the device, most often first."""
    inside = [(wait, n) for wait, n in waits.most_common() if wait.place.startswith("ppl_vae/")]
    total = sum(number for _, number in inside)
    lines = [f"the host waited {total} times for the device, at {len(inside)} places"]
    return lines + [f"{n:9d} {w.kind} {w.operation} {w.place}" for w, n in inside[:most]]
