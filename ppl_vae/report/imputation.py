"""A table with its missing values filled: which model, how sure, and the file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from ppl_vae.core.files import write_whole
from ppl_vae.core.results import CONDITIONAL, COVERAGE, FitResult, Imputation
from ppl_vae.data.tables import Table
from ppl_vae.evaluation.prediction.masked_cv import MaskedCV, select_by_masked_cv
from ppl_vae.inference.em.fit import fit_em
from ppl_vae.models.identifiability import describe_undetermined
from ppl_vae.models.ppca import NOISES, PPCA

SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class FilledTable:
    """A table and what its missing values hold, given their rows.

    Attributes:
        table: as it was read.
        ppca: the model, PPCA or factor analysis.
        fit: how it was fitted.
        imputation: means and standard deviations.
        search: how the model was chosen; None if nothing was left to choose.
    """

    table: Table
    ppca: PPCA
    fit: FitResult
    imputation: Imputation
    search: MaskedCV | None

    @classmethod
    def of(
        cls,
        table: Table,
        latent_dim: int | None = None,
        noise: str | None = None,
        *,
        seed: int = 0,
    ) -> Self:
        """Fit to what was observed, and fill the rest.

        Args:
            table: with missing values.
            latent_dim, noise: of the model; what is None is chosen on hidden cells.
            seed: of the choice and of the start.

        Raises:
            ValueError: as :func:`~ppl_vae.inference.em.fit.fit_em`.
        """
        search = None
        if latent_dim is None or noise is None:
            sizes = None if latent_dim is None else [latent_dim]
            noises = NOISES if noise is None else [noise]
            search = select_by_masked_cv(table.values, noises=noises, latent_dims=sizes, seed=seed)
            latent_dim, noise = search.latent_dim[search.best], search.noise[search.best]
        ppca = PPCA.like(table.values, latent_dim, noise=noise, seed=seed).double()
        fit = fit_em(ppca, table.values)
        return cls(table, ppca, fit, ppca.impute(table.values), search)

    def frame(self) -> pd.DataFrame:
        """The table as text: row names, columns, labels, and ``<column> sd`` of filled ones.

        Observed cells are written with all their digits, filled ones with six. A standard
        deviation is empty where the cell was observed, and where it is not known because the
        observed cells do not determine a covariance it rests on.
        """
        holes = np.isnan(self.table.values)
        mean, sd = self.imputation.mean.numpy(), self.imputation.sd.numpy()
        found: dict[str, list[str]] = {}
        for k, name in enumerate(self.table.columns):
            cells = zip(mean[:, k], holes[:, k], strict=True)
            found[name] = [f"{v:.6g}" if hole else _exact(v) for v, hole in cells]
        if self.table.labels is not None:
            found[_free(self.table.label or "label", found)] = list(map(str, self.table.labels))
        for k in np.flatnonzero(holes.any(axis=0)):
            cells = zip(sd[:, k], holes[:, k], strict=True)
            name = _free(f"{self.table.columns[k]} sd", found)
            known = ((v, hole and not np.isnan(v)) for v, hole in cells)
            found[name] = [f"{v:.6g}" if written else "" for v, written in known]
        return pd.DataFrame(found, index=self.table.row_names)

    def write(self, path: Path) -> None:
        """Write the table, by its suffix with commas or tabs.

        Raises:
            ValueError: if the suffix is another.
        """
        separator = SEPARATORS[check_suffix(path).suffix.lower()]
        named = self.table.row_names is not None
        text = self.frame().to_csv(sep=separator, index=named)
        write_whole(path, text.encode())

    def sentences(self) -> Iterator[str]:
        """What was done."""
        holes = np.isnan(self.table.values)
        name = "PPCA" if self.ppca.noise == "isotropic" else "factor analysis"
        how = f"{self.fit.algorithm}, {self.fit.steps} iterations, {self.fit.stopped}"
        yield f"{name} with K = {self.ppca.latent_dim}: {how}"
        if not holes.any():
            yield "nothing is missing: the table is written as it is"
            return
        usual = np.nanstd(self.table.values, axis=0)
        columns = holes.any(0) & (usual > 0)
        shares = (self.imputation.sd.numpy() / np.where(usual > 0, usual, 1))[:, columns]
        shares = shares[holes[:, columns]]
        shares = shares[~np.isnan(shares)]
        number, wide = int(holes.sum()), int(holes.any(0).sum())
        said = f"filled {number} cells in {wide} columns"
        if len(shares):
            low, middle, high = np.quantile(shares, [0, 0.5, 1])
            said += (
                f"; their standard deviations are {low:.2f} to {high:.2f} of the column's, "
                f"{middle:.2f} in the middle"
            )
        yield said
        yield f"{CONDITIONAL} ({COVERAGE})"
        yield from self._unknown(np.isnan(self.imputation.sd.numpy()).sum(axis=0).tolist())

    def _unknown(self, cells: list[int]) -> Iterator[str]:
        # Of how many cells the standard deviation is not known, column by column.
        named = zip(self.table.columns, cells, strict=True)
        columns = ", ".join(f"{name!r} ({number})" for name, number in named if number)
        if columns:
            yield (
                f"of {sum(cells)} filled cells the standard deviation is not known and left "
                f"empty, and the mean is arbitrary: in columns {columns}"
            )

    def notes(self) -> tuple[str, ...]:
        """What else a person should know of the fit, with the names of columns."""
        pairs, latent_dim = self.ppca.undetermined, self.ppca.latent_dim
        numbered = describe_undetermined(pairs, latent_dim)
        others = tuple(note for note in self.fit.notes if note not in numbered)
        return others + describe_undetermined(pairs, latent_dim, self.table.columns)


def check_suffix(path: Path) -> Path:
    """The path itself.

    Raises:
        ValueError: if it does not say how a table is to be written.
    """
    if path.suffix.lower() not in SEPARATORS:
        raise ValueError(f"--out must end in {' or '.join(SEPARATORS)}; got {path}")
    return path


def _exact(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _free(name: str, taken: dict[str, list[str]]) -> str:
    while name in taken:
        name += "_"
    return name
