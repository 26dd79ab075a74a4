"""The parameters of a pair, found by running it, and the check that each of them is trained."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_vae.core.introspection import modules_of, own_modules
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import validation


def find_parameters(pair: Pair, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The parameters of a pair by name, found by evaluating a loss and its gradient once.

    These are the parameters of the modules that the programs are or are methods of, and those
    that the run puts into the parameter store, all of which must be trained; and of the modules
    that a plain function reads from its surroundings those on which the loss depends.

    Args:
        pair: the pair.
        loss: evaluates the loss once, which runs the pair.

    Raises:
        ValueError: if there are none, one has no gradient, or one was replaced by the store's.
    """
    programs = pair.model, pair.guide
    before = _named(own_modules(*programs))
    saved = _saved_parameters(own_modules(*programs))
    with pair.dry_run(), torch.enable_grad(), validation(True):
        # The store may contain parameters of other pairs: only those that the run reads count.
        with poutine.trace(param_only=True) as touched:
            value = loss()
        own = _named(own_modules(*programs))
        _check_identity(before, own, saved)
        names = touched.trace.nodes.keys()
        stored = dict(pyro.get_param_store().named_parameters())
        stored = {name: parameter for name, parameter in stored.items() if name in names}
        required = _trainable(own | _others(stored, own))
        optional = _trainable(_others(_named(modules_of(*programs)), required))
        # Inside the block, which ends by restoring buffers that the gradient may need.
        gradients = _gradients(value, required | optional)
    untrained = [name for name in required if gradients[name] is None]
    if untrained:
        raise ValueError(
            f"parameters that the loss does not depend on would not train: {untrained[:5]}; use "
            "them in the model or the guide, remove them, or freeze them by requires_grad_(False)"
        )
    return required | {name: p for name, p in optional.items() if gradients[name] is not None}


def _named(modules: list[nn.Module]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for module in modules:
        prefix = getattr(module, "_pyro_name", "") or type(module).__name__.lower()
        while any(name.startswith(f"{prefix}.") for name in named):
            prefix += "'"
        new = _others(dict(module.named_parameters()), named)
        named |= {f"{prefix}.{name}": parameter for name, parameter in new.items()}
    return named


def _others(named: dict[str, Tensor], known: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = {id(parameter) for parameter in known.values()}
    return {name: p for name, p in named.items() if id(p) not in ids}


def _trainable(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def _saved_parameters(modules: list[nn.Module]) -> list[tuple[nn.Module, dict[str, Any]]]:
    return [(part, dict(part._parameters)) for module in modules for part in module.modules()]


def _check_identity(
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    saved: list[tuple[nn.Module, dict[str, Any]]],
) -> None:
    for name, parameter in before.items():
        if after.get(name) is not parameter:
            for part, parameters in saved:  # restored, so that a second fit is refused as well
                part._parameters.update(parameters)
            raise ValueError(
                f"parameter {name!r} was replaced by another of the same Pyro name when the pair "
                "ran, so one of the two would not train; give each PyroModule a name of its own "
                "(PyroModule('name'), or derive it from ppl_vae's Program)"
            )


def _gradients(value: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor | None]:
    if not named:
        raise ValueError(
            "the pair has no parameters to fit; register networks by pyro.module, or write the "
            "programs as methods of a PyroModule"
        )
    if not value.requires_grad:
        raise ValueError("the loss depends on no parameter; are the programs' results detached?")
    gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return dict(zip(named, gradients, strict=True))
