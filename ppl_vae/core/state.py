"""Process-wide state, changed within a ``with`` block and restored after it.

This is random number generators, the parameter store, validation of arguments, training mode.

All of it belongs to the process, not to a thread. Each of these blocks is therefore
:func:`exclusive`: one thread at a time is inside any of them, and others wait.
"""

import os
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_vae.core.devices.accelerators import accelerators_in_use, check_precision
from ppl_vae.core.introspection import modules_of
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.validation import check_option

_LOCKS: dict[int, Any] = {}
"""The reentrant lock of each process: a forked child does not wait for threads of its parent."""


@contextmanager
def exclusive() -> Iterator[None]:
    """Wait until no other thread of this process is inside such a block, and keep others out.

    Blocks may be nested. Fits and evaluations in several threads thus run one after another, each
    with the result that it has alone. Pyro's own functions (``svi.step``) do not wait.
    """
    with _LOCKS.setdefault(os.getpid(), threading.RLock()):
        yield


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draws inside repeat for a seed; the global generators are restored.

    With ``None`` draws come from the global generators, as in any torch code.
    """
    if seed is None:
        with exclusive():
            yield
        return
    with kept_generators(accelerators_in_use()):
        seed_generators(seed)
        yield


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch; only inside :func:`seeded`."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def kept_generators(devices: list[Any]) -> Iterator[None]:
    """Restore the generators of Python, numpy and torch (on the CPU and these devices)."""
    with exclusive():
        python, numpy = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=devices):
            try:
                yield
            finally:
                random.setstate(python)
                np.random.set_state(numpy)


@contextmanager
def isolated_store() -> Iterator[None]:
    """Run programs in a parameter store of their own.

    Parameters of modules live in the modules: none that the store held before is visible inside,
    so names cannot collide, and none is left behind. Parameters made by a bare ``pyro.param`` live
    in the store alone: they are visible inside, and trained or new ones are kept.
    """
    store = pyro.get_param_store()
    with exclusive():
        inside: Any = _bare_parameters(store.get_state())
        try:
            with store.scope(inside):
                try:
                    yield
                finally:
                    inside.update(store.get_state())
        finally:
            bare = _bare_parameters(inside)
            if bare["params"]:
                store.set_state(bare)


def _bare_parameters(state: Any) -> Any:
    bare = {k: p for k, p in state["params"].items() if not isinstance(p, nn.Parameter)}
    return {"params": bare, "constraints": {k: state["constraints"][k] for k in bare}}


@contextmanager
def validation(enabled: bool) -> Iterator[None]:
    """Pyro's and torch's argument checks on or off; all flags are restored."""
    with exclusive():
        torch_flag = Distribution._validate_args
        try:
            with pyro.validation_enabled(enabled):
                yield
        finally:  # after Pyro's own exit, which sets torch's flag to Pyro's
            Distribution.set_default_validate_args(torch_flag)


def validation_enabled() -> bool:
    """Whether distributions check their arguments now, which costs time and reads values."""
    return bool(Distribution._validate_args)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Run torch on this number of threads: with small tensors a second one does not pay."""
    with exclusive():
        before = torch.get_num_threads()
        torch.set_num_threads(number)
        try:
            yield
        finally:
            torch.set_num_threads(before)


PRECISIONS = ("float32", "tf32", "bf16")
_ROUNDED = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")


@contextmanager
def without_stacks() -> Iterator[None]:
    """Keep ``traceback`` from extracting stacks, which torch does for each tensor that it traces.

    It takes a third of the time of recording a program, and more where the stack is deep.
    """
    with exclusive():
        before = vars(sys).get("tracebacklimit")
        sys.tracebacklimit = 0
        try:
            yield
        finally:
            if before is None:
                del sys.tracebacklimit
            else:
                sys.tracebacklimit = before


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """The precision of float32 matrix products and convolutions; all else stays float32.

    Args:
        name: ``"float32"``: not at all. ``"tf32"``: NVIDIA's tensor cores round the factors to
            10 bits. ``"bf16"``: factors and products have 7 bits, sums are float32.
        device: where the products are.

    Raises:
        ValueError: if the device does not compute in it: ``"tf32"`` needs a GPU of NVIDIA's from
            Ampere on.
    """
    check_option("precision", name, PRECISIONS)
    check_precision(name, device)
    if name == "float32":
        yield
    elif name == "bf16":
        with _Rounded():
            yield
    else:
        with exclusive():
            before = torch.get_float32_matmul_precision()
            try:
                torch.set_float32_matmul_precision("high")
                yield
            finally:
                torch.set_float32_matmul_precision(before)


class _Rounded(TorchDispatchMode):
    """Matrix products and convolutions, gradients' too, with factors rounded to bfloat16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        single = any(isinstance(a, Tensor) and a.dtype == torch.float32 for a in args)
        if not single or func.overloadpacket.__name__ not in _ROUNDED:
            return func(*args, **kwargs)
        rounded = [a.bfloat16() if isinstance(a, Tensor) else a for a in args]
        result = func(*rounded, **kwargs)
        if isinstance(result, Tensor):
            return result.float()
        return tuple(r.float() if isinstance(r, Tensor) else r for r in result)


@contextmanager
def train_mode(*programs: ProgramLike, training: bool) -> Iterator[None]:
    """Training or evaluation mode (dropout, batch norm) for the programs' modules."""
    parts = [part for module in modules_of(*programs) for part in module.modules()]
    with exclusive():
        before = [(part, part.training) for part in parts]
        try:
            for part in parts:
                part.training = training
            yield
        finally:
            for part, flag in before:
                part.training = flag


@contextmanager
def dry_run_eval(*programs: ProgramLike) -> Iterator[None]:
    """Run programs in evaluation mode for the shapes of their sites, see :func:`dry_run`.

    Modules that cannot be evaluated yet (those with a context ``dummy_scale()``) use a dummy.
    """
    with (
        dry_run(*programs),
        train_mode(*programs, training=False),
        _each_in("dummy_scale", *programs),
    ):
        yield


@contextmanager
def disable_patch_masking(*programs: ProgramLike) -> Iterator[None]:
    """Programs that mask parts of x (masked autoencoders) do not do so inside.

    They score all of x, and their codes are those of everything that is observed.
    """
    with _each_in("disable_patch_masking", *programs):
        yield


@contextmanager
def eval_mode(*programs: ProgramLike) -> Iterator[None]:
    """Evaluation mode, in which programs do not mask parts of x."""
    with train_mode(*programs, training=False), disable_patch_masking(*programs):
        yield


@contextmanager
def _each_in(context: str, *programs: ProgramLike) -> Iterator[None]:
    parts = [part for module in modules_of(*programs) for part in module.modules()]
    with ExitStack() as stack:
        stack.enter_context(exclusive())
        for part in {id(part): part for part in parts}.values():
            enter: Any = getattr(part, context, None)
            if enter is not None:
                stack.enter_context(enter())
        yield


@contextmanager
def dry_run(*programs: ProgramLike) -> Iterator[None]:
    """Run programs for their shapes: generators and buffers (batch norm) are restored."""
    buffers = [b for module in modules_of(*programs) for b in module.buffers()]
    devices = {b.device for m in modules_of(*programs) for b in (*m.parameters(), *buffers)}
    accelerators = [d for d in devices if d.type != "cpu"]
    with torch.no_grad(), kept_generators(accelerators), poutine.block():
        before = [b.clone() for b in buffers]
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
