"""The options of reading a table, in one object that commands and programs can pass on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ppl_vae.data.files.tables import MAX_BYTES, Table, read_table


@dataclass(frozen=True)
class TableOptions:
    """The options of :func:`~ppl_vae.data.files.tables.read_table`, which documents them.

    ``TableOptions(label="species").read("iris.csv")`` is
    ``read_table("iris.csv", label="species")``.
    """

    header: bool | None = None
    delimiter: str | None = None
    label: str | None = None
    missing: Sequence[str] | None = None
    image_shape: tuple[int, int] | None = None
    encoding: str | None = None
    decimal: str | None = None
    thousands: str | None = None
    skip_rows: int = 0
    comment: str | None = None
    columns: Sequence[str] | None = None
    drop: Sequence[str] = ()
    index: str | None = None
    max_bytes: int = MAX_BYTES

    def read(self, path: str | Path) -> Table:
        """Read a file with these options.

        Raises:
            ValueError, TypeError, FileNotFoundError: as
                :func:`~ppl_vae.data.files.tables.read_table`.
        """
        return read_table(
            path,
            header=self.header,
            delimiter=self.delimiter,
            label=self.label,
            missing=self.missing,
            image_shape=self.image_shape,
            encoding=self.encoding,
            decimal=self.decimal,
            thousands=self.thousands,
            skip_rows=self.skip_rows,
            comment=self.comment,
            columns=self.columns,
            drop=self.drop,
            index=self.index,
            max_bytes=self.max_bytes,
        )
