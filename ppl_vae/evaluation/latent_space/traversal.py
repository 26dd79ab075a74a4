"""Traversals of the latent space of any pair: interpolations, and grids of decoded codes."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Normal

from ppl_vae.core.program import ProgramLike
from ppl_vae.core.validation import ArrayLike, as_matrix, check_int, check_option
from ppl_vae.evaluation.prediction.predictive import code_width, decode, encode

METHODS = ("linear", "spherical")
CENTRAL_MASS = 0.9
"""The central probability mass of a standard normal that a grid covers in each dimension."""
GRID_SIZE = 9
"""The default number of values per latent dimension of a grid."""


def normal_quantiles(num: int, mass: float = CENTRAL_MASS) -> Float[Tensor, " T"]:
    """Quantiles of N(0, 1) at equally spaced probabilities within its central ``mass``."""
    tail = (1 - mass) / 2
    return Normal(0.0, 1.0).icdf(torch.linspace(tail, 1 - tail, check_int("num", num)).double())


def interpolate_codes(
    start: Float[Tensor, "N K"],
    end: Float[Tensor, "M L"],
    num_steps: int,
    method: str = "linear",
) -> Float[Tensor, "N T K"]:
    """Interpolate from each row of ``start`` to the same row of ``end``, both included.

    With t from 0 to 1 and w the angle between the codes a and b,

        linear:     (1 - t) a + t b
        spherical:  sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b.

    In many dimensions N(0, I) has its mass near a sphere, which a straight line leaves. Spherical
    interpolation preserves the norm if both ends have the same, and equals linear interpolation if
    they are parallel.

    Args:
        start, end: codes.
        num_steps: T, at least 2.
        method: ``"linear"`` or ``"spherical"``.

    Raises:
        ValueError: if the shapes of the ends differ; for spherical interpolation, if codes are
            opposite or one is zero, so that the great circle is not unique.

    References:
        Shoemake: Animating rotation with quaternion curves (1985); White: Sampling generative
        networks (2016).
    """
    check_option("method", method, METHODS)
    if start.shape != end.shape:
        raise ValueError(
            f"start and end must have the same shape; they have {tuple(start.shape)} and "
            f"{tuple(end.shape)}"
        )
    t = torch.linspace(0, 1, check_int("num_steps", num_steps, 2)).to(start)[:, None]
    a, b = start[:, None], end[:, None]
    return torch.lerp(a, b, t) if method == "linear" else _slerp(a, b, t)


def _slerp(
    a: Float[Tensor, "N 1 K"], b: Float[Tensor, "N 1 K"], t: Float[Tensor, "T 1"]
) -> Float[Tensor, "N T K"]:
    lengths = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    if not all(bool((length > 0).all()) for length in lengths):
        raise ValueError("a code is zero and has no direction; use method='linear'")
    # The arctangent of the half angle is accurate for small angles, where the arccosine is not.
    u, v = a / lengths[0], b / lengths[1]
    angle = 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))[..., None]
    if bool((angle > torch.pi - 1e-3).any()):
        raise ValueError(
            "codes are opposite, so the great circle between them is not unique; use "
            "method='linear'"
        )
    sine = angle.sin()
    parallel = sine < 1e-4  # where sin(s w) / sin(w) is s, up to w^2
    safe = torch.where(parallel, 1.0, sine)
    first, second = (torch.where(parallel, s, (s * angle).sin() / safe) for s in (1 - t, t))
    return first * a + second * b


def interpolate(
    model: ProgramLike,
    start: ArrayLike,
    end: ArrayLike,
    *,
    num_steps: int = 8,
    method: str = "linear",
    guide: ProgramLike | None = None,
    template: ArrayLike | None = None,
) -> Float[Tensor, "N T D"]:
    """Decode interpolations between codes: the mean of x at each step.

    Args:
        model: any model under the contract; run in evaluation mode.
        start, end: with a ``guide``, rows of data, whose codes are the means of q(z | x); without
            one, the codes themselves, as returned by
            :func:`ppl_vae.evaluation.prediction.predictive.encode`.
        num_steps: number of codes along each interpolation, both ends included.
        method: ``"linear"`` or ``"spherical"``, see :func:`interpolate_codes`.
        guide: the guide of the pair, if start and end are data.
        template: rows of data, if start and end are codes; only their number of columns is used.

    Raises:
        ValueError: unless exactly one of guide and template is given; as
            :func:`interpolate_codes`.
    """
    if (guide is None) == (template is None):
        raise ValueError(
            "give guide= if start and end are data, or template= if they are codes; exactly one"
        )
    first, last = (
        as_matrix(x if guide is None else encode(model, guide, x), name="codes")
        for x in (start, end)
    )
    codes = interpolate_codes(first, last, num_steps, method)
    means = decode(model, codes.flatten(0, 1), start if template is None else template)
    return means.unflatten(0, codes.shape[:2])


def decode_grid(
    model: ProgramLike,
    template: ArrayLike,
    *,
    values: Float[Tensor, " T"] | None = None,
    center: Float[Tensor, " K"] | None = None,
    axes: tuple[int, int] = (0, 1),
) -> Float[Tensor, "T T D"]:
    """Decode a grid of codes in two latent dimensions: the mean of x at each code.

    Args:
        model: any model under the contract; run in evaluation mode.
        template: rows of data; only their number of columns is used.
        values: the values of both latent dimensions; by default nine :func:`normal_quantiles`,
            which suit a standard normal prior.
        center: the code that fixes all other dimensions; by default zeros.
        axes: the latent dimensions of the horizontal and the vertical axis.

    Returns:
        The means; the second dimension decreases along the first index (downwards), the first
        dimension increases along the second index (to the right).

    Raises:
        ValueError: if ``axes`` are not two of the K dimensions.
    """
    values = normal_quantiles(GRID_SIZE) if values is None else values
    center = torch.zeros(code_width(model, template)) if center is None else center
    horizontal, vertical = axes
    if horizontal == vertical or not all(0 <= axis < len(center) for axis in axes):
        raise ValueError(f"axes must be two of the {len(center)} dimensions; got {axes}")
    rows, columns = torch.meshgrid(values.flip(0), values, indexing="ij")
    codes = center.double().repeat(rows.numel(), 1)
    codes[:, horizontal] = columns.flatten().to(codes)
    codes[:, vertical] = rows.flatten().to(codes)
    return decode(model, codes, template).unflatten(0, rows.shape)
