"""Supervised networks initialised from encoders: pairs without latent variables."""

import copy
from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Bool, Float, Int
from pyro.nn import pyro_method
from torch import Tensor, nn

from ppl_vae.core.arrays.inputs import as_rows, learn_schema
from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.config import configurable
from ppl_vae.core.program import Density, Program, data_plate, fold_rows
from ppl_vae.core.state import isolated_store, seeded, train_mode
from ppl_vae.core.validation import (
    ArrayLike,
    as_matrix,
    as_vector,
    check_int,
    check_option,
    check_rows_observed,
    observed_mask,
)
from ppl_vae.likelihoods.base import Likelihood
from ppl_vae.models.decoder_model import DecoderModel
from ppl_vae.models.latent_variable_model import reference_tensor
from ppl_vae.networks.mlp_conv import reset

ENCODERS = ("fine-tuned", "frozen", "scratch")


class SupervisedEncoder(Program):
    """p(y | x) = likelihood(A f(x) + b), with f the encoder of a fitted model, as a pair.

    f(x) is the mean of q(z | x) under the model's amortized guide. There are no latent variables,
    so the ELBO of ``model`` and ``guide`` (which samples nothing) is log p(y | x), in nats per
    datum, and ``fit_svi`` on :meth:`rows` of x and y is maximum likelihood. With
    :class:`~ppl_vae.Categorical` it is a classifier.

    Args:
        pretrained: a model whose guide reads codes off a network. The guide is copied, and the
            model is not changed.
        likelihood: the likelihood of y.
        num_labels: columns of y, L.
        encoder: ``"fine-tuned"``: f starts at the model's weights and is trained with A and b;
            ``"frozen"``: f keeps these weights, and only A and b are trained; ``"scratch"``: the
            same network is initialised again.
            The corruption that the model applies to x in training is left out.
        seed: the seed of the initial A and b, and of f from scratch. A and b do not depend on
            ``encoder``.

    Raises:
        TypeError: if the model's guide has no encoder.
        ValueError: if codes depend on parameters that the encoder does not own, such as those of a
            tied decoder; from scratch, if a layer has no ``reset_parameters``.

    References:
        Erhan et al.: Why does unsupervised pre-training help deep learning? (2010).

    Example:
        >>> vae = VAE.mlp(data_dim=64, latent_dim=8, seed=0)
        >>> network = SupervisedEncoder(vae, Categorical(10), seed=0)
        >>> network.conditional(torch.zeros(3, 64)).event_shape
        torch.Size([1])
    """

    @configurable
    def __init__(
        self,
        pretrained: DecoderModel,
        likelihood: Likelihood,
        *,
        num_labels: int = 1,
        encoder: str = "fine-tuned",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = check_option("encoder", encoder, ENCODERS)
        self.input_dim, self.num_labels = pretrained.data_dim, check_int("num_labels", num_labels)
        self.data_dim = self.input_dim + self.num_labels
        self.code_guide: Any = _copy_guide(pretrained)
        self.likelihood = likelihood
        likelihood.set_data_dim(num_labels)
        _freeze_unused(self.code_guide, self.input_dim, freeze_all=encoder == "frozen")
        with seeded(seed):  # the head first, so that it is the same for every encoder
            width = num_labels * likelihood.outputs_per_dim
            head = nn.Linear(pretrained.latent_dim, width)
            self.head = head.to(reference_tensor(self.code_guide))
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
        rows = as_rows(x, reference_tensor(self), self.data_dim)
        inputs, labels = self._split(rows)
        input_mask, label_mask = self._split(mask)
        with data_plate(len(rows), index=index, num_data=num_data, device=rows.device):
            density = self.conditional(inputs, input_mask, label_mask)
            return pyro.sample("y", density, obs=labels if observe else None)

    @pyro_method
    def guide(self, x: ArrayLike, **_: Any) -> None:
        """Sample nothing: there are no latent variables."""

    def rows(self, x: ArrayLike, y: ArrayLike) -> Float[Tensor, "N R"]:
        """The matrix [x, y], whose rows :meth:`model` takes; columns of a data frame x are kept as
        ``schema``.

        Args:
            x: (N, D); NaN marks a missing value.
            y: (N, L), or (N,) for one column; a row without a label (NaN) does not contribute.

        Raises:
            ValueError: if x or y has another width, if their numbers of rows differ, or if a row
                of x has nothing observed.
        """
        weight = self.head.weight
        y = as_vector(y)[:, None] if np.ndim(y) == 1 else y
        schema = TableSchema.of(x)
        x = as_matrix(x, schema=self.schema, dtype=weight.dtype, device=weight.device)
        y = as_matrix(y, name="y", dtype=weight.dtype, device=weight.device)
        expected = (self.input_dim, self.num_labels)
        if (x.shape[1], y.shape[1]) != expected or len(x) != len(y):
            raise ValueError(
                f"x and y must have {expected[0]} and {expected[1]} columns and the same rows; "
                f"they have shapes {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if (observed := observed_mask(x)) is not None:
            check_rows_observed(observed)
        learn_schema(self, schema)
        return torch.cat([x, y], 1)

    def conditional(
        self,
        x: Float[Tensor, "N D"],
        mask: Bool[Tensor, "N D"] | None = None,
        label_mask: Bool[Tensor, "N L"] | None = None,
    ) -> Density:
        """p(y | x), event shape (L,), with its gradient.

        Args:
            x: inputs, of the network's dtype.
            mask: True where x is observed.
            label_mask: True where y is observed; the density scores these entries only.
        """
        width = self.num_labels * self.likelihood.outputs_per_dim
        outputs = fold_rows(self.head, self._code(x, mask), width, "head")
        return self.likelihood(outputs, None, label_mask)

    @torch.no_grad()
    def predict(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> Density:
        """p(y | x), event shape (L,), in evaluation mode.

        Args:
            x: (N, D); NaN marks a missing value.
            mask: True where observed.

        Raises:
            ValueError: if x has another width, or a row with nothing observed.
        """
        x = as_matrix(x, mask=mask, schema=self.schema)
        x = as_rows(x, self.head.weight, self.input_dim)
        if (observed := observed_mask(x)) is not None:
            check_rows_observed(observed)
            x = torch.where(observed, x, 0.0)
        with train_mode(self, training=False):
            return self.conditional(x, observed)

    def _code(self, x: Tensor, mask: Tensor | None) -> Float[Tensor, "N K"]:
        if self.encoder != "frozen":
            return self.code_guide.distribution(x, mask=mask).mean
        with train_mode(self.code_guide, training=False), torch.no_grad():
            return self.code_guide.distribution(x, mask=mask).mean

    def _split(self, rows: Tensor | None) -> tuple[Any, Any]:
        if rows is None:
            return None, None
        return rows[:, : self.input_dim], rows[:, self.input_dim :]

    @property
    def scored_columns(self) -> slice:
        """The columns of :meth:`rows` that have a density: the labels."""
        return slice(self.input_dim, None)

    def check_data(self, x: Float[Tensor, "N R"], mask: Tensor | None = None) -> None:
        """Check that labels lie in the likelihood's support.

        Raises:
            ValueError: if not.
        """
        self.likelihood.check(self._split(x)[1], self._split(mask)[1])


def _copy_guide(pretrained: DecoderModel) -> Any:
    guide: Any = getattr(pretrained, "guide", None)
    if not isinstance(getattr(guide, "encoder", None), nn.Module):
        raise TypeError(
            "pretrained must have a guide that reads codes off a network (an AmortizedGuide); the "
            f"guide of this {type(pretrained).__name__} is a {type(guide).__name__}"
        )
    guide = copy.deepcopy(guide)
    if hasattr(guide, "corruption"):
        guide.corruption = None
    return guide


def _freeze_unused(guide: Any, width: int, *, freeze_all: bool) -> None:
    """Freeze parameters on which the codes do not depend, such as those of variances; or all."""
    trainable = [p for p in guide.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    with isolated_store(), train_mode(guide, training=False):
        if _codes_of_zeros(guide, width).requires_grad:
            raise ValueError(
                "the codes depend on parameters that are not the encoder's own (those of a tied "
                "encoder are its decoder's), which can neither be fine-tuned nor initialised "
                "again; take a model whose encoder has its own weights (tied=False)"
            )
        if freeze_all or not trainable:
            return
        for parameter in trainable:
            parameter.requires_grad_(True)
        total = _codes_of_zeros(guide, width).sum()
        gradients = torch.autograd.grad(total, trainable, allow_unused=True)
    for parameter, gradient in zip(trainable, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


@torch.enable_grad()
def _codes_of_zeros(guide: Any, width: int) -> Float[Tensor, "2 K"]:
    return guide.distribution(torch.zeros(2, width).to(reference_tensor(guide))).mean
