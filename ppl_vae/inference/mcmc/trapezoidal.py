"""Loadings up to a rotation: coordinates of W W' in which its posterior has no ridge."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TrapezoidalLoadings:
    """Unconstrained coordinates of L in W = diag(s) L Q', L lower trapezoidal and Q orthogonal.

    The likelihood of W is that of W R for every orthogonal matrix R, and so is the prior
    W_dk ~ N(0, s_d^2): the posterior is constant along rotations, and a sampler of W has to
    follow them. L has no such freedom. With its rows in the order of the pivots, L_ij = 0 for
    j > i and L_jj > 0. Under the prior of W the elements of L are independent,

        L_ij ~ N(0, 1) for j < i,    L_jj^2 ~ chi-squared with K - j degrees of freedom,
        j = 0, ..., K - 1,

    for any order of the rows, and Q is independent of L and uniform on the orthogonal group.
    Hence the order of the rows can be chosen from data without a change of the prior.

    The coordinates are the elements below the diagonal, row by row, and the logarithms of the
    elements on the diagonal.

    Attributes:
        order: the rows of W in the order of the rows of L, those of the pivots first, (D,).
        scale: s, (D,).
        latent_dim: K, at most D.

    References:
        Leung, Drton: Order-invariant prior specification in Bayesian factor analysis (2016).
    """

    order: Int[Tensor, " D"]
    scale: Float[Tensor, " D"]
    latent_dim: int

    @classmethod
    def pivoted(cls, loadings: Float[Tensor, "D K"], scale: Float[Tensor, " D"]) -> Self:
        """Pivots from a QR decomposition of W' diag(s)^-1 with column pivoting.

        The pivots are rows that are large and far from collinear, so that the diagonal of L is
        far from zero, where its logarithm has a long tail.
        """
        from scipy.linalg import qr

        scaled = (loadings / scale.unsqueeze(-1)).detach().cpu().numpy()
        factors: Any = qr(scaled.T, pivoting=True, mode="economic")
        order = torch.from_numpy(factors[2].astype(np.int64)).to(scale.device)
        return cls(order, scale, loadings.shape[1])

    @property
    def num_coordinates(self) -> int:
        """The number of coordinates."""
        return len(self._below[0]) + self.latent_dim

    @cached_property
    def _below(self) -> tuple[Tensor, Tensor]:
        # The places below the diagonal, row by row.
        rows, columns = np.tril_indices(len(self.scale), -1, self.latent_dim)
        device = self.scale.device
        return torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)

    @cached_property
    def _freedom(self) -> Tensor:
        return self.latent_dim - torch.arange(self.latent_dim).to(self.scale)

    @property
    def _log_chi_constant(self) -> Tensor:
        return (self._freedom / 2 - 1) * math.log(2) + torch.lgamma(self._freedom / 2)

    def loadings(self, coordinates: Float[Tensor, "*S P"]) -> Float[Tensor, "*S D K"]:
        """diag(s) L with its rows in the order of W: loadings with Q the identity."""
        rows, columns = self._below
        below, log_diagonal = coordinates.split([len(rows), self.latent_dim], -1)
        pivots = torch.arange(self.latent_dim, device=rows.device)
        places = torch.cat([rows, pivots]) * self.latent_dim + torch.cat([columns, pivots])
        values = torch.cat([below, log_diagonal.exp()], -1)
        size = len(self.scale) * self.latent_dim
        flat = values.new_zeros(*values.shape[:-1], size)
        flat = flat.index_copy(-1, places, values)
        lower = flat.unflatten(-1, (len(self.scale), self.latent_dim))
        return lower.index_select(-2, self.order.argsort()) * self.scale.unsqueeze(-1)

    def coordinates(self, loadings: Float[Tensor, "*S D K"]) -> Float[Tensor, "*S P"]:
        """The coordinates of W; those of W R for orthogonal R are the same."""
        scaled = (loadings / self.scale.unsqueeze(-1)).index_select(-2, self.order)
        upper = torch.linalg.qr(scaled.mT, mode="r").R  # W' = Q R, and L = R'
        lower = upper.mT
        diagonal = lower.diagonal(dim1=-2, dim2=-1)
        lower = lower * torch.where(diagonal < 0, -1.0, 1.0).unsqueeze(-2)
        rows, columns = self._below
        return torch.cat([lower[..., rows, columns], diagonal.abs().log()], -1)

    def log_prior(self, coordinates: Float[Tensor, "*S P"]) -> Float[Tensor, "*S"]:
        """log of the density of the coordinates under W_dk ~ N(0, s_d^2).

        With t = log L_jj and nu = K - j, that of t is
        nu t - exp(2 t) / 2 - (nu / 2 - 1) log 2 - log Gamma(nu / 2).
        """
        count = len(self._below[0])
        below, log_diagonal = coordinates.split([count, self.latent_dim], -1)
        diagonal = self._freedom * log_diagonal - (2 * log_diagonal).exp() / 2
        normal = -below.square().sum(-1) / 2 - count * math.log(2 * math.pi) / 2
        return normal + (diagonal - self._log_chi_constant).sum(-1)

    def log_volume(self, coordinates: Float[Tensor, "*S P"]) -> Float[Tensor, "*S"]:
        """log of the density of (coordinates, Q), Q with its uniform distribution, relative to
        that of W: p(coordinates, Q) = p(W) exp(log_volume).

        It is the same for every density of W, so it is the ratio of both under W_dk ~ N(0, s_d^2),
        where the squares of L and of W / s cancel.
        """
        log_diagonal = coordinates[..., -self.latent_dim :]
        above = len(self.scale) * self.latent_dim - len(self._below[0])
        constant = above * math.log(2 * math.pi) / 2 + self.latent_dim * self.scale.log().sum()
        return constant + (self._freedom * log_diagonal - self._log_chi_constant).sum(-1)


def orthogonal(normal: Float[Tensor, "*S K K"]) -> Float[Tensor, "*S K K"]:
    """The orthogonal factor Q of G = Q R with the diagonal of R positive.

    It is uniform on the orthogonal group (Haar measure) if the elements of G are independent
    standard normal.

    References:
        Mezzadri: How to generate random matrices from the classical compact groups (2007).
    """
    q, r = torch.linalg.qr(normal)
    sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return q * sign.unsqueeze(-2)
