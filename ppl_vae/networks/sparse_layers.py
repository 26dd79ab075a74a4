"""Parts of autoencoders: priors that are none, codes with exact zeros, columns of one length."""

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
COLUMNS = ("free", "unit", "orthonormal")
PRIORS = ("flat", "normal", "laplace")
FIRST_THRESHOLD = 0.1


class FlatPrior(dist.ImproperUniform):
    """The improper prior of density 1 everywhere on R^K; it cannot be sampled.

    Args:
        latent_dim: K.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__(constraints.real_vector, torch.Size(), torch.Size([latent_dim]))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "FlatPrior":
        """The same for a larger batch."""
        new = self._get_checked_instance(FlatPrior, _instance)
        return super().expand(batch_shape, new)

    def log_prob(self, value: Float[Tensor, "*B K"]) -> Float[Tensor, "*B"]:
        """0 for each row, on its device."""
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return value.new_zeros(shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a flat prior cannot be sampled: an autoencoder does not generate. Take "
            "prior='laplace' or a VAE to draw from; decode(z) decodes codes of your own"
        )


class SoftThreshold(nn.Module):
    """sign(a) max(|a| - t, 0), with a learned threshold t > 0 for each column: exact zeros.

    It is what a proximal step under an L1 penalty does, and the first step of ISTA where codes
    are read off data (Gregor, LeCun: Learning fast approximations of sparse coding, 2010).

    Args:
        width: of the rows.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.log_threshold = nn.Parameter(torch.empty(check_int("width", width)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every t = 0.1."""
        nn.init.constant_(self.log_threshold, math.log(FIRST_THRESHOLD))

    def forward(self, rows: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """Rows shrunk towards zero."""
        return soft_threshold(rows, self.log_threshold.exp())


def penalty_of(prior: str, penalty: float | None) -> float:
    """The penalty of a prior of codes, 1 unless it is given; 0 of a flat one.

    Raises:
        ValueError: if it is not positive, or given for a flat prior.
    """
    if prior == "flat":
        if penalty is not None:
            raise ValueError(
                "penalty= is that of prior='laplace' or prior='normal'; prior is 'flat'"
            )
        return 0.0
    penalty = 1.0 if penalty is None else penalty
    if not penalty > 0:
        raise ValueError(f"penalty must be positive; got {penalty}. prior='flat' has none")
    return penalty


def code_layer(name: str, latent_dim: int) -> nn.Module:
    """The last layer of an encoder of K codes, one of ``CODE_ACTIVATIONS`` but ``"linear"``."""
    return SoftThreshold(latent_dim) if name == "soft-threshold" else ACTIVATIONS[name]()


def soft_threshold(values: Tensor, threshold: Tensor | float) -> Tensor:
    """sign(a) max(|a| - t, 0): zero within t of zero, and closer to zero by t elsewhere."""
    return values.sign() * torch.relu(values.abs() - threshold)


class NormalizedColumns(nn.Module):
    """W z + b, where W (D, K) has columns of length one, which may be orthogonal besides.

    W is read off free numbers: each of their columns over its length, or the orthogonal factor of
    their QR decomposition. So the free numbers' scale makes no difference, and plain gradient
    steps keep what is asked of W.

    Args:
        linear: gives the width of input and output, the free numbers and the bias.
        kind: ``"unit"`` or ``"orthonormal"``.

    Raises:
        ValueError: if more orthonormal columns are asked for than there are dimensions.
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
        return q * r.diagonal().sign()  # a continuous function of the free numbers so

    def forward(self, z: Float[Tensor, "B K"]) -> Float[Tensor, "B D"]:
        """W z + b."""
        return F.linear(z, self.weight, self.bias)


class TiedEncoder(nn.Module):
    """W'(x - b): the encoder that shares the weights of a linear decoder W z + b.

    Args:
        decoder: has ``weight`` (D, K) and ``bias`` (D,). It is held, not owned: its parameters
            are the model's.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self._held = (decoder,)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """W'(x - b)."""
        decoder: Any = self._held[0]
        return (x - decoder.bias) @ decoder.weight


class LISTA(nn.Module):
    """Some steps of iterative soft thresholding as a network, which learns to need no more.

        z_1 = S(A x + c),   z_{s+1} = S(A x + c + M z_s)

    with S(a) = sign(a) max(|a| - t, 0), and the same A (K, D), c (K,), M (K, K) and t (K,) in all
    steps. They begin as those of ISTA for the lasso |x - W z - b|^2 / 2 + threshold |z|_1:
    A = W' / L, c = -A b, M = I - W'W / L, t = threshold / L, L the largest eigenvalue of W'W.

    Args:
        dictionary: has ``weight`` W (D, K) and ``bias`` b (D,), of which the start is read.
        threshold: of the lasso: penalty times noise variance, where noise is Gaussian.
        steps: at least 1.

    Raises:
        ValueError: a threshold that is not positive.

    References:
        Gregor, LeCun: Learning fast approximations of sparse coding (2010).
    """

    def __init__(self, dictionary: nn.Module, threshold: float, *, steps: int = 3) -> None:
        super().__init__()
        self.steps = check_int("steps", steps)
        if not threshold > 0:
            raise ValueError(f"threshold must be positive, as the lasso's is; got {threshold}")
        held: Any = dictionary
        weight, bias = held.weight.detach(), held.bias.detach()
        gram = weight.T @ weight
        largest = torch.linalg.eigvalsh(gram)[-1]
        self.read = nn.Linear(*weight.shape).to(weight)
        with torch.no_grad():
            self.read.weight.copy_(weight.T / largest)
            self.read.bias.copy_(-(weight.T @ bias) / largest)
        self.mix = nn.Parameter(torch.eye(len(gram)).to(gram) - gram / largest)
        self.log_threshold = nn.Parameter((threshold / largest).log().repeat(len(gram)))

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """The code after all steps."""
        seen, threshold = self.read(x), self.log_threshold.exp()
        z = soft_threshold(seen, threshold)
        for _ in range(self.steps - 1):
            z = soft_threshold(seen + z @ self.mix.T, threshold)
        return z
