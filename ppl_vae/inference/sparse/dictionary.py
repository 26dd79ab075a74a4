"""Dictionary learning by alternating updates of codes and columns, each in closed form."""

import time
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.arrays.inputs import as_data_and_mask, learn_schema
from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.text import counted
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.guides.guides import PerDatumGuide
from ppl_vae.inference.em.history import EMHistory
from ppl_vae.inference.sparse.lasso import Lasso, lasso_mismatch, linear_layer
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.networks.sparse_layers import NormalizedColumns

CODE_SWEEPS = 3
"""Sweeps over the codes per sweep over the columns; more gain more per iteration, less per
second."""
FINAL_SWEEPS, FINAL_TOLERANCE = 1000, 1e-8
"""The final codes are swept until none would change by more than this share of the largest one."""
NOT_A_BOUND = "the objective is log p(x, z), which is no bound on log p(x)"
GUIDE_UNCHANGED = "the guide is unchanged: fit_svi trains an encoder, best_codes needs none"
ROUNDING = 8.0
"""The rounding error of the objective, in units of float64's resolution."""


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
    max(|a| - t, 0) and r_n = x_n - W z_n - b, each of these updates is optimal given all others:

        z_nk = S_t(w_k'r_n + z_nk),  t = lambda sigma^2
        w_k  = u / |u|,  u = sum_n z_nk (r_n + w_k z_nk)
        b    = mean_n (x_n - W z_n)

    so that the mean of log p(x_n, z_n) never decreases. Sweeps over the codes alternate with one
    over the columns and b. The result depends on the start: there are local optima.

    An atom that no datum uses would never be updated. It is reset to the direction of the largest
    residual among the data, whose datum then uses it, unless that residual is shorter than t (then
    no atom at all would be used for it). This does not change the objective, since the atom's
    codes are zero.

    Args:
        autoencoder: the initial model; its decoder is set in place. If the guide has a free code
            for each row of x (``PerDatumGuide(N, K, covariance="delta")``), the codes are stored
            there; an encoder is left unchanged, to be trained by ``fit_svi``.
        x: complete data, (N, D).
        tol: stop when the objective still to be gained, extrapolated from the last three
            iterations, falls below this many nats per datum.
        max_iterations: the largest number of iterations.

    Returns:
        ``objective`` is mean log p(x_n, z_n) in nats per datum: with the initial dictionary after
        the first sweeps, then after the columns and after the codes of each iteration, (1 + 2 T,).

    Raises:
        ValueError: if decoder, prior or likelihood are not those of dictionary learning; if x has
            missing values; if the guide has codes for another number of rows; if ``tol`` or
            ``max_iterations`` is not positive.

    References:
        Mairal, Bach, Ponce, Sapiro: Online learning for matrix factorization and sparse coding
        (2010), of the columns; Friedman, Hastie, Hoefling, Tibshirani: Pathwise coordinate
        optimization (2007), of the codes.
    """
    start_time = time.perf_counter()
    check_int("max_iterations", max_iterations)
    if not tol > 0:
        raise ValueError(f"tol must be positive, in nats per datum; got {tol}")
    if mismatch := lasso_mismatch(autoencoder):
        raise ValueError(mismatch)
    layer: NormalizedColumns = linear_layer(autoencoder)
    schema = TableSchema.of(x)
    x, mask = as_data_and_mask(x, model=autoencoder.model)
    if mask is not None:
        raise ValueError(
            f"x has {int((~mask).sum())} missing entries: with them, columns of length one have "
            "no closed form; impute them, or use fit_svi, whose model takes missing values"
        )
    code_table = _code_embedding(autoencoder, len(x))
    learning, history = _DictionaryLearning(autoencoder, layer, x.double()), EMHistory(start_time)
    stopped = learning.run(history, tol, max_iterations)
    layer.free.copy_(learning.columns)
    layer.bias.copy_(learning.bias)
    learn_schema(autoencoder, schema)
    notes = (NOT_A_BOUND, *learning.notes())
    if code_table is None:
        notes = (NOT_A_BOUND, GUIDE_UNCHANGED, *learning.notes())
    else:
        code_table.copy_(learning.codes.T)
    return replace(history.result("dictionary learning", stopped, notes), log_likelihood=None)


def _code_embedding(autoencoder: Autoencoder, num_rows: int) -> Tensor | None:
    guide = autoencoder.guide
    if not isinstance(guide, PerDatumGuide) or guide.covariance != "delta":
        return None
    if guide.num_data != num_rows:
        raise ValueError(
            f"the guide has a code for each of {guide.num_data} rows, x has {num_rows}; make one "
            "for these data: PerDatumGuide(len(x), latent_dim, covariance='delta')"
        )
    return guide.loc


class _DictionaryLearning:
    """The alternating updates, in float64.

    Attributes:
        codes: z, (K, N).
        columns: W, (D, K).
        bias: b, (D,).
        num_resets: how often an unused atom was reset.
    """

    def __init__(
        self, autoencoder: Autoencoder, layer: NormalizedColumns, x: Float[Tensor, "N D"]
    ) -> None:
        likelihood: Any = autoencoder.likelihood
        self.x, self.likelihood, self.prior = x, likelihood, autoencoder.prior()
        self.columns = layer.weight.detach().to(x, copy=True)
        self.bias = layer.bias.detach().to(x, copy=True)
        self.codes = x.new_zeros(self.columns.shape[1], len(x))
        self.threshold = autoencoder.penalty * likelihood.scale**2
        self.num_resets = 0

    def run(self, history: EMHistory, tol: float, max_iterations: int) -> str:
        """Alternate the updates, first of the codes; returns the reason to stop."""
        stopped = ""
        self.update_codes(CODE_SWEEPS)
        self._append_to(history)
        while not stopped:
            self.update_columns()
            self._append_to(history)
            self.update_codes(CODE_SWEEPS)
            self._append_to(history)
            eps = torch.finfo(torch.float64).eps
            rounding = ROUNDING * eps * (1 + abs(history.bounds[-1]))
            stopped = history.stop_reason(tol, max_iterations, rounding)
        self.update_codes(FINAL_SWEEPS, FINAL_TOLERANCE * float(1 + self.codes.abs().max()))
        history.bounds[-1] = float(self.log_joint())  # that of the final codes
        return stopped

    def _append_to(self, history: EMHistory) -> None:
        value = self.log_joint()
        history.add(value, value)

    def log_joint(self) -> Float[Tensor, ""]:
        """Mean log p(x_n, z_n)."""
        z = self.codes.T
        conditional = self.likelihood(z @ self.columns.T + self.bias)
        return (conditional.log_prob(self.x) + self.prior.log_prob(z)).mean()

    def update_codes(self, max_sweeps: int, tolerance: float = 0.0) -> None:
        """Sweep over k: the optimal z_nk for all n at once."""
        lasso = Lasso(self.columns, self.bias, self.x, self.threshold)
        lasso.solve(self.codes, tolerance, max_sweeps)

    def update_columns(self) -> None:
        """Sweep once over the columns, each optimal given all else; then update the bias."""
        second_moment, cross = self.codes @ self.codes.T, self.x.T @ self.codes.T
        total = self.codes.sum(1)
        used = second_moment.diagonal() > 0
        for k in used.nonzero().flatten().tolist():
            own = self.columns[:, k] * second_moment[k, k]
            others = self.columns @ second_moment[k] - own
            column = cross[:, k] - self.bias * total[k] - others
            length = column.norm()
            if length > 0:
                self.columns[:, k] = column / length
        self.bias = (self.x.sum(0) - self.columns @ total) / len(self.x)
        if not bool(used.all()):
            self._reset_unused((~used).nonzero().flatten())

    def _reset_unused(self, unused: Tensor) -> None:
        residuals = self.x - self.bias - self.codes.T @ self.columns.T
        lengths, rows = residuals.norm(dim=1).topk(min(len(unused), len(residuals)))
        longer = lengths > self.threshold
        rows, lengths, unused = rows[longer], lengths[longer], unused[: len(rows)][longer]
        self.columns[:, unused] = (residuals[rows] / lengths[:, None]).T
        self.num_resets += len(unused)

    def notes(self) -> tuple[str, ...]:
        """The numbers of unused atoms and of resets, if there are any."""
        num_unused, num_atoms = int((self.codes == 0).all(1).sum()), len(self.codes)
        notes = []
        if num_unused:
            notes.append(f"unused atoms: {num_unused} of {num_atoms}")
        if self.num_resets:
            notes.append(
                "an unused atom was reset to the largest residual "
                f"{counted(self.num_resets, 'time')}"
            )
        return tuple(notes)
