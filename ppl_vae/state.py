"""Process-wide state, borrowed and given back: generators, parameter store, validation, modes.

Nothing in the package changes any of these for longer than a ``with`` block.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import nn
from torch.distributions import Distribution

from ppl_vae.program import ProgramLike, modules_of


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draws inside repeat for a seed, and the global generators are left as they were found.

    ``None`` draws from the global generators, as any torch code does.
    """
    if seed is None:
        yield
        return
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with _kept_generators(list(devices)):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


@contextmanager
def _kept_generators(devices: list[Any]) -> Iterator[None]:
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

    Parameters of modules live in the modules: the block sees none that the store held before, so
    names cannot collide, and leaves none behind. Parameters made by a bare ``pyro.param`` have
    no home but the store: the block starts from them and gives them back, trained or new.
    """
    store = pyro.get_param_store()
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
    """Pyro's and torch's argument checks on or off; all flags are given back as they were."""
    torch_flag = Distribution._validate_args
    try:
        with pyro.validation_enabled(enabled):
            yield
    finally:  # after Pyro's own exit, which sets torch's flag to Pyro's
        Distribution.set_default_validate_args(torch_flag)


def validating() -> bool:
    """Whether arguments are checked here, which costs time and reads values."""
    return bool(Distribution._validate_args)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Run torch on so many threads: where tensors are small, a second one is only waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def mode(*programs: ProgramLike, training: bool) -> Iterator[None]:
    """Training or evaluation mode (dropout, batch norm) for the programs' modules."""
    parts = [part for module in modules_of(*programs) for part in module.modules()]
    before = [(part, part.training) for part in parts]
    try:
        for part in parts:
            part.training = training
        yield
    finally:
        for part, flag in before:
            part.training = flag


@contextmanager
def probing(*programs: ProgramLike) -> Iterator[None]:
    """Run a pair only to look at it: generators and buffers (batch norm) end as they began."""
    buffers = [b for module in modules_of(*programs) for b in module.buffers()]
    before = [b.clone() for b in buffers]
    devices = {b.device for m in modules_of(*programs) for b in (*m.parameters(), *buffers)}
    cuda = [d for d in devices if d.type == "cuda"]
    with torch.no_grad(), _kept_generators(cuda), poutine.block():
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
