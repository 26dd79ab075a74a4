"""Transformers over patches of images: the two networks of a masked autoencoder."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_vae.core.state import seeded, validation_enabled
from ppl_vae.core.validation import check_int
from ppl_vae.networks.patches import Patches

FIRST_POSITIONS = 0.02
"""Standard deviation of the positions that a network starts from."""


class PatchTransformer(nn.Module):
    """An encoder that reads the patches that are wholly there, and no others.

    Each such patch is a token: an affine map of its entries, plus what is learned of its place.
    The tokens go through transformer layers that know of no others, so that a quarter of the
    patches costs a quarter of the work or less. A code is made of what comes out for each patch,
    side by side, and zeros for patches that are not seen; so K = P * width.

    Args:
        image_shape: (C, H, W).
        patch: height and width of a patch, in pixels; one number is both.
        width: of a token.
        depth: the number of layers.
        heads: of the attention in each; they divide the width.
        seed: of the initial weights (torch's defaults; positions normal of sd 0.02).

    References:
        Dosovitskiy et al.: An image is worth 16x16 words (2021); He et al.: Masked autoencoders
        are scalable vision learners (2022).
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        patch: int | Sequence[int],
        width: int = 64,
        depth: int = 3,
        heads: int = 4,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.patches = Patches(image_shape, patch)
        with seeded(seed):
            self.embed = nn.Linear(self.patches.width, check_int("width", width))
            self.positions = nn.Parameter(torch.empty(self.patches.number, width))
            self.reset_parameters()
            self.layers = _layers(width, depth, heads)
        self.norm = nn.LayerNorm(width)

    def reset_parameters(self) -> None:
        """Positions as they begin; layers reset themselves."""
        nn.init.normal_(self.positions, std=FIRST_POSITIONS)

    @property
    def out_dim(self) -> int:
        """K, the width of a code."""
        return self.positions.numel()

    def forward(
        self, rows: Float[Tensor, "B W"], *, num_seen: int | None = None
    ) -> Float[Tensor, "B K"]:
        """Codes, (rows, P * width).

        Args:
            rows: images beside what is there of them, 1 or 0 for each entry, (rows, 2D), as an
                :class:`~ppl_vae.AmortizedGuide` gives them with ``missing="zeros+mask"``.
            num_seen: how many patches are there at most in a row of them, if that is known: no
                more are worked on. A row that has none then has a code of zeros.

        Raises:
            ValueError: if rows have another width; where Pyro validates, if a row has more
                patches than ``num_seen``, or, without it, none.
        """
        if rows.shape[1] != 2 * self.patches.data_dim:
            raise ValueError(
                f"rows must be {self.patches.data_dim} entries and a mask of as many; they have "
                f"{rows.shape[1]} columns. Use missing='zeros+mask'"
            )
        x, mask = rows.chunk(2, 1)
        seen = self.patches.whole(mask > 0.5)
        if validation_enabled():
            _check_seen(seen, num_seen)
        # In their order, those that are there come first.
        place = (~seen).byte().argsort(dim=1, stable=True)[:, :num_seen]
        there = seen.gather(1, place)
        tokens = self.embed(_taken(self.patches.cut(x), place))
        tokens = self._attended(tokens + F.embedding(place, self.positions), there)
        tokens = torch.where(there.unsqueeze(-1), tokens, 0.0)
        return _put(tokens, place, self.patches.number).flatten(1)

    def _attended(
        self, tokens: Float[Tensor, "B V E"], there: Bool[Tensor, "B V"]
    ) -> Float[Tensor, "B V E"]:
        # Attention to nothing at all would be NaN, which no mask keeps out of a gradient.
        ignored = ~there & there.any(1, keepdim=True)
        for layer in self.layers:
            tokens = layer(tokens, src_key_padding_mask=ignored)
        return self.norm(tokens)


class PatchDecoder(nn.Module):
    """A decoder of such codes: all patches' tokens through transformer layers, then to pixels.

    A patch that the encoder did not see has a code of zeros, of which the first affine map makes
    its bias, the token of a hidden patch; places are added to all.

    Args:
        image_shape: (C, H, W) of what comes out, as flat rows.
        patch: height and width of a patch, in pixels; one number is both.
        code_width: of a patch's part of a code.
        width: of a token.
        depth: the number of layers.
        heads: of the attention in each; they divide the width.
        outputs_per_dim: numbers for each entry of an image. A row holds them beside one another,
            those of the first entry first.
        seed: of the initial weights (torch's defaults; positions normal of sd 0.02).

    Attributes:
        bias: added at the end, one number for each output.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        patch: int | Sequence[int],
        code_width: int = 64,
        width: int = 64,
        depth: int = 1,
        heads: int = 4,
        *,
        outputs_per_dim: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.patches = Patches(image_shape, patch)
        self.outputs_per_dim = check_int("outputs_per_dim", outputs_per_dim)
        with seeded(seed):
            self.embed = nn.Linear(check_int("code_width", code_width), check_int("width", width))
            self.positions = nn.Parameter(torch.empty(self.patches.number, width))
            self.bias = nn.Parameter(torch.empty(self.patches.data_dim * outputs_per_dim))
            self.reset_parameters()
            self.layers = _layers(width, depth, heads)
            self.last = nn.Linear(width, self.patches.width * outputs_per_dim, bias=False)
        self.norm = nn.LayerNorm(width)

    def reset_parameters(self) -> None:
        """Positions and bias as they begin; layers reset themselves."""
        nn.init.normal_(self.positions, std=FIRST_POSITIONS)
        nn.init.zeros_(self.bias)

    def forward(self, codes: Float[Tensor, "B K"]) -> Float[Tensor, "B O"]:
        """Rows of outputs."""
        tokens = self.embed(codes.unflatten(1, (self.patches.number, -1))) + self.positions
        for layer in self.layers:
            tokens = layer(tokens)
        outputs = self.last(self.norm(tokens))
        return self.patches.join(outputs, self.outputs_per_dim) + self.bias


def _layers(width: int, depth: int, heads: int) -> nn.ModuleList:
    if width % check_int("heads", heads):
        raise ValueError(f"heads must divide the width of a token; {heads} do not divide {width}")
    how = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    layers = range(check_int("depth", depth))
    return nn.ModuleList(
        nn.TransformerEncoderLayer(width, heads, 4 * width, **how) for _ in layers
    )


def _taken(tokens: Float[Tensor, "B P E"], place: Tensor) -> Float[Tensor, "B V E"]:
    return tokens.gather(1, place.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _put(tokens: Float[Tensor, "B V E"], place: Tensor, number: int) -> Float[Tensor, "B P E"]:
    rows, _, width = tokens.shape
    where = place.unsqueeze(-1).expand_as(tokens)
    return tokens.new_zeros(rows, number, width).scatter(1, where, tokens)


def _check_seen(seen: Bool[Tensor, "B P"], num_seen: int | None) -> None:
    number = seen.sum(1)
    if num_seen is None and (empty := (number == 0).nonzero().flatten().tolist()):
        raise ValueError(
            f"x has rows of which no patch is wholly observed: {empty[:5]}; drop them, or take "
            "smaller patches"
        )
    if num_seen is not None and (most := int(number.max())) > num_seen:
        raise ValueError(
            f"num_seen says that {num_seen} of {seen.shape[1]} patches are there, and a row has "
            f"{most}; let what hides patches have the encoder's image_shape and patch, and "
            "hide no other number of them than its share"
        )
