"""Layers of sparse and linear autoencoders: flat prior, thresholds, normalised columns, LISTA."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from ppl_vae.core.validation import check_int, check_option
from ppl_vae.networks.mlp_conv import ACTIVATIONS

CODE_ACTIVATIONS = ("linear", "soft-threshold", *ACTIVATIONS)
"""Last layers of an encoder of codes, by name."""
COLUMNS = ("free", "unit", "orthonormal")
"""Constraints on the columns of a linear decoder."""
PRIORS = ("flat", "normal", "laplace")
"""Priors of codes, by name."""
INITIAL_THRESHOLD = 0.1
"""Initial threshold of :class:`SoftThreshold`."""


class FlatPrior(dist.ImproperUniform):
    """The improper prior of density 1 everywhere on R^K; it cannot be sampled.

    Args:
        latent_dim: K.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__(constraints.real_vector, torch.Size(), torch.Size([latent_dim]))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "FlatPrior":
        """The same distribution with a larger batch shape."""
        new = self._get_checked_instance(FlatPrior, _instance)
        return super().expand(batch_shape, new)

    def log_prob(self, value: Float[Tensor, "*B K"]) -> Float[Tensor, "*B"]:
        """0 for each row."""
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return value.new_zeros(shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Raise an error, since a flat prior has no draws.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a flat prior cannot be sampled: an autoencoder is not a generative model. Use "
            "prior='laplace' or a VAE to draw samples; decode(z) decodes given codes"
        )


class SoftThreshold(nn.Module):
    """sign(a) max(|a| - t, 0) with a learned threshold t > 0 per column, for exact zeros.

    It is the proximal operator of an L1 penalty, and the nonlinearity of ISTA and LISTA (Gregor,
    LeCun: Learning fast approximations of sparse coding, 2010).

    Args:
        width: width of the rows.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.log_threshold = nn.Parameter(torch.empty(check_int("width", width)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every t to 0.1."""
        nn.init.constant_(self.log_threshold, math.log(INITIAL_THRESHOLD))

    def forward(self, rows: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """Shrink the entries of rows towards zero."""
        return soft_threshold(rows, self.log_threshold.exp())


def check_penalty(prior: str, penalty: float | None) -> float:
    """The penalty of a prior of codes: the given one, by default 1, and 0 for a flat prior.

    Raises:
        ValueError: if it is not positive, or given for a flat prior.
    """
    if prior == "flat":
        if penalty is not None:
            raise ValueError(
                "penalty= requires prior='laplace' or prior='normal'; prior is 'flat'"
            )
        return 0.0
    penalty = 1.0 if penalty is None else penalty
    if not penalty > 0:
        raise ValueError(f"penalty must be positive; got {penalty}. prior='flat' has none")
    return penalty


def make_code_activation(name: str, latent_dim: int) -> nn.Module:
    """The activation of K codes, one of ``CODE_ACTIVATIONS`` except ``"linear"``."""
    return SoftThreshold(latent_dim) if name == "soft-threshold" else ACTIVATIONS[name]()


def soft_threshold(values: Tensor, threshold: Tensor | float) -> Tensor:
    """sign(a) max(|a| - t, 0)."""
    return values.sign() * torch.relu(values.abs() - threshold)


class NormalizedColumns(nn.Module):
    """W z + b, where the columns of W (D, K) have unit norm or are orthonormal.

    W is a function of an unconstrained matrix: its normalised columns, or the orthogonal factor
    of its QR decomposition. It does not depend on the scale of that matrix, and gradient steps
    preserve the constraint.

    Args:
        linear: layer with the dimensions, the unconstrained matrix and the bias.
        kind: ``"unit"`` or ``"orthonormal"``.

    Attributes:
        free: the unconstrained matrix, (D, K).

    Raises:
        ValueError: if there are more orthonormal columns than dimensions.
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.kind = check_option("columns", kind, COLUMNS[1:])
        if kind == "orthonormal" and linear.in_features > linear.out_features:
            raise ValueError(
                f"columns='orthonormal': {linear.in_features} columns cannot be orthogonal in "
                f"{linear.out_features} dimensions; use columns='unit', or fewer"
            )
        self.free = linear.weight
        self.bias = linear.bias

    @property
    def weight(self) -> Float[Tensor, "D K"]:
        """W."""
        if self.kind == "unit":
            return F.normalize(self.free, dim=0)
        q, r = torch.linalg.qr(self.free)
        return q * r.diagonal().sign()  # signs make Q a continuous function of the matrix

    def forward(self, z: Float[Tensor, "B K"]) -> Float[Tensor, "B D"]:
        """W z + b."""
        return F.linear(z, self.weight, self.bias)


class TiedEncoder(nn.Module):
    """W'(x - b), the encoder with the tied weights of a linear decoder W z + b.

    Args:
        decoder: layer with ``weight`` (D, K) and ``bias`` (D,). It is no submodule: its
            parameters belong to the model.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self._held = (decoder,)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """W'(x - b)."""
        decoder: Any = self._held[0]
        return (x - decoder.bias) @ decoder.weight


class LISTA(nn.Module):
    """Learned ISTA: a few steps of iterative soft thresholding with learned parameters.

        z_1 = S(A x + c),   z_{s+1} = S(A x + c + M z_s)

    with S(a) = sign(a) max(|a| - t, 0), and the same A (K, D), c (K,), M (K, K) and t (K,) in all
    steps. They are initialised to ISTA for the lasso |x - W z - b|^2 / 2 + threshold |z|_1:
    A = W' / L, c = -A b, M = I - W'W / L, t = threshold / L, L the largest eigenvalue of W'W.

    Args:
        dictionary: layer with ``weight`` W (D, K) and ``bias`` b (D,), used for initialisation.
        threshold: threshold of the lasso: penalty times variance of the Gaussian noise.
        steps: number of steps, at least 1.

    Raises:
        ValueError: if the threshold is not positive.

    References:
        Gregor, LeCun: Learning fast approximations of sparse coding (2010).
    """

    def __init__(self, dictionary: nn.Module, threshold: float, *, steps: int = 3) -> None:
        super().__init__()
        self.steps = check_int("steps", steps)
        if not threshold > 0:
            raise ValueError(f"threshold must be positive, as the lasso's is; got {threshold}")
        layer: Any = dictionary
        weight, bias = layer.weight.detach(), layer.bias.detach()
        gram = weight.T @ weight
        largest = torch.linalg.eigvalsh(gram)[-1]
        self.input_map = nn.Linear(*weight.shape).to(weight)
        with torch.no_grad():
            self.input_map.weight.copy_(weight.T / largest)
            self.input_map.bias.copy_(-(weight.T @ bias) / largest)
        self.lateral = nn.Parameter(torch.eye(len(gram)).to(gram) - gram / largest)
        self.log_threshold = nn.Parameter((threshold / largest).log().repeat(len(gram)))

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """The code after the last step."""
        drive, threshold = self.input_map(x), self.log_threshold.exp()
        z = soft_threshold(drive, threshold)
        for _ in range(self.steps - 1):
            z = soft_threshold(drive + z @ self.lateral.T, threshold)
        return z
