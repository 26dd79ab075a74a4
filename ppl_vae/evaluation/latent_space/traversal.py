"""Ways through the latent space of any pair: from code to code, and over a plane of codes."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Normal

from ppl_vae.core.program import ProgramLike
from ppl_vae.core.validation import ArrayLike, check_int, check_option
from ppl_vae.evaluation.prediction.predictive import code_width, decode, encode

WAYS = ("linear", "spherical")
MASS = 0.9
"""The share of a standard normal's mass, in each dimension, that a plane covers."""
STEPS = 9
"""Positions a latent dimension of a plane."""


def positions(num: int, mass: float = MASS) -> Float[Tensor, " T"]:
    """Quantiles of N(0, 1) that are equally far apart in mass, in the middle ``mass`` of it."""
    rest = (1 - mass) / 2
    return Normal(0.0, 1.0).icdf(torch.linspace(rest, 1 - rest, check_int("num", num)).double())


def path(
    start: Float[Tensor, "N K"], end: Float[Tensor, "M L"], num_steps: int, how: str = "linear"
) -> Float[Tensor, "N T K"]:
    """Codes from each row of ``start`` to the same row of ``end``, both included.

    With t from 0 to 1 and w the angle between the two,

        linear:     (1 - t) a + t b
        spherical:  sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b.

    In many dimensions N(0, I) has its mass near a sphere, and a straight line leaves it; the
    second keeps the length where both ends have one, and is the first where they are parallel.

    Args:
        start, end: codes.
        num_steps: T, at least 2.
        how: ``"linear"`` or ``"spherical"``.

    Raises:
        ValueError: if the ends differ in shape; if codes are opposite, or one is zero: there is
            no shortest way round.

    References:
        Shoemake: Animating rotation with quaternion curves (1985); White: Sampling generative
        networks (2016).
    """
    check_option("how", how, WAYS)
    if start.shape != end.shape:
        raise ValueError(
            f"start and end must have one shape; they have {tuple(start.shape)} and "
            f"{tuple(end.shape)}"
        )
    t = torch.linspace(0, 1, check_int("num_steps", num_steps, 2)).to(start)[:, None]
    a, b = start[:, None], end[:, None]
    return torch.lerp(a, b, t) if how == "linear" else _round(a, b, t)


def _round(
    a: Float[Tensor, "N 1 K"], b: Float[Tensor, "N 1 K"], t: Float[Tensor, "T 1"]
) -> Float[Tensor, "N T K"]:
    lengths = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    if not all(bool((length > 0).all()) for length in lengths):
        raise ValueError("a code is zero, and has no direction; use how='linear'")
    # Of the two angles' halves the tangent is exact where the cosine is not.
    u, v = a / lengths[0], b / lengths[1]
    angle = 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))[..., None]
    if bool((angle > torch.pi - 1e-3).any()):
        raise ValueError("codes are opposite: no way round is the shortest; use how='linear'")
    sine = angle.sin()
    near = sine < 1e-4  # parallel: sin(s w) / sin(w) is s, up to w^2
    safe = torch.where(near, 1.0, sine)
    first, second = (torch.where(near, s, (s * angle).sin() / safe) for s in (1 - t, t))
    return first * a + second * b


def interpolate(
    model: ProgramLike,
    start: ArrayLike,
    end: ArrayLike,
    *,
    guide: ProgramLike | None = None,
    like: ArrayLike | None = None,
    num_steps: int = 8,
    how: str = "linear",
) -> Float[Tensor, "N T D"]:
    """The mean of x on the way from codes to codes.

    Args:
        model: any model under the contract; run in evaluation mode.
        start, end: rows of data whose codes are the means of the ``guide``'s q; or without a
            guide the codes themselves, as :func:`ppl_vae.evaluation.prediction.predictive.encode`
            has them.
        guide: of the pair, for data.
        like: for codes, rows of data, of which only the width matters.
        num_steps: positions on the way, both ends included.
        how: see :func:`path`.

    Raises:
        ValueError: if not exactly one of guide and like is given; as :func:`path`.
    """
    if (guide is None) == (like is None):
        raise ValueError("give guide= if start and end are data, or like= if they are codes")
    first, last = (
        torch.as_tensor(x) if guide is None else encode(model, guide, x) for x in (start, end)
    )
    way = path(first, last, num_steps, how)
    shown = decode(model, way.flatten(0, 1), start if like is None else like)
    return shown.unflatten(0, way.shape[:2])


def manifold(
    model: ProgramLike,
    like: ArrayLike,
    *,
    at: Float[Tensor, " T"] | None = None,
    center: Float[Tensor, " K"] | None = None,
    axes: tuple[int, int] = (0, 1),
) -> Float[Tensor, "T T D"]:
    """The mean of x over a plane of codes.

    Args:
        model: any model under the contract; run in evaluation mode.
        like: rows of data; only their width matters.
        at: the values that the two latent dimensions take; by default nine :func:`positions`,
            which are for a standard normal prior.
        center: a code, which says what the other dimensions are; by default zeros.
        axes: the two dimensions, across and down.

    Returns:
        The second dimension from its last value down to its first, the first one across.

    Raises:
        ValueError: if ``axes`` are not two of the K dimensions.
    """
    at = positions(STEPS) if at is None else at
    center = torch.zeros(code_width(model, like)) if center is None else center
    across, down = axes
    if across == down or not all(0 <= axis < len(center) for axis in axes):
        raise ValueError(f"axes must be two of the {len(center)} dimensions; got {axes}")
    rows, columns = torch.meshgrid(at.flip(0), at, indexing="ij")
    codes = center.double().repeat(rows.numel(), 1)
    codes[:, across], codes[:, down] = columns.flatten().to(codes), rows.flatten().to(codes)
    return decode(model, codes, like).unflatten(0, rows.shape)
