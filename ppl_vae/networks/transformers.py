"""Transformers over patches of images: the encoder and decoder of a masked autoencoder."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_vae.core.state import seeded, validation_enabled
from ppl_vae.core.validation import check_int
from ppl_vae.networks.patches import Patches

POSITION_SCALE = 0.02
"""Standard deviation of the initial positional embeddings."""


class PatchTransformer(nn.Module):
    """A transformer encoder of the patches that are fully observed.

    Each such patch is a token: an affine map of its entries plus a learned positional embedding.
    Transformer layers process these tokens only, so that a quarter of the patches costs at most a
    quarter of the work. The code concatenates the outputs of all patches, with zeros for patches
    that are not visible; so K = P * width.

    Args:
        image_shape: (C, H, W).
        patch: height and width of a patch, in pixels; one number for squares.
        width: width of a token.
        depth: number of layers.
        heads: number of attention heads, a divisor of the width.
        seed: seed of the initial weights (torch's defaults; positions from N(0, 0.02^2)).

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
            self.embed = nn.Linear(self.patches.patch_dim, check_int("width", width))
            self.positions = nn.Parameter(torch.empty(self.patches.num_patches, width))
            self.reset_parameters()
            self.layers = _layers(width, depth, heads)
        self.norm = nn.LayerNorm(width)

    def reset_parameters(self) -> None:
        """Reinitialise the positional embeddings; layers have methods of their own."""
        nn.init.normal_(self.positions, std=POSITION_SCALE)

    @property
    def out_dim(self) -> int:
        """K, the dimension of a code."""
        return self.positions.numel()

    def forward(
        self, rows: Float[Tensor, "B W"], *, num_visible: int | None = None
    ) -> Float[Tensor, "B K"]:
        """Codes, (rows, P * width).

        Args:
            rows: images and their masks (1 where observed), (rows, 2D), as an
                :class:`~ppl_vae.AmortizedGuide` passes them with ``missing="zeros+mask"``.
            num_visible: the largest number of visible patches of a row, if known; no more tokens
                than that are processed. A row without visible patches has a code of zeros then.

        Raises:
            ValueError: if rows have another width; if Pyro's validation is on, if a row has more
                visible patches than ``num_visible``, or, without it, none.
        """
        if rows.shape[1] != 2 * self.patches.data_dim:
            raise ValueError(
                f"rows must have {self.patches.data_dim} entries and a mask of the same size; "
                f"they have {rows.shape[1]} columns. Use missing='zeros+mask'"
            )
        x, mask = rows.chunk(2, 1)
        visible = self.patches.fully_observed(mask > 0.5)
        if validation_enabled():
            _check_num_visible(visible, num_visible)
        # Indices of the patches, visible ones first, otherwise in order.
        index = (~visible).byte().argsort(dim=1, stable=True)[:, :num_visible]
        is_visible = visible.gather(1, index)
        tokens = self.embed(_gather_tokens(self.patches.cut(x), index))
        tokens = self._attend(tokens + F.embedding(index, self.positions), is_visible)
        tokens = torch.where(is_visible.unsqueeze(-1), tokens, 0.0)
        return _scatter_tokens(tokens, index, self.patches.num_patches).flatten(1)

    def _attend(
        self, tokens: Float[Tensor, "B V E"], is_visible: Bool[Tensor, "B V"]
    ) -> Float[Tensor, "B V E"]:
        # A row without visible tokens attends to all, since an empty softmax has NaN gradients.
        ignored = ~is_visible & is_visible.any(1, keepdim=True)
        for layer in self.layers:
            tokens = layer(tokens, src_key_padding_mask=ignored)
        return self.norm(tokens)


class PatchDecoder(nn.Module):
    """A transformer decoder of the codes of :class:`PatchTransformer`.

    A hidden patch has a code of zeros, which the first affine map sends to its bias, the mask
    token; positional embeddings are added to the tokens of all patches.

    Args:
        image_shape: (C, H, W) of the output, as flat rows.
        patch: height and width of a patch, in pixels; one number for squares.
        code_width: width of the part of a code that belongs to a patch.
        width: width of a token.
        depth: number of layers.
        heads: number of attention heads, a divisor of the width.
        outputs_per_dim: number of outputs for each entry of an image, adjacent in a row.
        seed: seed of the initial weights (torch's defaults; positions from N(0, 0.02^2)).

    Attributes:
        bias: bias of the outputs, one number per output.
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
            self.positions = nn.Parameter(torch.empty(self.patches.num_patches, width))
            self.bias = nn.Parameter(torch.empty(self.patches.data_dim * outputs_per_dim))
            self.reset_parameters()
            self.layers = _layers(width, depth, heads)
            self.last = nn.Linear(width, self.patches.patch_dim * outputs_per_dim, bias=False)
        self.norm = nn.LayerNorm(width)

    def reset_parameters(self) -> None:
        """Reinitialise positional embeddings and bias; layers have methods of their own."""
        nn.init.normal_(self.positions, std=POSITION_SCALE)
        nn.init.zeros_(self.bias)

    def forward(self, codes: Float[Tensor, "B K"]) -> Float[Tensor, "B O"]:
        """The outputs, as flat rows."""
        tokens = self.embed(codes.unflatten(1, (self.patches.num_patches, -1))) + self.positions
        for layer in self.layers:
            tokens = layer(tokens)
        outputs = self.last(self.norm(tokens))
        return self.patches.join(outputs, self.outputs_per_dim) + self.bias


def _layers(width: int, depth: int, heads: int) -> nn.ModuleList:
    if width % check_int("heads", heads):
        raise ValueError(f"heads must divide the width of a token; {heads} do not divide {width}")
    return nn.ModuleList(
        nn.TransformerEncoderLayer(
            width,
            heads,
            4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        for _ in range(check_int("depth", depth))
    )


def _gather_tokens(tokens: Float[Tensor, "B P E"], index: Tensor) -> Float[Tensor, "B V E"]:
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _scatter_tokens(
    tokens: Float[Tensor, "B V E"], index: Tensor, num_patches: int
) -> Float[Tensor, "B P E"]:
    rows, _, width = tokens.shape
    index = index.unsqueeze(-1).expand_as(tokens)
    return tokens.new_zeros(rows, num_patches, width).scatter(1, index, tokens)


def _check_num_visible(visible: Bool[Tensor, "B P"], num_visible: int | None) -> None:
    counts = visible.sum(1)
    if num_visible is None and (empty := (counts == 0).nonzero().flatten().tolist()):
        raise ValueError(
            f"x has rows without a fully observed patch: {empty[:5]}; drop them, or use smaller "
            "patches"
        )
    if num_visible is not None and (largest := int(counts.max())) > num_visible:
        raise ValueError(
            f"num_visible is {num_visible}, but a row has {largest} of {visible.shape[1]} patches "
            "visible; the mask must have the image_shape and patch of the encoder, and hide "
            "exactly its share of the patches"
        )
