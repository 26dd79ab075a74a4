"""The density of the observed entries of x ~ N(mu, W W' + Psi), for any batch of parameters."""

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import constraints


class ObservedGaussian(dist.TorchDistribution):
    """N(mu, W W' + diag(sigma^2)) of rows of which some entries may be missing.

    Entries that are missing are integrated out; in ``log_prob`` they may hold any finite number.
    With A = Psi^-1/2 W of the observed rows of W, P = I + A'A and r = Psi^-1/2 (x - mu),
    log p = -1/2 (r'r - r'A P^-1 A'r + log det P + sum log(2 pi sigma^2)), by Woodbury's identity.

    Args:
        loadings: W, (*S, D, K); the shapes before the last dimensions broadcast to that of the
            batch.
        loc: mu, (*L, D).
        scale: sigma, (*P, D).
        mask: True where observed, (*B, D); all entries are if None.
    """

    arg_constraints: ClassVar[Any] = {}  # pyright: ignore
    support: Any = constraints.real_vector  # pyright: ignore
    has_rsample = True

    def __init__(
        self,
        loadings: Float[Tensor, "*S D K"],
        loc: Float[Tensor, "*L D"],
        scale: Float[Tensor, "*P D"],
        mask: Bool[Tensor, "*B D"] | None = None,
    ) -> None:
        self.loadings, self.loc, self.scale, self.mask_ = loadings, loc, scale, mask
        shapes = [loadings.shape[:-2], loc.shape[:-1], scale.shape[:-1]]
        shapes += [] if mask is None else [mask.shape[:-1]]
        batch = torch.broadcast_shapes(*shapes)
        super().__init__(batch, loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ObservedGaussian":
        """The same density with this batch shape."""
        shape = torch.Size(batch_shape)
        wide = ObservedGaussian(self.loadings, self.loc.expand(*shape, -1), self.scale, self.mask_)
        return wide

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Complete rows: W z + mu + sigma * noise."""
        shape = torch.Size(sample_shape) + self.batch_shape
        z = self.loc.new_empty(*shape, self.loadings.shape[-1]).normal_()
        noise = self.loc.new_empty(*shape, self.loc.shape[-1]).normal_()
        return _times(z, self.loadings.mT) + self.loc + self.scale * noise

    def log_prob(self, value: Float[Tensor, "*B D"]) -> Tensor:
        """log p of the observed entries, of the batch shape."""
        scaled = self.loadings / self.scale.unsqueeze(-1)
        residual = (value - self.loc) / self.scale
        log_variance = math.log(2 * math.pi) + 2 * self.scale.log()
        if self.mask_ is not None:
            observed = self.mask_.to(scaled.dtype)
            scaled = scaled * observed.unsqueeze(-1)
            residual, log_variance = residual * observed, log_variance * observed
        eye = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
        tril = torch.linalg.cholesky(scaled.mT @ scaled + eye)
        projected = torch.linalg.solve_triangular(
            tril, _times(residual, scaled).unsqueeze(-1), upper=False
        )
        log_det = 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + log_variance.sum(-1)
        quadratic = residual.square().sum(-1) - projected.square().sum((-2, -1))
        return -0.5 * (quadratic + log_det)


def _times(rows: Float[Tensor, "*B M"], matrix: Float[Tensor, "*S M L"]) -> Float[Tensor, "*R L"]:
    # Rows times matrices of a batch that broadcasts against that of the rows.
    return (rows.unsqueeze(-2) @ matrix).squeeze(-2)
