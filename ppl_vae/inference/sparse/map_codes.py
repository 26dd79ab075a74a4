"""The best (MAP) code of each datum under an autoencoder, which an encoder only approximates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.arrays.inputs import as_data_and_mask, check_support
from ppl_vae.core.results import Result
from ppl_vae.core.state import isolated_store, train_mode
from ppl_vae.core.text import counted
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.inference.sparse.lasso import CHECK_INTERVAL, Lasso, lasso_mismatch
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.networks.sparse_layers import soft_threshold

ROUNDING = 8.0
"""The rounding errors of values and slopes, in units of the dtype's resolution."""
MAX_STEP_SIZE, MIN_STEP_SIZE = 2.0**20, 2.0**-40
"""Step sizes, in units of z squared per nat; they start at the largest and are halved."""


@dataclass(frozen=True, repr=False)
class BestCodes(Result):
    """argmax_z log p(x_n, z) of each datum.

    Attributes:
        codes: (N, K), exactly zero where the penalty holds them there.
        log_joint: log p(x_n, z_n), in nats.
        converged: whether the remaining slope is below the tolerance, (N,).
        steps: the number of iterations, or of sweeps.
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
        converged, number = int(self.converged.sum()), len(self.codes)
        return (
            f"best codes of {counted(number, 'data point')}: log p(x, z) "
            f"{self.log_joint.mean():.4f} "
            f"nats per datum, {self.share_of_zeros:.0%} of entries zero\n"
            f"  {counted(self.steps, 'step')}, converged for {converged} of {number}"
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
    """The code of each datum that maximizes log p(x, z): the MAP estimate of z.

    A Laplace prior makes most entries exactly zero. With a linear decoder and Gaussian noise of
    fixed scale this is the lasso, and the codes are its global optimum; otherwise they are a local
    one.

    Complete data with unit columns and a Laplace prior are solved by coordinate descent, in
    float64. All other cases use proximal gradient
    steps (FISTA): a gradient step on -log p(x | z), or on -log p(x, z) if the prior is smooth,
    followed by soft thresholding. Step sizes are found by backtracking, and the momentum is reset
    where it would raise the loss, for each datum separately.

    These are the codes of dictionary learning. Compared with those of an encoder, their log joint
    is never below the autoencoder's ``elbo``, except by less than the tolerance, where the optimum
    is unique.

    Args:
        autoencoder: its decoder, likelihood and prior are used, not its guide.
        x: (N, D); NaN marks a missing value.
        mask: True where observed.
        tolerance: the largest remaining slope, in nats per unit of z_k; where a code is zero, the
            largest amount by which the slope may exceed the penalty.
        max_iterations: the largest number of steps, or of sweeps.

    Raises:
        ValueError: if x is not valid data for the model, or if ``tolerance`` or
            ``max_iterations`` is not positive.

    References:
        Beck, Teboulle: A fast iterative shrinkage-thresholding algorithm (2009); O'Donoghue,
        Candes: Adaptive restart for accelerated gradient schemes (2015).
    """
    check_int("max_iterations", max_iterations)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, in nats per unit of z; got {tolerance}")
    x, mask = as_data_and_mask(x, mask, model=autoencoder.model)
    check_support(autoencoder.model, x, mask)

    prior, laplace = autoencoder.prior(), autoencoder.prior_kind == "laplace"

    def loss(z: Tensor) -> Tensor:
        log_prob = autoencoder.conditional(z, x, mask, observe=True).log_prob(x)
        return -log_prob if laplace else -log_prob - prior.log_prob(z)

    with isolated_store(), train_mode(autoencoder, training=False):
        if mask is None and not lasso_mismatch(autoencoder):
            z, slope, steps = _coordinate_descent(autoencoder, x, tolerance, max_iterations)
            return BestCodes(z, prior.log_prob(z) - loss(z), slope <= tolerance, steps)
        start = x.new_zeros(len(x), autoencoder.latent_dim)
        fista = _Fista(loss, start, autoencoder.penalty if laplace else 0.0)
        steps = fista.run(tolerance, max_iterations)
        log_joint = (prior.log_prob(fista.z) if laplace else 0.0) - loss(fista.z)
    return BestCodes(fista.z, log_joint, fista.slope <= tolerance, steps)


def _coordinate_descent(
    autoencoder: Autoencoder, x: Tensor, tolerance: float, max_sweeps: int
) -> tuple[Tensor, Tensor, int]:
    # The codes, the largest slope of each datum, and the number of sweeps.
    lasso, likelihood = Lasso.of(autoencoder, x), cast(Any, autoencoder.likelihood)
    variance = likelihood.scale**2  # a step divided by it is a slope in nats
    codes = torch.zeros_like(lasso.correlations)
    sweeps = lasso.solve(codes, tolerance * variance, max_sweeps)
    return codes.T.contiguous().to(x), lasso.largest_step(codes) / variance, sweeps


class _Fista:
    """Accelerated proximal gradient descent with backtracking and restarts, for each row.

    Attributes:
        z: the current codes, (N, K).
        extrapolated: the points at which gradients are taken, (N, K).
        slope: the largest entry of each row's gradient mapping at the last step, (N,).
    """

    def __init__(
        self,
        loss: Callable[[Tensor], Tensor],
        start: Float[Tensor, "N K"],
        penalty: float,
    ) -> None:
        self.loss, self.penalty = loss, penalty
        self.z = self.extrapolated = start
        self.momentum = torch.ones_like(start[:, :1])
        self.step_size = torch.full_like(start[:, :1], MAX_STEP_SIZE)
        self.slope = torch.full_like(start[:, 0], torch.inf)

    def run(self, tolerance: float, max_steps: int) -> int:
        """Step until no row has a slope above ``tolerance``; returns the number of steps."""
        for step in range(1, max_steps + 1):
            self._step()
            if step % CHECK_INTERVAL == 0 and bool((self.slope <= tolerance).all()):
                return step
        return max_steps

    def _step(self) -> None:
        new = self._proximal_step()
        self.slope = ((new - self.extrapolated) / self.step_size).abs().amax(1)
        restarts = ((self.extrapolated - new) * (new - self.z)).sum(1, keepdim=True) > 0
        before = torch.where(restarts, 1.0, self.momentum)
        self.momentum = (1 + (1 + 4 * before.square()).sqrt()) / 2
        weight = torch.where(restarts, 0.0, (before - 1) / self.momentum)
        self.extrapolated, self.z = new + weight * (new - self.z), new

    def _proximal_step(self) -> Tensor:
        """The step from the extrapolated point, with a size that the loss's curvature allows."""
        value, gradient = self.loss(self.extrapolated), self._gradient(self.extrapolated)
        eps = ROUNDING * torch.finfo(gradient.dtype).eps
        while True:
            target = self.extrapolated - self.step_size * gradient
            new = soft_threshold(target, self.step_size * self.penalty)
            change = new - self.extrapolated
            distance = change.norm(dim=1)
            limit = distance.square() / self.step_size[:, 0]
            # Far from the optimum the increase of the loss decides, near it the curvature along
            # the step, which loses fewer digits to rounding. NaN, far out, means too large a step.
            increase = self.loss(new) - value - (change * gradient).sum(1)
            curvature = (change * (self._gradient(new) - gradient)).sum(1)
            accepted = increase <= limit / 2 + eps * (1 + value.abs())
            accepted &= curvature <= limit + eps * distance * gradient.norm(dim=1)
            if bool((accepted | (self.step_size[:, 0] < MIN_STEP_SIZE)).all()):
                return new
            self.step_size = torch.where(accepted[:, None], self.step_size, self.step_size / 2)

    def _gradient(self, z: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            return torch.autograd.grad(self.loss(leaf).sum(), leaf)[0]
