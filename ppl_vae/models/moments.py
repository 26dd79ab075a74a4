"""Sufficient statistics of complete data for linear-Gaussian models, in float64."""

from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.arguments import ArrayLike, as_matrix, at_least

CONSTANT_COLUMNS = "constant columns"
"""How the note on columns that do not vary begins."""


def check_complete(x: Float[Tensor, "N D"]) -> None:
    """Check that nothing is missing.

    Raises:
        ValueError: if x has NaN.
    """
    if num_missing := int(x.isnan().sum()):
        raise ValueError(
            f"x has {num_missing} missing entries, and this needs complete data; fill them, "
            "or use fit_svi with an AmortizedGuide, which scores the observed cells"
        )


class SampleCovariance:
    """Mean and covariance over N (not N - 1) of complete data, without a D x D matrix if D > N.

    Attributes:
        mean: (D,).
        trace: of the covariance S, ().
        data_dim: D.
    """

    def __init__(
        self, mean: Tensor, factor: Tensor, gram: Tensor | None, constant: Tensor
    ) -> None:
        self.mean, self._factor, self._gram, self._constant = mean, factor, gram, constant
        self.data_dim = len(mean)
        self.trace = factor.square().sum() if gram is None else gram.trace()

    @classmethod
    def of(cls, x: ArrayLike) -> Self:
        """The statistics of the rows of x, one pass.

        Raises:
            ValueError: if x has NaN; and as :func:`~ppl_vae.program.as_matrix`.
        """
        x = as_matrix(x)
        check_complete(x)
        x = x.detach().double()
        mean = x.mean(0)
        factor = (x - mean) / len(x) ** 0.5
        gram = factor.mT @ factor if x.shape[1] <= len(x) else None
        # By comparison: rounding gives a constant column a variance.
        return cls(mean, factor, gram, (x == x[0]).all(0))

    def __matmul__(self, other: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        if self._gram is not None:
            return self._gram @ other
        return self._factor.mT @ (self._factor @ other)

    def constant_columns(self) -> list[int]:
        """Which columns do not vary."""
        return self._constant.nonzero().flatten().tolist()

    def eigh(self) -> tuple[Float[Tensor, " R"], Float[Tensor, "D R"]]:
        """Eigenvalues, largest first, and eigenvectors of S; R = min(N, D), the rest are zero."""
        if self._gram is not None:
            values, vectors = torch.linalg.eigh(self._gram)
            return values.flip(0).clamp(min=0), vectors.flip(1)
        values, vectors = torch.linalg.eigh(self._factor @ self._factor.mT)
        values = values.flip(0).clamp(min=0)
        back = self._factor.mT @ vectors.flip(1)
        return values, back / back.norm(dim=0).clamp(min=torch.finfo(back.dtype).tiny)

    def check_rank(self, latent_dim: int) -> None:
        """Check that PPCA with K latent dimensions is not singular on these data.

        Raises:
            ValueError: if K >= the rank of the centred data: the noise would be zero and the
                likelihood infinite.
        """
        at_least("latent_dim", latent_dim)
        values = self.eigh()[0]
        size = max(self._factor.shape)
        rank = int((values > values[0] * size * torch.finfo(values.dtype).eps).sum())
        if latent_dim >= rank:
            raise ValueError(
                f"latent_dim must be smaller than the rank of the centred data, {rank} (x has "
                f"shape {tuple(self._factor.shape)}): the noise would be zero; got {latent_dim}"
            )
