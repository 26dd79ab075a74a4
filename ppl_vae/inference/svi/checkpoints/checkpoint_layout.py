"""The content that a checkpoint of a fit can have: each entry's type, size and relation to others.

A file with a right checksum may still hold anything. What is checked here can be restored.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_vae.inference.svi.steps.capture_policy import MAX_UNROLL


@dataclass(frozen=True)
class FitLayout:
    """What the content of a checkpoint must fit to.

    Attributes:
        state: every tensor of the pair that the fit changes.
        optimizer: the state of such an optimizer after a step; None if it is not known.
        num_groups: the number of its groups of parameters.
        has_scheduler: whether there is a scheduler.
        has_validation: whether there are validation rows.
    """

    state: list[Tensor]
    optimizer: dict[str, Any] | None
    num_groups: int
    has_scheduler: bool
    has_validation: bool

    def wrong_entry(self, content: dict[str, Any]) -> str | None:
        """The name of the first entry that cannot be restored; None if there is none."""
        for name, is_right in _CHECKS.items():
            try:
                if not is_right(self, content[name], content):
                    return name
            except Exception:  # of any value that a file may hold
                return name
        return None


def is_alike(template: Any, value: Any) -> bool:
    """Whether a value has the structure, types, shapes and dtypes of another; all is finite."""
    if isinstance(template, Tensor):
        return _is_tensor_like(template, value) and bool(value.isfinite().all())
    if isinstance(template, dict):
        same = isinstance(value, dict) and template.keys() == value.keys()
        return same and all(is_alike(inner, value[key]) for key, inner in template.items())
    if isinstance(template, list | tuple):
        same = isinstance(value, list | tuple) and len(template) == len(value)
        return same and all(map(is_alike, template, value))
    if _is_number(template):
        return _is_number(value) and math.isfinite(value)
    return type(template) is type(value)


def _is_tensor_like(template: Tensor, value: Any) -> bool:
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided
    return is_plain and (value.shape, value.dtype) == (template.shape, template.dtype)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_finite(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is float and math.isfinite(v) for v in values)


def _is_state(layout: FitLayout, value: Any, content: dict[str, Any]) -> bool:
    if not isinstance(value, list) or len(value) != len(layout.state):
        return False
    if not all(map(_is_tensor_like, layout.state, value)):
        return False
    parameters = (new for own, new in zip(layout.state, value, strict=True) if own.requires_grad)
    return all(bool(tensor.isfinite().all()) for tensor in parameters)


def _is_best(layout: FitLayout, value: Any, content: dict[str, Any]) -> bool:
    if value is None:
        return not content["validation"][0]
    return layout.has_validation and _is_state(layout, value, content)


def _is_optimizer(layout: FitLayout, value: Any, content: dict[str, Any]) -> bool:
    if not isinstance(value, dict) or value.keys() != {"state", "param_groups"}:
        return False
    if layout.optimizer is None:
        return True
    template = layout.optimizer
    started = value["state"] == {} or is_alike(template["state"], value["state"])
    groups = zip(template["param_groups"], value["param_groups"], strict=True)
    return started and all(_is_group(own, group) for own, group in groups)


def _is_group(own: dict[str, Any], group: Any) -> bool:
    """Whether settings of a group of parameters are those of such an optimizer.

    Schedulers add numbers of their own.
    """
    if not isinstance(group, dict):
        return False
    same = all(is_alike(setting, group[name]) for name, setting in own.items())
    added = (group[name] for name in group.keys() - own.keys())
    return same and own["params"] == group["params"] and all(map(_is_number, added))


def _is_rates(layout: FitLayout, value: Any, content: dict[str, Any]) -> bool:
    num_steps = len(content["values"]) if layout.has_scheduler else 0
    right_size = len(value) == num_steps and isinstance(value, list)
    return right_size and all(_are_finite(v) and len(v) == layout.num_groups for v in value)


def _is_capture(layout: FitLayout, value: Any, content: dict[str, Any]) -> bool:
    mode, reason, unroll, in_background = value
    known = type(mode) is bool or mode in ("auto", "recorded")
    right = isinstance(reason, str) and type(in_background) is bool
    return known and right and _is_count(unroll) and 1 <= unroll <= MAX_UNROLL


def _is_validation(layout: FitLayout, value: Any, content: dict[str, Any]) -> bool:
    values, steps, num_without_improvement = value
    if not layout.has_validation and values:
        return False
    made = len(content["values"])
    in_order = steps == sorted(steps) and all(_is_count(step) and step <= made for step in steps)
    right = isinstance(values, list) and all(type(v) is float for v in values)
    return right and in_order and len(values) == len(steps) and _is_count(num_without_improvement)


def _is_before_end(layout: FitLayout, value: Any, content: dict[str, Any]) -> bool:
    if value is None:
        return True
    single = value["before_end"] is None and not value["at_end"]
    return content["at_end"] is True and single and layout.wrong_entry(value) is None


def _is_generators(layout: FitLayout, value: Any, content: dict[str, Any]) -> bool:
    kind, keys, position, has_gauss, gauss = value["numpy"]
    version, internal, other = value["python"]
    numpy_is_right = kind == "MT19937" and _are_words(keys, 624) and 0 <= position <= 624
    python_is_right = version == 3 and _are_words(internal[:-1], 624) and 0 <= internal[-1] <= 624
    numbers = (position, internal[-1], has_gauss)
    right = numpy_is_right and python_is_right and all(map(_is_count, numbers))
    return right and _is_number(gauss) and (other is None or type(other) is float)


def _are_words(values: Iterable[Any], number: int) -> bool:
    words = list(values)
    return len(words) == number and all(_is_count(word) and word < 2**32 for word in words)


_CHECKS: dict[str, Callable[[FitLayout, Any, dict[str, Any]], bool]] = {
    "num_steps": lambda layout, value, content: _is_count(value) and value >= 1,
    "values": lambda layout, value, c: _are_finite(value) and len(value) <= c["num_steps"],
    "elapsed": lambda layout, value, c: _are_finite(value) and len(value) == len(c["values"]),
    "at_end": lambda layout, value, content: type(value) is bool,
    "past_rates": _is_rates,
    "state": _is_state,
    "optimizer": _is_optimizer,
    "scheduler": lambda layout, value, content: isinstance(value, dict) == layout.has_scheduler,
    "generators": _is_generators,
    "order_seed": lambda layout, value, content: _is_count(value) and value < 2**62,
    "stopped": lambda layout, value, content: isinstance(value, str),
    "capture": _is_capture,
    "validation": _is_validation,
    "best": _is_best,
    "before_end": _is_before_end,
}
"""For each entry of a checkpoint, whether a value can be restored."""
