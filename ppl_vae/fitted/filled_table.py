"""A table with its missing values filled by PPCA that is selected on masked entries."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.imputed import Imputation
from ppl_vae.core.stage_callback import StageCallback, ignore_stages
from ppl_vae.core.text import counted
from ppl_vae.data.files.file_content import quoted
from ppl_vae.data.files.tables import Table
from ppl_vae.data.files.text_columns import option
from ppl_vae.data.sources.row_blocks import RowBlocks
from ppl_vae.data.units import Scaling, choose_scaling
from ppl_vae.evaluation.evidence.laplace import number_of_parameters
from ppl_vae.evaluation.prediction.imputation import impute
from ppl_vae.evaluation.prediction.masked_cv import (
    MAX_SELECTION_ROWS,
    MaskedCV,
    select_by_masked_cv,
)
from ppl_vae.evaluation.prediction.multiple_imputation import (
    CELLS_PER_PARAMETER,
    parameters_matter,
)
from ppl_vae.fitted.fit import named_notes
from ppl_vae.inference.em.fit import fit_em
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.inference.mcmc.sampling import sample_posterior
from ppl_vae.models.bayesian_ppca import BayesianPPCA
from ppl_vae.models.linear.identifiability import describe_undetermined
from ppl_vae.models.linear.sufficient_statistics import summarize_table
from ppl_vae.models.ppca import NOISES, PPCA

NUM_SAMPLES, NUM_CHAINS = 500, 4
"""Draws of each Markov chain of the parameters, after as many for warm-up; chains."""
DIGITS, ALL_DIGITS = 6, 17
"""Digits to which numbers are rounded, and those that every double-precision number has."""


@dataclass(frozen=True)
class FilledTable:
    """A table with the conditional distribution of its missing values.

    Attributes:
        table: the table, with missing values.
        ppca: the model, PPCA or factor analysis, in the units of the fit.
        fit: the fit of the model; its objective is in these units, too.
        imputation: conditional means and standard deviations.
        search: the selection of the model by cross-validation; None if the user chose it.
        posterior: draws of the parameters, over which the imputation is averaged; None if it takes
            the fitted parameters as known.
        reason: why the parameters' uncertainty is included or left out, for people.
        scaling: the units of the fit, those of the table unless columns are standardised.
    """

    table: Table
    ppca: PPCA
    fit: FitResult
    imputation: Imputation
    search: MaskedCV | None
    posterior: PosteriorSamples | None
    reason: str
    scaling: Scaling

    @classmethod
    def of(
        cls,
        table: Table,
        latent_dim: int | None = None,
        noise: str | None = None,
        *,
        seed: int = 0,
        starts: int = 1,
        scale: str = "auto",
        parameter_uncertainty: bool | None = None,
        on_stage: StageCallback = ignore_stages,
    ) -> Self:
        """Fit the model to the observed entries, and impute the missing ones.

        Args:
            table: with missing values.
            latent_dim, noise: the latent dimension and the noise of the model; None is selected by
                cross-validation on masked entries.
            seed: the seed of the selection and of the initial values.
            starts: the number of starts of EM, of which the best is kept.
            scale: ``"auto"``, ``"none"`` or ``"standardize"``, see
                :func:`~ppl_vae.data.units.choose_scaling`.
            parameter_uncertainty: whether the imputation is averaged over draws of the
                parameters' posterior; None decides by
                :func:`~ppl_vae.evaluation.prediction.multiple_imputation.parameters_matter`.
            on_stage: a callback that receives what is done next.

        Raises:
            ValueError: as :func:`~ppl_vae.inference.em.fit.fit_em`; if ``parameter_uncertainty``
                is True, as :func:`~ppl_vae.inference.mcmc.sampling.sample_posterior`.
        """
        table.check_several_columns()
        given = torch.from_numpy(table.values)
        scaling = _choose_scaling(table, given, scale)
        x = scaling.units.apply(given) if scaling.units.per_column else given
        search = None
        if latent_dim is None or noise is None:
            sizes = None if latent_dim is None else [latent_dim]
            noises = NOISES if noise is None else [noise]
            rows = min(len(x), MAX_SELECTION_ROWS)
            on_stage(f"selecting the model on masked entries of {counted(rows, 'row')}")
            search = select_by_masked_cv(
                x, noises=noises, latent_dims=sizes, max_rows=rows, seed=seed
            )
            latent_dim, noise = search.latent_dim[search.best], search.noise[search.best]
        on_stage(f"fitting with {noise} noise and K = {latent_dim}")
        ppca = PPCA.like(x, latent_dim, noise=noise, seed=seed).double()
        fit = fit_em(ppca, x, starts=starts)
        on_stage("imputing")
        posterior, reason = _posterior(x, ppca, parameter_uncertainty, seed)
        if posterior is None:
            filled = ppca.impute(x)
        else:
            filled = impute(posterior.model, None, x, posterior=posterior, seed=seed)
        if scaling.units.per_column:
            filled = scaling.units.undo_imputation(filled, given)
        return cls(table, ppca, fit, filled, search, posterior, reason, scaling)

    def sentences(self) -> Iterator[str]:
        """The fit, and the number and the precision of the imputed values."""
        missing = np.isnan(self.table.values)
        name = "PPCA" if self.ppca.noise == "isotropic" else "factor analysis"
        fit = f"{self.fit.algorithm}, {self.fit.steps} iterations, {self.fit.stopped}"
        yield f"{name} with K = {self.ppca.latent_dim}: {fit}"
        if not missing.any():
            yield "no values are missing: the table is written unchanged"
            return
        values, columns = int(missing.sum()), int(missing.any(0).sum())
        summary = f"imputed {counted(values, 'value')} in {counted(columns, 'column')}"
        ratios = self._relative_sds(missing)
        if len(ratios):
            low, median, high = np.quantile(ratios, [0, 0.5, 1])
            summary += (
                f"; their standard deviations are {low:.2f} to {high:.2f} of the column's, with "
                f"median {median:.2f}"
            )
        yield summary
        yield self.reason
        yield " ".join(self.imputation.uncertainty())
        yield from self._unknown(
            np.isnan(self.imputation.sd.numpy(force=True)).sum(axis=0).tolist()
        )

    def _relative_sds(self, missing: np.ndarray) -> np.ndarray:
        """Known standard deviations of imputed values, relative to those of their columns."""
        column_sd = np.nanstd(self.table.values, axis=0)
        columns = missing.any(0) & (column_sd > 0)
        ratios = (self.imputation.sd.numpy(force=True) / np.where(column_sd > 0, column_sd, 1))[
            :, columns
        ]
        ratios = ratios[missing[:, columns]]
        return ratios[~np.isnan(ratios)]

    def _unknown(self, counts: list[int]) -> Iterator[str]:
        # The number of imputed values with unknown standard deviation, by column.
        named = zip(self.table.columns, counts, strict=True)
        columns = ", ".join(f"{name!r} ({number})" for name, number in named if number)
        if columns:
            yield (
                f"the standard deviation of {sum(counts)} imputed values is unknown and left "
                f"empty, and their mean is arbitrary: in columns {columns}"
            )

    def notes(self) -> tuple[str, ...]:
        """Notes on the units and on the fit, with the names of columns, and on the posterior."""
        units = (self.scaling.note,) if self.scaling.note else ()
        return (*units, *self._fit_notes(), *self._posterior_notes())

    def _posterior_notes(self) -> tuple[str, ...]:
        if self.posterior is None:
            return ()
        unreliable = self.posterior.verdict.startswith("NOT")
        verdict = (f"draws of the parameters: {self.posterior.verdict}",) if unreliable else ()
        return (*verdict, *self.posterior.notes)

    def _fit_notes(self) -> tuple[str, ...]:
        pairs, latent_dim = self.ppca.undetermined, self.ppca.latent_dim
        if self.posterior is not None:  # the priors determine what the data do not
            pairs = None
        numbered = describe_undetermined(pairs, latent_dim)
        others = tuple(note for note in self.fit.notes if note not in numbered)
        others = named_notes(others, self.table.columns)
        return others + describe_undetermined(pairs, latent_dim, self.table.columns)


def _choose_scaling(table: Table, x: Float[Tensor, "N D"], scale: str) -> Scaling:
    columns, _ = summarize_table(RowBlocks(x))
    empty = [table.columns[k] for k in (columns.count == 0).nonzero().flatten().tolist()]
    if empty:
        raise ValueError(
            f"{table.name} has nothing observed in the columns {quoted(empty)}; leave them out in "
            f"addition to others ({option('drop', empty)})"
        )
    return choose_scaling(x, columns, scale, image_shape=table.image_shape)


def _posterior(
    x: Float[Tensor, "N D"], ppca: PPCA, wanted: bool | None, seed: int
) -> tuple[PosteriorSamples | None, str]:
    # Draws of the parameters where their uncertainty is wanted or matters, and the reason.
    number = number_of_parameters(ppca.data_dim, ppca.latent_dim, ppca.noise)
    observed = int((~x.isnan()).sum())
    counts = f"{observed} observed values for {number} parameters"
    if observed == x.numel():
        return None, ""
    if wanted is False:
        return None, "the uncertainty of the parameters is left out, as requested"
    if wanted is None and ppca.undetermined is not None:
        return None, (
            "the uncertainty of the parameters is left out: the data do not determine some "
            "covariances, whose posterior would be the prior (--parameter-uncertainty includes it)"
        )
    if wanted is None and not parameters_matter(observed, number):
        return None, (
            f"the uncertainty of the parameters is left out: {counts}, at least "
            f"{CELLS_PER_PARAMETER} each (--parameter-uncertainty includes it)"
        )
    try:
        model = BayesianPPCA.like(x, ppca.latent_dim, noise=ppca.noise)
        samples = sample_posterior(
            model,
            x,
            num_samples=NUM_SAMPLES,
            warmup=NUM_SAMPLES,
            chains=NUM_CHAINS,
            seed=seed,
        )
    except ValueError as error:
        if wanted:
            raise
        return None, f"the uncertainty of the parameters is left out, since {error}"
    why = "as requested" if wanted else f"fewer than {CELLS_PER_PARAMETER} each"
    return samples, (
        f"averaged over the posterior of the parameters by Gibbs sampling: {counts}, {why} "
        "(--no-parameter-uncertainty takes fitted parameters as known)"
    )


def filled_frame(table: Table, imputation: Imputation) -> pd.DataFrame:
    """A table with its missing values filled: columns, labels, and ``<column> sd``.

    A standard deviation is missing where the value was observed, and where it is unknown because
    it depends on a covariance that the observed entries do not determine. Standard deviations are
    rounded to six digits, and imputed values to the last of these digits or to six of their own,
    whichever are more. The index has the row names, if there are any.

    Args:
        table: with missing values.
        imputation: the imputation of its values.
    """
    missing = np.isnan(table.values)
    mean, sd = imputation.mean.numpy(force=True), imputation.sd.numpy(force=True)
    found: dict[str, Any] = {}
    for k, name in enumerate(table.columns):
        found[name] = _with_rounded(mean[:, k], mean[:, k], sd[:, k], missing[:, k])
    if table.labels is not None:
        found[_unused(table.label or "label", found)] = list(table.labels)
    for k in np.flatnonzero(missing.any(axis=0)):
        name = _unused(f"{table.columns[k]} sd", found)
        found[name] = _with_rounded(np.full(len(sd), np.nan), sd[:, k], sd[:, k], missing[:, k])
    return pd.DataFrame(found, index=table.row_index)


def _with_rounded(
    values: np.ndarray, others: np.ndarray, sd: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    # The values, with others in some rows, rounded to digits that depend on sd.
    found = values.copy()
    found[rows] = list(map(_rounded, others[rows], sd[rows]))
    return found


def _rounded(value: float, sd: float) -> float:
    digits = DIGITS
    if not sd > 0:
        digits = ALL_DIGITS  # sd is zero or unknown, and no rounding is known to be small
    elif abs(value) > sd:
        digits += math.ceil(math.log10(abs(value)) - math.log10(sd))
    return float(f"{value:.{min(digits, ALL_DIGITS)}g}")


def _unused(name: str, taken: dict[str, Any]) -> str:
    while name in taken:
        name += "_"
    return name
