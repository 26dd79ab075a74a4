"""Fixtures and checks of the tests that read tables from files."""

import re

import numpy as np

from ppl_vae.data.files.tables import read_table

NAN = float("nan")


def write_and_read(path, content, written_as="utf-8", **options):
    """Write text or bytes to a file, and read it as a table."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode(written_as))
    return read_table(path, **options)


def assert_table(table, values, columns, *notes, row_names=None, labels=None):
    """All parts of a table are as stated, and each note matches its pattern."""
    np.testing.assert_array_equal(table.values, np.array(values, dtype=float))
    assert table.columns == tuple(columns)
    assert table.row_names == (None if row_names is None else tuple(row_names))
    assert table.labels == (None if labels is None else tuple(labels))
    assert len(table.notes) == len(notes), table.notes
    for pattern, note in zip(notes, table.notes, strict=True):
        assert re.search(pattern, note), note
