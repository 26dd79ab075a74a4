"""Dictionary learning: sparse codes and a dictionary in turn, each step in closed form."""

import time
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.program import as_data_and_mask
from ppl_vae.core.results import FitResult
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.guides.guides import PerDatumGuide
from ppl_vae.inference.em.history import EMHistory
from ppl_vae.inference.sparse.lasso import Lasso, linear_layer, why_no_lasso
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.networks.sparse_layers import NormalizedColumns

SWEEPS = 3
"""Over the codes for one over the columns: with more each iteration gains more, a second less."""
LAST_SWEEPS, SETTLED = 1000, 1e-8
"""The last codes are swept until none would move by more than this share of the largest one."""
NO_BOUND = "what is maximised is log p(x, z), and no bound on log p(x)"
UNTRAINED = "the guide is as it was: fit_svi trains an encoder, best_codes needs none"
SLACK = 8.0
"""In units of float64's resolution: by so much the objective may be off."""


@torch.no_grad()
def fit_dictionary(
    autoencoder: Autoencoder,
    x: ArrayLike,
    *,
    tol: float = 1e-4,
    max_iterations: int = 1000,
) -> FitResult:
    """Fit a linear decoder with unit columns, a dictionary, by codes and columns in turn.

    With x | z ~ N(W z + b, sigma^2 I), a Laplace prior of penalty lambda, S_t(a) = sign(a)
    max(|a| - t, 0) and r_n = x_n - W z_n - b, each of these is the best choice given all others:

        z_nk = S_t(w_k'r_n + z_nk),  t = lambda sigma^2
        w_k  = u / |u|,  u = sum_n z_nk (r_n + w_k z_nk)
        b    = mean_n (x_n - W z_n)

    so mean log p(x_n, z_n) never falls. Sweeps over the codes alternate with one over the columns
    and b. Where it ends depends on where it starts: there are local optima.

    An atom that no datum uses could stay so for ever. It is pointed at what the dictionary leaves
    of the datum that it explains worst, which then uses it, unless what is left is shorter than t
    (then no atom at all would be used for it). Nothing is lost by that, since its codes are zero.

    Args:
        autoencoder: where to start; its decoder is set in place. A guide with a free code for
            each row of x (``PerDatumGuide(N, K, covariance="delta")``) gets the codes; an
            encoder stays as it is, to be trained by ``fit_svi``.
        x: complete data, (N, D).
        tol: stop when the objective still to be gained, extrapolated from the last three
            iterations, falls below this many nats per datum.
        max_iterations: stop at the latest after so many.

    Returns:
        ``objective`` is mean log p(x_n, z_n) in nats per datum: at the start's dictionary after
        the first sweeps, then after the columns and after the codes of each iteration, (1 + 2 T,).

    Raises:
        ValueError: another decoder, prior or likelihood; x with missing values; a guide with codes
            for another number of rows; numbers that are not positive.

    References:
        Mairal, Bach, Ponce, Sapiro: Online learning for matrix factorization and sparse coding
        (2010), of the columns; Friedman, Hastie, Hoefling, Tibshirani: Pathwise coordinate
        optimization (2007), of the codes.
    """
    began = time.perf_counter()
    check_int("max_iterations", max_iterations)
    if not tol > 0:
        raise ValueError(f"tol must be positive, in nats per datum; got {tol}")
    if why := why_no_lasso(autoencoder):
        raise ValueError(why)
    layer: NormalizedColumns = linear_layer(autoencoder)
    x, holes = as_data_and_mask(x, model=autoencoder.model)
    if holes is not None:
        raise ValueError(
            f"x has {int((~holes).sum())} missing entries: over columns of length one there is no "
            "closed form then; fill them, or use fit_svi, whose model takes missing values"
        )
    table = _code_table(autoencoder, len(x))
    position, trace = _Position(autoencoder, layer, x.double()), EMHistory(began)
    stopped = position.climb(trace, tol, max_iterations)
    layer.free.copy_(position.columns)
    layer.bias.copy_(position.bias)
    if table is not None:
        table.copy_(position.codes.T)
    notes = (NO_BOUND, *(() if table is not None else (UNTRAINED,)), *position.notes())
    return replace(trace.result("dictionary learning", stopped, notes), log_likelihood=None)


def _code_table(autoencoder: Autoencoder, num_rows: int) -> Tensor | None:
    guide = autoencoder.guide
    if not isinstance(guide, PerDatumGuide) or guide.covariance != "delta":
        return None
    if guide.num_data != num_rows:
        raise ValueError(
            f"the guide has a code for each of {guide.num_data} rows, x has {num_rows}; make one "
            "for these data: PerDatumGuide(len(x), latent_dim, covariance='delta')"
        )
    return guide.loc


class _Position:
    """Codes (K, N), columns (D, K) and bias (D,), all float64, and what they give."""

    def __init__(
        self, autoencoder: Autoencoder, layer: NormalizedColumns, x: Float[Tensor, "N D"]
    ) -> None:
        likelihood: Any = autoencoder.likelihood
        self.x, self.likelihood, self.prior = x, likelihood, autoencoder.prior()
        self.columns = layer.weight.detach().to(x, copy=True)
        self.bias = layer.bias.detach().to(x, copy=True)
        self.codes = x.new_zeros(self.columns.shape[1], len(x))
        self.threshold = autoencoder.penalty * likelihood.scale**2
        self.renewed = 0

    def climb(self, trace: EMHistory, tol: float, max_iterations: int) -> str:
        """Steps in turn, from the first codes until one of the reasons to stop, which it tells."""
        stopped = ""
        self.improve_codes(SWEEPS)
        value = self.note(trace)
        while not stopped:
            self.improve_columns()
            self.note(trace)
            self.improve_codes(SWEEPS)
            value = self.note(trace)
            rounding = SLACK * torch.finfo(torch.float64).eps * (1 + abs(value))
            stopped = trace.why_stop(tol, max_iterations, rounding)
        self.improve_codes(LAST_SWEEPS, SETTLED * float(1 + self.codes.abs().max()))
        trace.bounds[-1] = float(self.log_joint())  # of the codes that are handed over
        return stopped

    def note(self, trace: EMHistory) -> float:
        """Take down the objective."""
        value = self.log_joint()
        trace.add(value, value)
        return float(value)

    def log_joint(self) -> Float[Tensor, ""]:
        """Mean log p(x_n, z_n)."""
        z = self.codes.T
        given = self.likelihood(z @ self.columns.T + self.bias)
        return (given.log_prob(self.x) + self.prior.log_prob(z)).mean()

    def improve_codes(self, most: int, tolerance: float = 0.0) -> None:
        """Sweeps over k: the best z_nk for all n at once."""
        Lasso(self.columns, self.bias, self.x, self.threshold).solve(self.codes, tolerance, most)

    def improve_columns(self) -> None:
        """A sweep over the columns: each the best given all else; then the bias."""
        second, cross, total = (
            self.codes @ self.codes.T,
            self.x.T @ self.codes.T,
            self.codes.sum(1),
        )
        used = second.diagonal() > 0
        for k in used.nonzero().flatten().tolist():
            others = self.columns @ second[k] - self.columns[:, k] * second[k, k]
            best = cross[:, k] - self.bias * total[k] - others
            length = best.norm()
            if length > 0:
                self.columns[:, k] = best / length
        self.bias = (self.x.sum(0) - self.columns @ total) / len(self.x)
        if not bool(used.all()):
            self._renew((~used).nonzero().flatten())

    def _renew(self, unused: Tensor) -> None:
        left = self.x - self.bias - self.codes.T @ self.columns.T
        lengths, rows = left.norm(dim=1).topk(min(len(unused), len(left)))
        longer = lengths > self.threshold
        rows, lengths, unused = rows[longer], lengths[longer], unused[: len(rows)][longer]
        self.columns[:, unused] = (left[rows] / lengths[:, None]).T
        self.renewed += len(unused)

    def notes(self) -> tuple[str, ...]:
        """How many atoms are not used, and how often one was pointed elsewhere."""
        unused, number = int((self.codes == 0).all(1).sum()), len(self.codes)
        found = []
        if unused:
            found.append(f"{unused} of {number} atoms are used by no datum")
        if self.renewed:
            found.append(
                f"{self.renewed} times an atom that no datum used was pointed at what was left of "
                "the datum that was explained worst"
            )
        return tuple(found)
