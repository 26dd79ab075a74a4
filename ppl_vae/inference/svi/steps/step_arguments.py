"""The arguments of a step in a user's own training loop."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


class StepArguments:
    """The arguments of a step: tensors, and all others, which are constants of the graph.

    Args:
        method: the name of the method that is called.
        args, kwargs: its arguments.
        modules: the modules of the pair.

    Attributes:
        tensors: the tensors among the arguments.
        signature: identifies the calls that can share captured code.
    """

    def __init__(self, method: str, args: Any, kwargs: Any, modules: Sequence[nn.Module]) -> None:
        flat, self.nested = pytree.tree_flatten((args, kwargs))
        self.tensors = [value for value in flat if isinstance(value, Tensor)]
        self.constants = [None if isinstance(value, Tensor) else (value,) for value in flat]
        training = tuple(part.training for module in modules for part in module.modules())
        shapes = tuple((t.shape, t.dtype, t.device) for t in self.tensors)
        constants = _hashable(self.constants)
        self.signature = method, repr(self.nested), constants, training, shapes

    def arguments(self, tensors: list[Tensor]) -> tuple[Any, Any]:
        """The arguments with other tensors in place of these."""
        remaining = iter(tensors)
        flat = [next(remaining) if c is None else c[0] for c in self.constants]
        return pytree.tree_unflatten(flat, self.nested)


def _hashable(values: list[Any]) -> Any:
    try:
        hash(tuple(values))
    except TypeError:
        return repr(values)
    return tuple(values)
