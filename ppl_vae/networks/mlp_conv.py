"""Multilayer perceptrons and convolutional networks for encoders and decoders."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ppl_vae.core.state import seeded
from ppl_vae.core.validation import check_int, check_option

ImageShape: TypeAlias = tuple[int, int, int]
"""Channels, height and width of an image; data are flat rows of such images."""

Network: TypeAlias = Callable[..., Any]
"""A module, or another callable of tensors: an encoder or a decoder."""
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "sigmoid": nn.Sigmoid,
}
"""Activation functions by name."""


def mlp(
    in_dim: int,
    out_dim: int,
    hidden: Sequence[int] = (),
    *,
    activation: str = "relu",
    seed: int | None = None,
) -> nn.Sequential:
    """A multilayer perceptron with linear output; without hidden layers an affine map.

    ``mlp(K, D, (H,))`` is G(z) = A2 relu(A1 z + b1) + b2.

    Args:
        in_dim, out_dim: widths of input and output.
        hidden: width of each hidden layer.
        activation: one of ``ACTIVATIONS``.
        seed: seed of the initial weights (torch's defaults for Linear).
    """
    activate = ACTIVATIONS[check_option("activation", activation, ACTIVATIONS)]
    widths = [check_int("width", width) for width in (in_dim, *hidden, out_dim)]
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
    """Set the output layer of a network to zero, so that it is constant initially."""
    with torch.no_grad():
        for parameter in last_linear(network).parameters():
            parameter.zero_()
    return network


def output_bias(network: Network, width: int) -> nn.Parameter:
    """The bias of the last layer of a network, one number per output, (width,).

    Raises:
        TypeError: if the last layer has no such bias.
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


N = TypeVar("N", bound=nn.Module)


@torch.no_grad()
def reset(network: N, *, seed: int | None = None) -> N:
    """Reinitialise a network: each layer draws its parameters as at construction.

    Layers use their ``reset_parameters``, inner ones first; frozen parameters stay frozen. Frozen
    parameters and buffers of layers without this method are kept.

    Args:
        network: the network, modified in place.
        seed: seed of the new parameters.

    Raises:
        ValueError: if no layer resets some parameter. The network is unchanged then.
    """
    before = {name: value.clone() for name, value in network.state_dict().items()}
    learned = {name: p for name, p in network.named_parameters() if p.requires_grad}
    for parameter in learned.values():
        parameter.fill_(torch.nan)  # parameters that are still NaN at the end were not reset
    with seeded(seed):
        for layer in reversed(list(network.modules())):
            method: Any = getattr(layer, "reset_parameters", None)
            method = method or getattr(layer, "_reset_parameters", None)  # torch's attention
            if callable(method):
                method()
    if missed := [name for name, p in learned.items() if bool(p.isnan().any())]:
        network.load_state_dict(before)
        raise ValueError(
            f"no layer resets the parameters {missed[:5]}; give their layers a method "
            "reset_parameters(), since they would keep their trained values otherwise"
        )
    return network


class Bias(nn.Module):
    """Adds a bias b to rows, one number per column; convolutions have one per channel only.

    Args:
        width: width of the rows.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def reset_parameters(self) -> None:
        """b = 0."""
        nn.init.zeros_(self.bias)

    def forward(self, rows: Float[Tensor, "B W"]) -> Float[Tensor, "B W"]:
        """rows + b."""
        return rows + self.bias


class FixedScaleEncoder(nn.Module):
    """The encoder of q(z | x) = N(f(x), scale^2 I), which returns (loc, scale).

    Args:
        network: f, from rows of x to (rows, K).
        scale: standard deviation.

    Raises:
        ValueError: if scale is not positive.
    """

    def __init__(self, network: Network, scale: float) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale must be positive, the standard deviation of q; got {scale}")
        self.network = network
        self.scale = scale

    def forward(self, x: Float[Tensor, "B D"]) -> tuple[Tensor, Tensor]:
        """(f(x), scale), each (rows, K)."""
        loc = self.network(x)
        return loc, torch.full_like(loc, self.scale)


def as_image_shape(shape: Sequence[int]) -> ImageShape:
    """Check that an image shape is (C, H, W), three positive whole numbers.

    Raises:
        ValueError: if not.
    """
    if len(shape) != 3:
        raise ValueError(f"image_shape must be (channels, height, width); got {tuple(shape)}")
    channels, height, width = (check_int("image_shape", size) for size in shape)
    return channels, height, width


def conv_encoder(
    image_shape: Sequence[int],
    out_dim: int,
    channels: Sequence[int] = (32, 64),
    *,
    activation: str = "relu",
    seed: int | None = None,
) -> nn.Sequential:
    """Strided convolutions that each halve the image, and a linear layer, on flat rows.

    Args:
        image_shape: (C, H, W); a row has C H W entries, of any height and width.
        out_dim: width of the output.
        channels: output channels of each convolution (3 x 3, stride 2).
        activation: one of ``ACTIVATIONS``.
        seed: seed of the initial weights (torch's defaults).
    """
    activate = ACTIVATIONS[check_option("activation", activation, ACTIVATIONS)]
    shapes = _halved_shapes(image_shape, channels)
    layers: list[nn.Module] = [nn.Unflatten(1, shapes[0])]
    with seeded(seed):
        for (before, *_), (after, *_) in itertools.pairwise(shapes):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), activate()]
        last = nn.Linear(math.prod(shapes[-1]), check_int("out_dim", out_dim))
    return nn.Sequential(*layers, nn.Flatten(), last)


def conv_decoder(
    in_dim: int,
    image_shape: Sequence[int],
    channels: Sequence[int] = (64, 32),
    *,
    outputs_per_dim: int = 1,
    activation: str = "relu",
    seed: int | None = None,
) -> nn.Sequential:
    """The mirror image of :func:`conv_encoder`: a linear layer and transposed convolutions.

    Args:
        in_dim: width of the input.
        image_shape: (C, H, W) of the output, as flat rows.
        channels: input channels of each transposed convolution (3 x 3, stride 2).
        outputs_per_dim: number of outputs for each entry of an image, adjacent in a row.
        activation: one of ``ACTIVATIONS``.
        seed: seed of the initial weights (torch's defaults, and a bias of zero).
    """
    activate = ACTIVATIONS[check_option("activation", activation, ACTIVATIONS)]
    shapes = _halved_shapes(image_shape, channels[::-1])[::-1]
    depth, height, width = shapes[-1]
    shapes[-1] = (check_int("outputs_per_dim", outputs_per_dim) * depth, height, width)
    with seeded(seed):
        layers: list[nn.Module] = [nn.Linear(check_int("in_dim", in_dim), math.prod(shapes[0]))]
        layers += [nn.Unflatten(1, shapes[0])]
        for before, after in itertools.pairwise(shapes):
            layers += [activate(), _transposed_conv(before, after, bias=after is not shapes[-1])]
    return nn.Sequential(*layers, _FlattenOutputs(outputs_per_dim), Bias(math.prod(shapes[-1])))


def _halved_shapes(image_shape: Sequence[int], channels: Sequence[int]) -> list[ImageShape]:
    shapes = [as_image_shape(image_shape)]
    if not channels:
        raise ValueError("channels must have at least one entry, one per convolution; it is empty")
    for number in channels:
        _, height, width = shapes[-1]
        shapes.append((check_int("channels", number), (height + 1) // 2, (width + 1) // 2))
    return shapes


def _transposed_conv(before: ImageShape, after: ImageShape, *, bias: bool) -> nn.ConvTranspose2d:
    # n pixels give 2n - 1; output_padding adds one if the larger image has an even size.
    output_padding = (after[1] - (2 * before[1] - 1), after[2] - (2 * before[2] - 1))
    return nn.ConvTranspose2d(
        before[0], after[0], 3, stride=2, padding=1, output_padding=output_padding, bias=bias
    )


class _FlattenOutputs(nn.Module):
    """Flattens images of (outputs_per_dim C) channels, the outputs of an entry adjacent."""

    def __init__(self, outputs_per_dim: int) -> None:
        super().__init__()
        self.outputs_per_dim = outputs_per_dim

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O"]:
        return images.unflatten(1, (self.outputs_per_dim, -1)).movedim(1, -1).flatten(1)
