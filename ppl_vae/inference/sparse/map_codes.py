"""The best code of each datum under an autoencoder's model: what an encoder only approximates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.program import as_data_and_mask, check_support
from ppl_vae.core.results import Result
from ppl_vae.core.state import isolated_store, mode
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.inference.sparse.lasso import Lasso, why_no_lasso
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.networks.sparse_layers import soft_threshold

SLACK = 8.0
"""In units of the dtype's resolution: by so much values and slopes may be off."""
LONGEST, SHORTEST = 2.0**20, 2.0**-40
"""Step lengths, in units of z squared a nat; they begin at the longest and are only halved."""


@dataclass(frozen=True, repr=False)
class BestCodes(Result):
    """argmax_z log p(x_n, z) of each datum.

    Attributes:
        codes: (N, K), exactly zero where the penalty holds them there.
        log_joint: log p(x_n, z_n), in nats.
        converged: whether the slope that is left is below the tolerance, (N,).
        steps: iterations done, or sweeps.
    """

    codes: Float[Tensor, "N K"]
    log_joint: Float[Tensor, " N"]
    converged: Bool[Tensor, " N"]
    steps: int

    @property
    def share_of_zeros(self) -> float:
        """The share of code entries that are exactly zero."""
        return float((self.codes == 0).double().mean())

    def __repr__(self) -> str:
        done, number = int(self.converged.sum()), len(self.codes)
        return (
            f"best codes of {number} data: log p(x, z) {self.log_joint.mean():.4f} nats per "
            f"datum, {self.share_of_zeros:.0%} of entries zero\n"
            f"  {self.steps} steps, converged for {done} of {number}"
        )


@torch.no_grad()
def best_codes(
    autoencoder: Autoencoder,
    x: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    tolerance: float = 1e-5,
    max_iterations: int = 10_000,
) -> BestCodes:
    """The code of highest log p(x, z) of each datum.

    A Laplace prior makes exact zeros of most entries. With a linear decoder and Gaussian noise of
    fixed scale this is the lasso, and what is found its optimum; with others it is a local one.

    Complete data under unit columns and a Laplace prior are swept by coordinate descent, in
    float64 (:class:`~ppl_vae.inference.sparse.lasso.Lasso`). All else goes by proximal gradient
    steps (FISTA): down the slope of -log p(x | z), or of -log p(x, z) where the prior is smooth,
    then soft thresholding. Step lengths are found, and momentum is dropped where it leads uphill,
    for each datum by itself.

    These are the codes of dictionary learning. Beside them stand those of an encoder: the log
    joint here is never below the autoencoder's ``elbo``, except by less than the tolerance, where
    the optimum is the only one.

    Args:
        autoencoder: its decoder, likelihood and prior are used; not its guide.
        x: (N, D); NaN marks a missing value.
        mask: True where observed.
        tolerance: the largest slope that may be left, in nats a unit of z_k; where a code is
            zero, the largest by which it may exceed the penalty.
        max_iterations: at most so many steps, or sweeps.

    Raises:
        ValueError: bad data, or numbers that are not positive.

    References:
        Beck, Teboulle: A fast iterative shrinkage-thresholding algorithm (2009); O'Donoghue,
        Candes: Adaptive restart for accelerated gradient schemes (2015).
    """
    check_int("max_iterations", max_iterations)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, in nats a unit of z; got {tolerance}")
    x, mask = as_data_and_mask(x, mask, model=autoencoder.model)
    check_support(autoencoder.model, x, mask)

    prior, sharp = autoencoder.prior(), autoencoder.prior_kind == "laplace"

    def loss(z: Tensor) -> Tensor:
        given = autoencoder.conditional(z, x, mask, observe=True).log_prob(x)
        return -given if sharp else -given - prior.log_prob(z)

    with isolated_store(), mode(autoencoder, training=False):
        if mask is None and not why_no_lasso(autoencoder):
            z, left, steps = _swept(autoencoder, x, tolerance, max_iterations)
            return BestCodes(z, prior.log_prob(z) - loss(z), left <= tolerance, steps)
        start = x.new_zeros(len(x), autoencoder.latent_dim)
        search = _Search(loss, start, autoencoder.penalty if sharp else 0.0)
        steps = search.run(tolerance, max_iterations)
        log_joint = (prior.log_prob(search.z) if sharp else 0.0) - loss(search.z)
    return BestCodes(search.z, log_joint, search.left <= tolerance, steps)


def _swept(
    autoencoder: Autoencoder, x: Tensor, tolerance: float, most: int
) -> tuple[Tensor, Tensor, int]:
    lasso, likelihood = Lasso.of(autoencoder, x), cast(Any, autoencoder.likelihood)
    variance = likelihood.scale**2  # of a step's length over it is a slope in nats
    codes = torch.zeros_like(lasso.towards)
    steps = lasso.solve(codes, tolerance * variance, most)
    return codes.T.contiguous().to(x), lasso.left(codes) / variance, steps


class _Search:
    """Rows z, the point y ahead of them where slopes are taken, and each row's step length."""

    def __init__(
        self,
        loss: Callable[[Tensor], Tensor],
        start: Float[Tensor, "N K"],
        penalty: float,
    ) -> None:
        self.loss, self.penalty = loss, penalty
        self.z = self.ahead = start
        self.momentum = torch.ones_like(start[:, :1])
        self.length = torch.full_like(start[:, :1], LONGEST)
        self.left = torch.full_like(start[:, 0], torch.inf)

    def run(self, tolerance: float, most: int) -> int:
        """Steps until no row has more slope left than this; returns how many there were."""
        for step in range(1, most + 1):
            self._step()
            if step % 10 == 0 and bool((self.left <= tolerance).all()):
                return step
        return most

    def _step(self) -> None:
        new = self._proximal()
        self.left = ((new - self.ahead) / self.length).abs().amax(1)
        uphill = ((self.ahead - new) * (new - self.z)).sum(1, keepdim=True) > 0
        before = torch.where(uphill, 1.0, self.momentum)
        self.momentum = (1 + (1 + 4 * before.square()).sqrt()) / 2
        push = torch.where(uphill, 0.0, (before - 1) / self.momentum)
        self.ahead, self.z = new + push * (new - self.z), new

    def _proximal(self) -> Tensor:
        """The step from the point ahead, no longer than the loss's curvature on the way allows."""
        value, slope = self.loss(self.ahead), self._slope(self.ahead)
        eps = SLACK * torch.finfo(slope.dtype).eps
        while True:
            new = soft_threshold(self.ahead - self.length * slope, self.length * self.penalty)
            way = new - self.ahead
            distance = way.norm(dim=1)
            room = distance.square() / self.length[:, 0]
            # Far away values tell, close by slopes, of which rounding leaves more. NaN, of a step
            # far out, is too long as well.
            rise = self.loss(new) - value - (way * slope).sum(1)
            bend = (way * (self._slope(new) - slope)).sum(1)
            fits = rise <= room / 2 + eps * (1 + value.abs())
            fits &= bend <= room + eps * distance * slope.norm(dim=1)
            if bool((fits | (self.length[:, 0] < SHORTEST)).all()):
                return new
            self.length = torch.where(fits[:, None], self.length, self.length / 2)

    def _slope(self, z: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            return torch.autograd.grad(self.loss(leaf).sum(), leaf)[0]
