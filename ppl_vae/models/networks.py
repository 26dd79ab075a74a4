"""Networks for encoders and decoders."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ppl_vae.arguments import at_least, choose_option
from ppl_vae.state import seeded

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "sigmoid": nn.Sigmoid,
}


def mlp(
    in_dim: int,
    out_dim: int,
    hidden: Sequence[int] = (),
    *,
    activation: str = "relu",
    seed: int | None = None,
) -> nn.Sequential:
    """A multilayer perceptron, linear at the end; without hidden layers an affine map.

    Args:
        in_dim, out_dim: widths of input and output.
        hidden: width of each hidden layer.
        activation: one of ``ACTIVATIONS``.
        seed: of the initial weights (torch's defaults for Linear).
    """
    activate = ACTIVATIONS[choose_option("activation", activation, ACTIVATIONS)]
    widths = [at_least("width", width) for width in (in_dim, *hidden, out_dim)]
    layers: list[nn.Module] = []
    with seeded(seed):
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), activate()]
    return nn.Sequential(*layers[:-1])


def last_linear(network: nn.Sequential) -> nn.Linear:
    """The output layer of :func:`mlp`."""
    layer = network[-1]
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"the network must end in a Linear layer, not {type(layer).__name__}")
    return layer


def zero_output(network: nn.Sequential) -> nn.Sequential:
    """The network with its output layer set to zero, so that it starts as a constant."""
    with torch.no_grad():
        for parameter in last_linear(network).parameters():
            parameter.zero_()
    return network


def output_bias(network: Callable[..., Any], width: int) -> nn.Parameter:
    """The bias that a network adds at its end, one number for each output, (width,).

    Raises:
        TypeError: if it does not end in a layer with such a bias.
    """
    last: Any = network
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    bias = getattr(last, "bias", None)
    if not isinstance(bias, nn.Parameter) or bias.shape != (width,):
        raise TypeError(
            f"the network must end in a layer with a bias for each of its {width} outputs, such "
            f"as Linear, not in {last}"
        )
    return bias
