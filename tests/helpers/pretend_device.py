"""A pretended accelerator ``"gpu:0"``: true numbers, held on the CPU, under the rules of a GPU.

Tensors on it refuse what CUDA refuses: operations with tensors of another device, ``numpy()``, and
random numbers from a generator of another device. Whatever makes the host wait for a device is
counted, with the line of the package or of the tests that caused it. torch's Python backend for a
private device makes ``device="gpu:0"`` and ``torch.accelerator`` known; every operation is
computed by the CPU's own kernels, so that results have the CPU's bits.

Not covered are CUDA graphs, generated kernels, bf16 and tf32, memory and speed.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "gpu"
DEVICE = torch.device("cpu")  # until the backend is registered
TESTS = str(Path(__file__).parents[1]) + "/"
PACKAGE = str(Path(__file__).parents[2] / "ppl_vae") + "/"
IMPORTING = "<frozen importlib._bootstrap>"
OWN_FILES = {
    __file__,
    f"{TESTS}conftest.py",
    *(f"{TESTS}helpers/{name}.py" for name in ("digests", "pretend_run", "shapes")),
}

COPIES = {"aten._to_copy", "aten.copy_", "aten._pin_memory", "aten.is_pinned"}
READS = {
    "aten._local_scalar_dense",
    "aten.equal",
    "aten.is_nonzero",
    "aten.nonzero",
    "aten.masked_select",
    "aten._unique2",
    "aten.unique_dim",
    "aten.unique_consecutive",
    "aten.bincount",
    "aten.repeat_interleave",
    "aten._linalg_check_errors",
    "aten._linalg_eigh",
    "aten._linalg_svd",
    "aten.linalg_eig",
}
"""Operations whose results, or their shapes, or their errors, CUDA's host must wait for."""
INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}
"""Operations that take indices on the CPU."""
NO_SCALARS = {
    "aten.cat",
    "aten.stack",
    "aten.gather",
    "aten.index_select",
    "aten.index_copy",
    "aten.index_add",
    "aten.scatter",
    "aten.embedding",
}
"""Operations that refuse even a tensor of shape () on the CPU; others take it as a number."""
SIZED_WHEN_FILLED = ("arange", "linspace", "logspace", "eye", "randperm", "range")
"""Factories that make an empty tensor first, whose shape a wrapper would keep."""


@dataclass(frozen=True)
class Wait:
    """A place at which the host waits for the device.

    Attributes:
        kind: ``"read"`` of a value on the host, or ``"write"`` of values to the device.
        operation: what was called.
        place: ``file:line`` of the package or of a user's program.
    """

    kind: str
    operation: str
    place: str


@dataclass
class PretendedDevice:
    """What is known of the pretended accelerator of this process.

    Attributes:
        available: whether ``torch.accelerator`` reports it.
        waits: how often the host waited, by place; only while :func:`count_waits` is active.
        num_operations: operations on it.
        is_lenient: whether code of the tests, unlike the package's, may mix devices and read.
        unsupported: why the torch at hand has no such device; empty where it has.
    """

    available: bool = False
    waits: Counter[Wait] | None = None
    num_operations: int = 0
    is_lenient: bool = False
    unsupported: str = "it has not been registered"
    keep: list[Any] = field(default_factory=list)
    generators: Any = field(default_factory=WeakValueDictionary)


STATE = PretendedDevice()


class PretendTensor(torch.Tensor):
    """A tensor on ``"gpu:0"`` whose numbers are those of the CPU's tensor ``raw``."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> "PretendTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(op, args, kwargs or {})

    def __repr__(self) -> str:
        return f"{self.raw!r} on {DEVICE}"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else super().__format__(spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied: Tensor = PretendTensor(self.raw.detach().clone())
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            else:
                copied.requires_grad_(self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.raw.__reduce_ex__(protocol)  # as loaded with map_location="cpu"

    @property
    def data(self) -> Tensor:
        return PretendTensor(self.raw.data)  # with a version of its own, unlike detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        torch.Tensor.data.__set__(self, value)
        self.raw = value.raw

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        record_wait("read", "tolist")
        return self.raw.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force and not (STATE.is_lenient and in_tests()):
            raise TypeError(
                f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() to copy "
                "the tensor to host memory first."
            )
        record_wait("read", "numpy")
        return self.detach().raw.numpy()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy().__array__(*args, **kwargs)


def compute(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of an operation, with results on the pretended device where CUDA has them."""
    STATE.num_operations += 1
    name = name_of(op)
    on_device: list[PretendTensor] = []
    host: list[Tensor] = []
    raw_args = strip(args, on_device, host)
    raw_kwargs = {key: strip(value, on_device, host) for key, value in kwargs.items()}
    if host and on_device and name not in COPIES:
        check_devices(name, args, host)
    asked = kwargs.get("device")
    to_device = is_pretended(asked) if asked is not None else bool(on_device)
    if name == "aten.copy_":
        to_device = isinstance(args[0], PretendTensor)
    if kwargs.get("generator") is not None and to_device:
        check_generator(kwargs["generator"])
    if STATE.waits is not None:
        record_operation(name, args, kwargs, bool(on_device), to_device)
    out = op(*raw_args, **raw_kwargs)
    known = {id(tensor.raw): tensor for tensor in on_device} | {id(t): t for t in host}
    if not to_device:
        # Numbers that moved to the CPU must not share memory with those of the device.
        return out.clone() if isinstance(known.get(id(out)), PretendTensor) else out
    if name == "aten._to_copy":
        return PretendTensor(out.clone() if id(out) in known else out)
    return wrap(out, known)


@cache
def name_of(op: Any) -> str:
    return str(op.overloadpacket)


def strip(value: Any, on_device: list["PretendTensor"], host: list[Tensor]) -> Any:
    """The CPU's counterpart of an argument; its tensors are appended to the lists."""
    kind = type(value)
    if kind is PretendTensor:
        on_device.append(value)
        return value.raw
    if kind is list or kind is tuple:
        return kind([strip(part, on_device, host) for part in value])
    if isinstance(value, Tensor):
        host.append(value)
    return torch.device("cpu") if is_pretended(value) else value


def wrap(value: Any, known: dict[int, Tensor]) -> Any:
    """A result on the device; an argument that was written to is returned itself."""
    if isinstance(value, Tensor):
        if id(value) not in known:
            return PretendTensor(value)
        written = known[id(value)]
        if written.shape != value.shape:  # by squeeze_, for example
            torch.Tensor.data.__set__(written, PretendTensor(value))
        return written
    if isinstance(value, list | tuple):
        return type(value)([wrap(part, known) for part in value])
    return value


def is_pretended(device: Any) -> bool:
    return isinstance(device, torch.device) and device.type == NAME


def check_devices(name: str, args: Any, host: list[Tensor]) -> None:
    """Refuse tensors of the CPU, but for single numbers, indices, and what tests compare with."""
    if name in INDEXING:
        host = [t for t in (args[0], *args[2:3]) if not isinstance(t, PretendTensor)]
    least = 0 if name in NO_SCALARS else 1
    alien = [tensor for tensor in host if tensor.dim() >= least]
    if alien and not (STATE.is_lenient and in_tests()):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{DEVICE} and {alien[0].device}! ({name}; shape {tuple(alien[0].shape)})"
        )


def check_generator(generator: torch.Generator) -> None:
    """Refuse random numbers for the device from a generator of the CPU."""
    if STATE.is_lenient and in_tests():
        return
    made = STATE.generators.get(generator._cdata)
    if made is None or not (is_pretended(made.device) or made.of_tests):
        raise RuntimeError(
            f"Expected a '{NAME}' device type for generator but found '{generator.device}'"
        )


def record_operation(
    name: str, args: Any, kwargs: dict[str, Any], on_device: bool, to_device: bool
) -> None:
    """Count an operation for which the host waits."""
    if name in COPIES:
        source_on_device = isinstance(args[-1 if name == "aten.copy_" else 0], PretendTensor)
        if on_device and not to_device:
            record_wait("read", name)
        elif to_device and not source_on_device:
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if waits and args[-1 if name == "aten.copy_" else 0].numel():
                record_wait("write", name)
    elif name in READS or (name in INDEXING and has_mask(args[1])):
        record_wait("read", name)


def has_mask(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def record_wait(kind: str, operation: str) -> None:
    """Count that the host waits here."""
    if STATE.waits is not None:
        STATE.waits[Wait(kind, operation, calling_line())] += 1


def project_frames() -> Iterator[tuple[str, Any]]:
    """The frames of the package and of the tests, innermost first, with ``"package"`` or
    ``"tests"``."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if owner := owner_of(frame.f_code.co_filename):
            yield owner, frame
        elif frame.f_code.co_filename == IMPORTING:
            return  # what a library makes at its import is not made by who imports it
        frame = frame.f_back


@cache
def owner_of(file: str) -> str:
    """Whose code a file holds: ``"package"``, ``"tests"``, or ``""`` for libraries."""
    if file in OWN_FILES:
        return ""
    return "package" if file.startswith(PACKAGE) else "tests" if file.startswith(TESTS) else ""


def calling_line() -> str:
    """``file:line`` of the innermost code of the package or of the tests."""
    for _, frame in project_frames():
        file = Path(frame.f_code.co_filename).relative_to(Path(TESTS).parent)
        return f"{file}:{frame.f_lineno}"
    return "unknown:0"


def in_tests() -> bool:
    """Whether the innermost code, of the package or of the tests, is the tests'."""
    return next((owner == "tests" for owner, _ in project_frames()), False)


class PretendGenerator(torch.Generator):
    """A generator that draws on the CPU, and states the device that it was made for."""

    def __new__(cls, device: Any = None) -> "PretendGenerator":
        made = torch.device("cpu" if device is None else device)
        generator = super().__new__(cls, "cpu" if made.type == NAME else made)
        generator.pretended = DEVICE if made.type == NAME else made
        generator.of_tests = device is None and STATE.is_lenient and in_tests()
        STATE.generators[generator._cdata] = generator  # torch passes on another Python object
        return generator

    @property
    def device(self) -> torch.device:
        return self.pretended


class PretendModule:
    """``torch.gpu``: what torch asks of the module of a device."""

    def is_initialized(self) -> bool:
        return STATE.available

    def is_available(self) -> bool:
        return STATE.available

    def device_count(self) -> int:
        return int(STATE.available)

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: Any = None) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass  # its numbers are the CPU's

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def is_bf16_supported(self) -> bool:
        return True


def register() -> None:
    """Make the device known to torch, once per process.

    ``STATE.unsupported`` says why that was not possible: torch may lack the backend, and a
    process with a real accelerator keeps that one.
    """
    global DEVICE
    if not STATE.unsupported or STATE.keep:
        return
    setup = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if setup is None:
        STATE.unsupported = f"torch {torch.__version__} has no Python backend for private devices"
    elif torch.accelerator.is_available():
        STATE.unsupported = f"this machine has a {torch.accelerator.current_accelerator()}"
    else:
        # The first backward pass of a process starts a thread for each device that is known by
        # then, and a process with such threads cannot be forked: this one starts none.
        torch.ones((), requires_grad=True).backward()
        setup(NAME, backend_module=PretendModule())
        DEVICE = torch.device(NAME, 0)
        STATE.keep = list(kernel_libraries())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(1.0, device=DEVICE)
        STATE.unsupported = ""


def kernel_libraries() -> Iterator[Any]:
    """The kernels of factories, which have no tensor as argument and reach the device itself."""
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(lambda op, *args, **kwargs: compute(op, args, kwargs), "PrivateUse1")
    yield everything
    factories = torch.library.Library("aten", "IMPL")
    for name in SIZED_WHEN_FILLED:
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            if "out" not in overload:
                op = getattr(packet, overload)
                factories.impl(op, kernel(op), "PrivateUse1")
    yield factories


def kernel(op: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: compute(op, args, kwargs)


@contextmanager
def pretended_device(*, is_lenient: bool = False) -> Iterator[torch.device]:
    """The pretended accelerator is available inside.

    Args:
        is_lenient: whether code of the tests may mix devices and read values, as a test that
            compares results with numbers of its own does.
    """
    register()
    if STATE.unsupported:
        raise RuntimeError(f"there is no pretended accelerator: {STATE.unsupported}")
    before = STATE.available, STATE.is_lenient
    generator, pin = torch.Generator, torch.Tensor.pin_memory
    STATE.available, STATE.is_lenient = True, is_lenient
    torch.Generator, torch.Tensor.pin_memory = PretendGenerator, torch.Tensor.clone
    try:
        # The backward pass runs in the thread that asks for it, so that a wait has a place.
        with torch.autograd.set_multithreading_enabled(False):
            yield DEVICE
    finally:
        STATE.available, STATE.is_lenient = before
        torch.Generator, torch.Tensor.pin_memory = generator, pin


@contextmanager
def count_waits() -> Iterator[Counter[Wait]]:
    """Count, inside, where the host waits for the device."""
    before, STATE.waits = STATE.waits, Counter()
    try:
        yield STATE.waits
    finally:
        STATE.waits = before
