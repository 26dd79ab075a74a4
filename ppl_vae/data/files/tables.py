"""Reading tables from files; unspecified details of the format are detected, and noted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ppl_vae.core.text import counted
from ppl_vae.core.validation import check_int
from ppl_vae.data.files.array_files import npy_table, npz_table
from ppl_vae.data.files.column_roles import ColumnRoles
from ppl_vae.data.files.column_selection import find_column, select_columns
from ppl_vae.data.files.file_content import COMPRESSED, check_file, read_content
from ppl_vae.data.files.number_format import ALWAYS_MISSING
from ppl_vae.data.files.raw_table import RawTable
from ppl_vae.data.files.regular_texts import regular_table
from ppl_vae.data.files.summary_rows import summary_note
from ppl_vae.data.files.text_columns import NA_MARKERS
from ppl_vae.data.files.text_encoding import decode_text
from ppl_vae.data.files.text_tables import TextFormat, TextTable
from ppl_vae.data.files.typed_tables import feather_table, h5ad_table, parquet_table
from ppl_vae.data.files.workbooks import workbook_text
from ppl_vae.data.handwritten_digits import labelled_digits

TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".dat", ".data")
ARRAY_SUFFIXES = (".npy", ".npz")
TYPED_SUFFIXES = (".parquet", ".feather", ".arrow", ".h5ad")
WORKBOOK_SUFFIXES = (".xlsx", ".xlsm")
SUFFIXES = (*TEXT_SUFFIXES, *ARRAY_SUFFIXES, *TYPED_SUFFIXES, *WORKBOOK_SUFFIXES)
OTHER_SPREADSHEETS = (".xls", ".ods", ".numbers")
OTHER_KINDS = (".pkl", ".rds", ".rda", ".mat", ".sav", ".dta", ".sas7bdat", ".json", ".jsonl")
CONVERSION_ADVICE: dict[str, str] = {
    **{end: "is a spreadsheet of another kind; save it as .xlsx" for end in OTHER_SPREADSHEETS},
    **{end: "is of a kind that is not read; save it as CSV or Parquet" for end in OTHER_KINDS},
}
"""How to convert a file of an unsupported kind, by its suffix."""
MAX_BYTES = 2**30
"""The largest size of a file's content, decompressed, that is read by default."""


@dataclass(frozen=True)
class Table:
    """A numeric table with its row names, column names and labels.

    Attributes:
        name: name of the file; messages refer to it.
        values: (N, D), one row per datum; NaN marks a missing value.
        columns: D names; where the file has none, x<k> for the k-th column of the file.
        row_names: one per row, if the file has them.
        labels: one per row, text or numbers, if there is a label column.
        label: name of the label column.
        image_shape: height and width, for rows that are images.
        notes: what was detected rather than given, for the user to check.
        has_names: whether the columns have names of their own, and are not only numbered.
        index: name of the column of row names, if it has one.
    """

    name: str
    values: Float[np.ndarray, "N D"]
    columns: tuple[str, ...]
    row_names: tuple[str, ...] | None = None
    labels: tuple[Any, ...] | None = None
    label: str | None = None
    image_shape: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    has_names: bool = True
    index: str | None = None

    @property
    def num_missing(self) -> int:
        """The number of missing values."""
        return int(np.isnan(self.values).sum())

    @property
    def description(self) -> str:
        """The name, the size and the number of missing values."""
        num_rows, width = self.values.shape
        missing = ""
        if self.num_missing:
            missing = f", {self.num_missing} of {num_rows * width} values missing"
        size = f"{counted(num_rows, 'row')}, {counted(width, 'column')}"
        return f"{self.name}: {size}{missing}"

    @property
    def row_index(self) -> pd.Index | None:
        """The row names under the name of their column; None if there are none."""
        if self.row_names is None:
            return None
        return pd.Index(self.row_names, dtype=object, name=self.index)

    def check_several_columns(self) -> None:
        """Check that there are two columns or more, which a linear latent variable model needs.

        Raises:
            ValueError: if there is one.
        """
        if len(self.columns) == 1:
            raise ValueError(
                f"{self.name} has one column, {self.columns[0]!r}, and factors describe how two "
                "or more vary together; if the file has more columns, give its delimiter (on the "
                "command line --delimiter); the density of one column can be fitted by --model "
                "vae --latent-dim 1"
            )

    def to_frame(self) -> pd.DataFrame:
        """The values under the names of their columns, with the labels as the last column.

        The index has the row names, if the file has them, and the name of their column.
        """
        frame = pd.DataFrame(self.values, columns=list(self.columns), index=self.row_index)
        if self.labels is not None:
            frame.insert(len(self.columns), self.label or "label", list(self.labels), True)
        return frame

    def constant_columns(self) -> tuple[str, ...]:
        """Names of the columns whose observed entries are all equal."""
        missing = np.isnan(self.values)
        first = self.values[missing.argmin(0), np.arange(len(self.columns))]
        constant = ((self.values == first) | missing).all(0) & ~missing.all(0)
        return tuple(name for name, yes in zip(self.columns, constant, strict=True) if yes)


def digits_table() -> Table:
    """scikit-learn's handwritten digits, each pixel in 0..1 (sixteenths), labelled 0..9."""
    pixels, digit = labelled_digits()
    names = tuple(f"r{i}c{j}" for i in range(8) for j in range(8))
    return Table("digits / 16", pixels, names, None, tuple(digit.tolist()), "digit", (8, 8))


def read_table(
    path: str | Path,
    *,
    header: bool | None = None,
    delimiter: str | None = None,
    label: str | None = None,
    missing: Sequence[str] | None = None,
    image_shape: tuple[int, int] | None = None,
    encoding: str | None = None,
    decimal: str | None = None,
    thousands: str | None = None,
    skip_rows: int = 0,
    comment: str | None = None,
    columns: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    index: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Table:
    """Read a table from a file.

    Text is read from ``.csv .tsv .txt .dat .data`` (also compressed: ``.gz .bz2 .xz .zip``), typed
    columns from ``.parquet`` and ``.feather``, arrays from ``.npy`` and ``.npz``, the first sheet
    of a workbook from ``.xlsx`` (extra ``excel``), and annotated data from ``.h5ad`` (extra
    ``h5ad``). What is not given is detected, and noted where the detection is a guess:

    * The delimiter is detected by clevercsv; a first line ``sep=;`` states it.
    * The first line is a header if it has words over numbers, an empty cell or a word such as
      country over row names, one name fewer than there are columns (R), years or evenly spaced
      numbers over other numbers, or 0, 1, 2, ... (pandas). Names may also stand in the last
      ``#`` line above the table. A second line of units is left out.
    * Titles above the table, comments and footers are left out, as are rows and columns without
      any value; the notes have the numbers of the lines.
    * The first column holds row names if it is text and has no name or distinct values, or if it
      has no name and distinct whole numbers.
    * Labels are the only other text column, if its values repeat, or a column of at most fifty
      whole numbers whose name is class, label, target or the like.
    * Commas are decimal commas, and points separators of thousands, if some cells can only be
      read so and no cell contradicts. Spaces, apostrophes and ``_`` between groups of three
      digits, a true minus sign and the exponent of ``1.5D+00`` are read too; TRUE and FALSE are
      read as 1 and 0.

    Columns that are like identifiers or times, and values such as -999 that repeat far from all
    others, are kept, and notes state how to drop or mark them; so are last rows that are named
    like summaries of the others (total, mean). The apostrophe that
    :func:`~ppl_vae.data.files.table_output.write_frame` puts before texts like ``=1+1`` is
    removed.

    Args:
        path: the file.
        header: whether the first line (after titles and comments) has the column names.
        delimiter: one character or its name: comma, tab, semicolon, pipe, space (white space).
        label: name of the label column, or its number if there is no header; "none" if there is
            no such column.
        missing: texts or numbers that mark missing cells, *instead of* NA, N/A, null, none, ?, .,
            - and missing (in any case); an empty cell, NaN and the errors of spreadsheets always
            do.
        image_shape: height and width, if rows are images; known for an (N, H, W) array.
        encoding: the encoding of a text file; by default UTF-8, or what a byte order mark states.
        decimal: the decimal separator.
        thousands: the character between groups of three digits.
        skip_rows: the number of lines at the top of the file that are left out.
        comment: lines that begin with this text are left out.
        columns: names (or numbers, if there is no header) of the columns that are kept as data,
            in this order; by default all.
        drop: names (or numbers) of columns that are left out.
        index: name (or number) of the column of row names; "none" if there is no such column.
        max_bytes: the largest size, in bytes, of the file and of its content.

    Raises:
        ValueError: if the file is not one table of finite numbers and missing values; the message
            gives the place and a remedy.
        TypeError: if an array's entries are not real numbers.
        FileNotFoundError: if there is no such file.
        ModuleNotFoundError: if the library that reads this kind of file is not installed.
    """
    path = Path(path)
    check_int("max_bytes", max_bytes)
    given = NA_MARKERS if missing is None else [missing] if isinstance(missing, str) else missing
    markers = (*ALWAYS_MISSING, *(marker.strip().casefold() for marker in given))
    text = TextFormat(markers, header, delimiter, decimal, thousands, skip_rows, comment)
    raw = _read_raw(path, text, encoding, label, index, max_bytes)
    label = None if label is None else _role(raw, label)
    index = None if index is None else _role(raw, index)
    if isinstance(drop, str) or isinstance(columns, str):
        raise TypeError("columns and drop must be lists of names, not one text")
    needed = {name for name in (label, index) if name not in (None, "none")}
    cells, chosen = select_columns(raw, columns, drop, needed)
    roles = ColumnRoles(raw, cells, markers)
    roles.notes.extend(summary_note(raw))
    row_names, index = roles.pop_row_names(index, label)
    labels, label = roles.pop_labels(label)
    shape = image_shape or raw.image_shape
    values, names = roles.to_matrix(chosen, keep_empty=shape is not None)
    _check_images(path, shape, values.shape[1])
    if len(values) == 1:
        roles.notes.append("the table has a single row, to which no model can be fitted")
    notes = tuple(roles.notes)
    return Table(
        path.name, values, names, row_names, labels, label, shape, notes, raw.has_names, index
    )


def _role(raw: RawTable, name: str) -> str:
    return "none" if name.casefold() == "none" else find_column(raw, name)


def _check_images(path: Path, shape: tuple[int, int] | None, width: int) -> None:
    if shape and shape[0] * shape[1] != width:
        size = f"{shape[0]} x {shape[1]}"
        raise ValueError(f"{path}: {width} columns make no images of {size} pixels")


def _read_raw(
    path: Path,
    text: TextFormat,
    encoding: str | None,
    label: str | None,
    index: str | None,
    max_bytes: int,
) -> RawTable:
    """The cells of a file of any kind.

    Raises:
        ValueError: if the kind is not known, or an option does not apply to it.
    """
    suffix = _supported_suffix(path, max_bytes)
    text_columns = {name for name in (label, index) if name is not None}
    if suffix in TEXT_SUFFIXES:
        raw = read_content(path, TEXT_SUFFIXES, max_bytes)
        if encoding is None and (found := regular_table(raw, path.name, text, text_columns)):
            return found
        content, notes = decode_text(raw, str(path), encoding)
        return TextTable(content, path.name, text, notes).to_raw_table(text_columns)
    for name, value in (("encoding", encoding), ("delimiter", text.delimiter)):
        if value is not None:
            raise ValueError(f"{path} is no text file, and has no {name}")
    if suffix in WORKBOOK_SUFFIXES:
        content, notes = workbook_text(path, max_bytes)
        commas = replace(text, delimiter=",")
        return TextTable(content, path.name, commas, notes).to_raw_table(text_columns)
    for name in ("header", "decimal", "thousands", "skip_rows", "comment"):
        if getattr(text, name):
            raise ValueError(f"{path} has typed cells: it takes no {name}")
    if suffix == ".h5ad":
        return h5ad_table(path, label, max_bytes)
    return READERS[suffix](path, max_bytes)


READERS = {
    ".npy": npy_table,
    ".npz": npz_table,
    ".parquet": parquet_table,
    ".feather": feather_table,
    ".arrow": feather_table,
}


def _supported_suffix(path: Path, max_bytes: int) -> str:
    check_file(path, max_bytes)
    name = path.name.lower()
    compressed = next((end for end in COMPRESSED if name.endswith(end)), "")
    suffix = Path(name.removesuffix(compressed)).suffix
    if compressed == ".zip" and not suffix:
        return TEXT_SUFFIXES[0]
    if suffix in (TEXT_SUFFIXES if compressed else SUFFIXES):
        return suffix
    kinds = ", ".join(SUFFIXES)
    advice = f"must end in one of {kinds}; text also with {', '.join(COMPRESSED)}"
    raise ValueError(f"{path} {CONVERSION_ADVICE.get(suffix, advice)}")
