"""``pytest --digests FILE``: digests of all numbers that the package returned to each test.

Two runs of the same tests are compared by them: a CPU's and a pretended accelerator's. On the CPU
products and eigenvalues are then torch's, as on an accelerator, instead of numpy's, which differ
in rounding; nothing else is changed.
"""

import dataclasses
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pretend_device
from pretend_device import PretendTensor, owner_of

NOT_REPEATED = ("second", "elapsed", "time", "speed", "created", "memory")
"""Parts of the names of entries that differ from run to run."""
MOST_DEPTH = 8


class Digest:
    """A digest of the numbers in a value, whatever device they are on.

    Attributes:
        num_arrays: how many arrays of floating point numbers there are.
        num_floats: how many other floating point numbers.
    """

    def __init__(self) -> None:
        self.sum, self.num_arrays, self.num_floats = hashlib.sha1(), 0, 0
        self._visited: dict[int, Any] = {}

    def add(self, value: Any, depth: int = 0) -> None:
        """Add a value; strings, functions and objects of other libraries have no numbers."""
        if isinstance(value, torch.Tensor):
            self._add_tensor(value)
        elif isinstance(value, np.ndarray | np.generic):
            self._add_array(np.asarray(value))
        elif isinstance(value, bool | int | float | complex) or value is None:
            self.sum.update(repr(value).encode())
            self.num_floats += isinstance(value, float)
        elif depth < MOST_DEPTH and id(value) not in self._visited:
            self._visited[id(value)] = value
            for name, part in parts_of(value):
                if not any(word in name for word in NOT_REPEATED):
                    self.sum.update(name.encode())
                    self.add(part, depth + 1)

    def _add_tensor(self, value: torch.Tensor) -> None:
        raw = value.raw if isinstance(value, PretendTensor) else value
        if raw.layout != torch.strided or raw.device.type != "cpu" or raw.is_quantized:
            return
        raw = raw.detach().resolve_conj().resolve_neg().contiguous()
        self.sum.update(f"{raw.dtype}{tuple(raw.shape)}".encode())
        if type(raw) in (torch.Tensor, nn.Parameter):
            known = raw.float() if raw.dtype == torch.bfloat16 else raw  # unknown to numpy
            self.sum.update(known.numpy().tobytes())
            self.num_arrays += raw.is_floating_point() and raw.numel() > 0

    def _add_array(self, value: np.ndarray) -> None:
        if value.dtype.kind in "biufc":
            self.sum.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
            self.num_arrays += value.dtype.kind == "f" and value.size > 0


def parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    """The named parts of a container, of a module, and of a result of the package."""
    if isinstance(value, nn.Module):
        yield from value.state_dict().items()
    elif isinstance(value, dict):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(i), part) for i, part in enumerate(value))
    elif type(value).__module__.split(".")[0] == "pandas" and hasattr(value, "to_numpy"):
        yield "numbers", value.to_numpy()
    elif dataclasses.is_dataclass(value) and type(value).__module__.startswith("ppl_vae"):
        yield from vars(value).items() if hasattr(value, "__dict__") else ()
    elif isinstance(owner := getattr(value, "__self__", None), nn.Module):
        yield "owner", owner


class Recorder:
    """Traces the functions of the package that a test calls, and digests what they return.

    Parameters of modules among their arguments are digested, too, because fits change them, and
    at its end the variables of the test.

    Args:
        test: the code of the test.
    """

    def __init__(self, test: Any = None) -> None:
        self.test = test
        self.results: list[tuple[str, str]] = []
        self.num_arrays = 0
        self._is_busy = False

    def on_call(self, frame: Any, event: str, _: Any) -> Any:
        """The local tracer of the test, and of a function that it calls; None for others."""
        code = frame.f_code
        if self._is_busy or not (code is self.test or self._is_called_by_tests(frame)):
            return None
        frame.f_trace_lines = False
        return self.on_return

    def _is_called_by_tests(self, frame: Any) -> bool:
        if owner_of(frame.f_code.co_filename) != "package":
            return False
        caller = frame.f_back
        while caller is not None and is_check(caller.f_code.co_filename):
            caller = caller.f_back
        return caller is not None and owner_of(caller.f_code.co_filename) == "tests"

    def on_return(self, frame: Any, event: str, value: Any) -> Any:
        """Digest what a function returns, and the modules that it was given."""
        code = frame.f_code
        if event == "return" and not self._is_busy:
            if code is self.test:
                self.record("the test's variables", dict(frame.f_locals))
            else:
                names = code.co_varnames[: code.co_argcount]
                given = (frame.f_locals.get(name) for name in names)
                self.record(code.co_qualname, [value, *filter(holds_parameters, given)])
        return self.on_return

    def record(self, name: str, value: Any) -> None:
        """Append the digest of a value, if it has floating point numbers."""
        self._is_busy, digest = True, Digest()
        waits, pretend_device.STATE.waits = pretend_device.STATE.waits, None
        operations = pretend_device.STATE.num_operations
        try:
            digest.add(value)
        finally:
            self._is_busy = False
            pretend_device.STATE.waits = waits
            pretend_device.STATE.num_operations = operations
        self.num_arrays += digest.num_arrays
        if digest.num_arrays or digest.num_floats:
            self.results.append((name, digest.sum.hexdigest()[:16]))


def is_check(file: str) -> bool:
    """Whether code is around a function of the package: checks of types, and ``no_grad``."""
    around = file in pretend_device.OWN_FILES or file.startswith("<@beartype")
    return around or file.endswith("/_contextlib.py")


def holds_parameters(value: Any) -> bool:
    return isinstance(getattr(value, "__self__", value), nn.Module)


@contextmanager
def products_of_torch() -> Iterator[None]:
    """Products and eigenvalues on a CPU are torch's."""
    from ppl_vae.models.linear import eigen

    replaced = {"product": torch.matmul, "symmetric_eigen": torch.linalg.eigh}
    patch = pytest.MonkeyPatch()
    for name, function in replaced.items():
        own = getattr(eigen, name)
        for module in [m for n, m in sys.modules.items() if n.startswith("ppl_vae")]:
            if getattr(module, name, None) is own:
                patch.setattr(module, name, function)
    try:
        yield
    finally:
        patch.undo()


class DigestPlugin:
    """Writes one line for each test: its outcome, operations on the device, and digests."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("w")
        self._start, self._recorder = 0, Recorder()

    def pytest_runtest_setup(self, item: Any) -> None:
        test = getattr(getattr(item, "obj", None), "__code__", None)
        self._start, self._recorder = pretend_device.STATE.num_operations, Recorder(test)
        random.seed(0)  # for tests that draw without a seed
        np.random.seed(0)
        torch.manual_seed(0)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: Any) -> Iterator[None]:
        sys.settrace(self._recorder.on_call)
        yield
        sys.settrace(None)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Iterator[None]:
        outcome = yield
        report = outcome.get_result()
        if report.when == "call" or not report.passed:
            line = {
                "test": item.nodeid,
                "outcome": report.outcome
                if report.when == "call"
                else f"{report.outcome} in setup",
                "reason": str(report.longrepr)[-300:] if not report.passed else "",
                "operations": pretend_device.STATE.num_operations - self._start,
                "arrays": int(self._recorder.num_arrays),
                "results": self._recorder.results,
            }
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def pytest_unconfigure(self) -> None:
        self.file.close()
