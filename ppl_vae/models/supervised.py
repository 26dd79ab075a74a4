"""Supervised networks that begin as encoders: pairs without latent variables."""

import copy
from typing import Any

import pyro
import torch
from jaxtyping import Bool, Float, Int
from pyro.nn import pyro_method
from torch import Tensor, nn

from ppl_vae.core.program import Density, Program, as_rows, data_plate, fold_rows
from ppl_vae.core.state import isolated_store, mode, seeded
from ppl_vae.core.validation import (
    ArrayLike,
    as_matrix,
    check_int,
    check_option,
    check_rows_observed,
    observed_mask,
)
from ppl_vae.likelihoods.base import Likelihood
from ppl_vae.models.decoder_model import DecoderModel
from ppl_vae.networks.mlp_conv import reset

ENCODERS = ("fine-tuned", "frozen", "scratch")


class SupervisedEncoder(Program):
    """p(y | x) = likelihood(A f(x) + b), with f the encoder of a pair: a pair of its own.

    f(x) is the mean of the code that the pair's amortized guide gives x. There are no latent
    variables, so the ELBO of ``model`` and ``guide`` (which samples nothing) is log p(y | x)
    itself, in nats per datum, and maximum likelihood is ``fit_svi`` on :meth:`rows` of x and y.
    With :class:`~ppl_vae.Categorical` it is a classifier.

    Args:
        pair: its guide reads codes off a network. It is copied, and left as it is.
        likelihood: of y.
        num_labels: columns of y, L.
        encoder: ``"fine-tuned"``: f begins with the pair's weights, and trains with A and b;
            ``"frozen"``: it keeps them, and A and b train alone; ``"scratch"``: the same network
            begins anew, as its layers reset themselves (:func:`~ppl_vae.networks.mlp_conv.reset`).
            What the pair does to x before f sees it in training (corruption) is left out.
        seed: of A and b, and of f from scratch. The first do not depend on ``encoder``.

    Raises:
        TypeError: if the pair's guide has no encoder.
        ValueError: if codes depend on parameters that the encoder does not own, as a tied one's
            are its decoder's; from scratch, if a layer cannot reset itself.

    References:
        Erhan et al.: Why does unsupervised pre-training help deep learning? (2010).

    Example:
        >>> vae = VAE.mlp(data_dim=64, latent_dim=8, seed=0)
        >>> network = SupervisedEncoder(vae, Categorical(10), seed=0)
        >>> network.conditional(torch.zeros(3, 64)).event_shape
        torch.Size([1])
    """

    def __init__(
        self,
        pair: DecoderModel,
        likelihood: Likelihood,
        *,
        num_labels: int = 1,
        encoder: str = "fine-tuned",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = check_option("encoder", encoder, ENCODERS)
        self.input_dim, self.num_labels = pair.data_dim, check_int("num_labels", num_labels)
        self.data_dim = self.input_dim + self.num_labels
        self.code_guide: Any = _coder(pair)
        self.likelihood = likelihood
        likelihood.set_data_dim(num_labels)
        _freeze(self.code_guide, self.input_dim, everything=encoder == "frozen")
        with seeded(seed):  # the head first, so that it is the same whatever the encoder
            width = num_labels * likelihood.outputs_per_dim
            self.head = nn.Linear(pair.latent_dim, width).to(_like(self.code_guide))
            if encoder == "scratch":
                reset(self.code_guide)

    @pyro_method
    def model(
        self,
        x: ArrayLike,
        *,
        mask: Bool[Tensor, "B R"] | None = None,
        index: Int[Tensor, " B"] | None = None,
        num_data: int | None = None,
        observe: bool = True,
    ) -> Tensor:
        """p(y | x) as a Pyro program: the last L columns of a row are y, the others x."""
        rows = as_rows(x, _like(self), self.data_dim)
        inputs, labels = self._parted(rows)
        given, scored = self._parted(mask)
        with data_plate(len(rows), index=index, num_data=num_data, device=rows.device):
            density = self.conditional(inputs, given, scored)
            return pyro.sample("y", density, obs=labels if observe else None)

    @pyro_method
    def guide(self, x: ArrayLike, **_: Any) -> None:
        """Nothing: there are no latent variables."""

    def rows(self, x: ArrayLike, y: ArrayLike) -> Float[Tensor, "N R"]:
        """x and y beside one another, as :meth:`model` takes them.

        Args:
            x: (N, D); NaN marks a missing value.
            y: (N, L), or (N,) for one column; a row without a label (NaN) teaches nothing.

        Raises:
            ValueError: if either has another width, they have other numbers of rows, or a row of x
                has nothing observed.
        """
        like = {"dtype": self.head.weight.dtype, "device": self.head.weight.device}
        y = torch.as_tensor(y)
        x, y = as_matrix(x, **like), as_matrix(y[:, None] if y.dim() == 1 else y, name="y", **like)
        expected = (self.input_dim, self.num_labels)
        if (x.shape[1], y.shape[1]) != expected or len(x) != len(y):
            raise ValueError(
                f"x and y must have {expected[0]} and {expected[1]} columns, and as many rows; "
                f"they have shapes {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if (seen := observed_mask(x)) is not None:
            check_rows_observed(seen)
        return torch.cat([x, y], 1)

    def conditional(
        self,
        x: Float[Tensor, "N D"],
        mask: Bool[Tensor, "N D"] | None = None,
        scored: Bool[Tensor, "N L"] | None = None,
    ) -> Density:
        """p(y | x), event shape (L,), with its gradient.

        Args:
            x: inputs, of the network's dtype.
            mask: True where x is observed.
            scored: True where y is: only there does the density score it.
        """
        width = self.num_labels * self.likelihood.outputs_per_dim
        outputs = fold_rows(self.head, self._code(x, mask), width, "head")
        return self.likelihood(outputs, None, scored)

    @torch.no_grad()
    def predict(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> Density:
        """p(y | x), event shape (L,), in evaluation mode.

        Args:
            x: (N, D); NaN marks a missing value.
            mask: True where observed.

        Raises:
            ValueError: if x has another width, or a row with nothing observed.
        """
        x = as_rows(as_matrix(x), _like(self.head), self.input_dim)
        if (seen := observed_mask(x, mask)) is not None:
            check_rows_observed(seen)
            x = torch.where(seen, x, 0.0)
        with mode(self, training=False):
            return self.conditional(x, seen)

    def _code(self, x: Tensor, mask: Tensor | None) -> Float[Tensor, "N K"]:
        if self.encoder != "frozen":
            return self.code_guide.distribution(x, mask=mask).mean
        with mode(self.code_guide, training=False), torch.no_grad():
            return self.code_guide.distribution(x, mask=mask).mean

    def _parted(self, rows: Tensor | None) -> tuple[Any, Any]:
        if rows is None:
            return None, None
        return rows[:, : self.input_dim], rows[:, self.input_dim :]

    @property
    def scored_columns(self) -> slice:
        """Which columns of :meth:`rows` have a density: the labels."""
        return slice(self.input_dim, None)

    def check_data(self, x: Float[Tensor, "N R"], mask: Tensor | None = None) -> None:
        """Check that labels lie in the likelihood's support.

        Raises:
            ValueError: if not.
        """
        self.likelihood.check(self._parted(x)[1], self._parted(mask)[1])


def _like(program: nn.Module) -> Tensor:
    return next((p for p in program.parameters() if p.is_floating_point()), torch.empty(0))


def _coder(pair: DecoderModel) -> Any:
    guide: Any = getattr(pair, "guide", None)
    if not isinstance(getattr(guide, "encoder", None), nn.Module):
        raise TypeError(
            "pair must have a guide that reads codes off a network (an AmortizedGuide); that of "
            f"this {type(pair).__name__} is a {type(guide).__name__}"
        )
    coder = copy.deepcopy(guide)
    if hasattr(coder, "corruption"):
        coder.corruption = None
    return coder


def _freeze(coder: Any, width: int, *, everything: bool) -> None:
    """Freeze what codes do not depend on, such as what only makes variances; or all of it."""
    wanted = [p for p in coder.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    with isolated_store(), mode(coder, training=False):
        if _first_codes(coder, width).requires_grad:
            raise ValueError(
                "the codes depend on parameters that are not the encoder's own (a tied encoder's "
                "are its decoder's), which could neither be fine-tuned nor begin anew; take a "
                "pair whose encoder has weights of its own (tied=False)"
            )
        if everything or not wanted:
            return
        for parameter in wanted:
            parameter.requires_grad_(True)
        total = _first_codes(coder, width).sum()
        found = torch.autograd.grad(total, wanted, allow_unused=True)
    for parameter, gradient in zip(wanted, found, strict=True):
        parameter.requires_grad_(gradient is not None)


@torch.enable_grad()
def _first_codes(coder: Any, width: int) -> Float[Tensor, "2 K"]:
    return coder.distribution(torch.zeros(2, width).to(_like(coder))).mean
