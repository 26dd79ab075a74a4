"""Tables in files of all kinds, and files that are damaged, hostile or no files at all."""

import bz2
import dataclasses
import gzip
import importlib
import inspect
import io
import lzma
import os
import socket
import time
import zipfile

import numpy as np
import pandas as pd
import pytest
from table_files import NAN, assert_table, write_and_read

from ppl_vae.data.files.table_options import TableOptions
from ppl_vae.data.files.table_output import write_frame
from ppl_vae.data.files.tables import MAX_BYTES, Table, read_table

VALUES = np.array([[1.5, 2.0], [NAN, 4.0], [5.0, 6.0]])
TEXT = b"a,b\n1.5,2\n,4\n5,6\n"


def zipped(members):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


# Compressed text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv.gz", gzip.compress(TEXT, mtime=0)),
        ("x.csv.bz2", bz2.compress(TEXT)),
        ("x.TXT.XZ", lzma.compress(TEXT)),
        ("x.csv.zip", zipped({"x.csv": TEXT})),
        ("x.zip", zipped({"folder/x.csv": TEXT, "__MACOSX/x.csv": b"junk"})),
        ("x.zip", zipped({"readme.md": b"about", "data.tsv": TEXT.replace(b",", b"\t")})),
    ],
)
def test_compressed_text(tmp_path, name, content):
    table = write_and_read(tmp_path / name, content)
    assert_table(table, VALUES, "ab")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv.gz", TEXT, "cannot be read: Not a gzipped file"),
        ("x.csv.gz", gzip.compress(TEXT * 99, mtime=0)[:-9], "cannot be read"),
        ("x.csv.bz2", TEXT, "cannot be read"),
        ("x.csv.xz", lzma.compress(TEXT)[:-20], "cannot be read"),
        ("x.csv.zip", TEXT, "cannot be read: File is not a zip file"),
        (
            "x.zip",
            zipped({"a.csv": TEXT, "b.csv": TEXT}),
            r"x.zip .*holds 2 tables \('a.csv', 'b.csv'\)",
        ),
        ("x.zip", zipped({"a.md": TEXT}), r"holds 0 tables \('a.md'\)"),
        (
            "x.csv",
            gzip.compress(TEXT, mtime=0),
            "is compressed, despite its name",
        ),
        ("x.csv", b"<html><body>", "is not a text table, despite its name"),
        ("x.csv", b'{"a": [1, 2]}', "is not a text table, despite its name"),
        ("x.parquet.gz", TEXT, "must end in one of"),
    ],
)
def test_damaged_text_raises(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        write_and_read(tmp_path / name, content)


# Typed files


def typed(frame, path, index=None):
    write = {".parquet": frame.to_parquet, ".feather": frame.to_feather}[path.suffix]
    write(path) if index is None else write(path, index=index)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".feather"])
def test_typed_columns(tmp_path, suffix):
    frame = pd.DataFrame(
        {
            "f": VALUES[:, 0],
            "i": pd.array([1, None, 3], dtype="Int64"),
            "small": np.array([1, 2, 3], dtype=np.float32),
            "flag": pd.array([True, False, None], dtype="boolean"),
            "kind": pd.Categorical(["u", "v", "u"]),
        }
    )
    table = read_table(typed(frame, tmp_path / f"x{suffix}"))
    notes = ["'kind' is used as labels", "TRUE and FALSE .* in 'flag'"]
    expected = [[1.5, 1, 1, 1], [NAN, NAN, 2, 0], [5, 3, 3, NAN]]
    assert_table(table, expected, ["f", "i", "small", "flag"], *notes, labels="uvu")
    path = typed(frame.assign(t=["1 234", "#N/A", "5"]), tmp_path / f"y{suffix}")
    table = read_table(path, columns=["t", "f"], label="kind")
    np.testing.assert_array_equal(table.values, [[1234, 1.5], [NAN, NAN], [5, 5]])
    with pytest.raises(ValueError, match=r"column 't': 1 of 3 .*: 'w' \(row 2\)"):
        read_table(typed(frame.assign(t=["1", "w", "5"]), path), label="kind")


def test_half_precision_is_noted(tmp_path):
    half = np.array([[1, 2], [3, 4.5]], dtype=np.float16)
    typed(pd.DataFrame(half, columns=["a", "b"]), tmp_path / "x.parquet")
    np.save(tmp_path / "x.npy", half)
    for name in ("x.parquet", "x.npy"):
        table = read_table(tmp_path / name)
        assert table.values.tolist() == half.tolist() and "float16" in table.notes[0]


def test_the_index_of_a_parquet_file(tmp_path):
    frame = pd.DataFrame(VALUES, columns=["a", "b"], index=["u", "v", "w"])
    table = read_table(typed(frame, tmp_path / "x.parquet"))
    assert_table(table, VALUES, "ab", "index of the file", row_names="uvw")
    assert read_table(typed(frame.reset_index(drop=True), tmp_path / "x.parquet")).notes == ()
    path = typed(frame.rename_axis("id").reset_index(), tmp_path / "y.parquet")
    assert_table(read_table(path), VALUES, "ab", "first column .* row names", row_names="uvw")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [[1, 2], [3]]}, "column 'a' has lists, structures or bytes"),
        ({"a": [{"k": 1}, {"k": 2}]}, "column 'a' has lists, structures or bytes"),
        ({"a": [b"u", b"v"]}, "column 'a' has lists, structures or bytes"),
        ({"a": [1, 2], "d": pd.to_datetime(["2020-01-01"] * 2)}, r"of dates: 'd'"),
        ({"a": [1, 2], "d": pd.to_timedelta([1, 2], unit="h")}, "columns of text, 'd'"),
        ({"a": [1.0, np.inf]}, "1 infinite entry, the first in column 'a', row 2"),
        ({"a": []}, "is empty: it has 0 rows"),
    ],
)
def test_columns_that_are_no_numbers_raise(tmp_path, columns, message):
    path = typed(pd.DataFrame(columns), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        read_table(path)


def test_what_was_written_is_read(tmp_path):
    rng = np.random.default_rng(0)
    values = np.where(rng.random((20, 3)) < 0.2, NAN, rng.standard_normal((20, 3)))
    values[0], values[:, 0] = 1, 2
    labels = tuple("ab"[k % 2] for k in range(20))
    names = tuple("-+=@r"[k % 5] + str(k) + "r" for k in range(20))
    table = Table("t", values, ("u", "v", "-w"), names, labels, "kind")
    for suffix in ("csv", "tsv", "parquet"):
        write_frame(table.to_frame(), tmp_path / f"x.{suffix}", index=True)
        found = read_table(tmp_path / f"x.{suffix}")
        np.testing.assert_array_equal(found.values, values)
        assert found.labels == labels and found.label == "kind"
        assert found.row_names == table.row_names
        assert found.columns == table.columns


def test_frames_of_tables():
    frame = Table("t", VALUES, ("a", "b")).to_frame()
    pd.testing.assert_frame_equal(frame, pd.DataFrame(VALUES, columns=["a", "b"]))
    frame = Table("t", VALUES, ("a", "b"), ("u", "v", "w"), (1, 2, 2), "a").to_frame()
    assert list(frame.columns) == ["a", "b", "a"] and list(frame.index) == ["u", "v", "w"]


def test_damaged_typed_files_raise(tmp_path):
    for name in ("x.parquet", "x.feather", "x.npy", "x.npz"):
        for content in (b"", TEXT, b"PAR1" + TEXT * 20 + b"PAR1", b"\x93NUMPY\1\0\xff\xff"):
            with pytest.raises(ValueError, match=r"x\.\w+ is not an? \.?\w+ file of"):
                write_and_read(tmp_path / name, content)
    frame = pd.DataFrame(np.random.default_rng(0).standard_normal((500, 4)), columns=list("abcd"))
    for suffix in (".parquet", ".feather"):
        whole = typed(frame, tmp_path / f"x{suffix}").read_bytes()
        for size in (len(whole) // 2, len(whole) - 5):
            with pytest.raises(ValueError, match="is not a"):
                write_and_read(tmp_path / f"y{suffix}", whole[:size])


# Arrays


def test_archives_of_arrays(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=VALUES)
    assert_table(read_table(path), VALUES, ["x1", "x2"])
    np.savez_compressed(path, x=VALUES, y=np.array([1, 0, 1]), label=np.array(["u", "v", "u"]))
    table = read_table(path)
    expected = np.column_stack([VALUES, [1, 0, 1]])
    assert_table(table, expected, ["x1", "x2", "y"], "'label' is used as labels", labels="uvu")
    assert read_table(path, label="y", drop=["label"]).labels == (1, 0, 1)
    np.savez(path, images=np.ones((3, 2, 2)) * [[[1]], [[2]], [[3]]], other=np.arange(5))
    table = read_table(path)
    assert table.image_shape == (2, 2) and "left out: 'other'" in table.notes[0]
    for arrays, message in (
        ({"a": VALUES, "b": VALUES}, r"must hold one matrix .*'a': \(3, 2\), 'b': \(3, 2\)"),
        ({"a": np.arange(3)}, r"must hold one matrix of numbers; it has \{'a': \(3,\)\}"),
        ({}, "must hold one matrix of numbers; it has no array"),
        ({"a": np.array([{}])}, "has Python objects, which are never read"),
        ({"a": VALUES, "x1": np.arange(3)}, "an array has the name of a column .* 'x1'"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message):
            read_table(path)


def header(shape, dtype="<f8"):
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        content, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return content.getvalue()


@pytest.mark.parametrize("shape", [(10**6, 10**6), (2**62, 8), (10**30, 2), (3, 2), (10, 10)])
def test_headers_that_promise_more_than_there_is(tmp_path, shape):
    start = time.perf_counter()
    for name, content in (
        ("x.npy", header(shape) + bytes(40)),
        ("x.npz", zipped({"a.npy": header(shape) + bytes(40)})),
    ):
        with pytest.raises(ValueError, match=r"x.np\w is not a .* promises \d+ bytes"):
            write_and_read(tmp_path / name, content)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "content",
    [
        header((-1, 2)) + bytes(40),
        header((2, 2), "|O") + bytes(40),
        header((2, 2), "<U5") + bytes(40),
        b"\x93NUMPY\3\0" + header((2, 2))[8:] + bytes(40),
        b"\x93NUMPY\1\0\x10\0" + b"import os      \n",
        b"\x93NUMPY\1\0\x10\0" + b"{'descr': 1}   \n",
    ],
)
def test_hostile_headers_raise(tmp_path, content):
    with pytest.raises((ValueError, TypeError), match=r"x\.npy"):
        write_and_read(tmp_path / "x.npy", content)


@pytest.mark.parametrize(
    ("start", "text", "reason"),
    [
        (b"\x93NUMPY\2\0\xff\xff\xff\xff", b"{", "its header has 4294967295 bytes"),
        (b"\x93NUMPY\2\0\x20\x4e\0\0", b"(" * 20_000, "its header has 20000 bytes"),
        (b"\x93NUMPY\1\0\x10\x27", b"(" * 10_000, "does not state the shape"),
        (b"\x93NUMPY\1\0\x20\0", b"{'descr': open('x'), 'shape': 1}", "does not state"),
        (b"\x93NUMPY\1\0\x20\0", b"{'descr'", "does not state the shape and the type"),
    ],
)
def test_reasons_why_a_header_cannot_be_read(start, text, reason, tmp_path):
    path = tmp_path / "x.npy"
    for content, name in (
        (start + text, path),
        (zipped({"a.npy": start + text}), path.with_suffix(".npz")),
    ):
        with pytest.raises(ValueError, match=f"of numbers: .*{reason}") as error:
            write_and_read(name, content)
        assert "pickle" not in str(error.value) and " at 0x" not in str(error.value)


def test_the_order_of_arrays(tmp_path):
    array = np.arange(12.0).reshape(3, 4)
    np.save(tmp_path / "x.npy", np.asfortranarray(array))
    assert read_table(tmp_path / "x.npy").values.tolist() == array.tolist()
    np.save(tmp_path / "x.npy", array[:, ::-1])
    assert read_table(tmp_path / "x.npy").values.tolist() == array[:, ::-1].tolist()
    np.save(tmp_path / "x.npy", np.ones((1, 3)))
    assert "single row" in read_table(tmp_path / "x.npy").notes[-1]


# Workbooks and annotated data


def workbook(path, *sheets):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for k, rows in enumerate(sheets):
        sheet = book.create_sheet(f"sheet {k}")
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_workbooks(tmp_path):
    rows = [["Report"], [], ["name", "a", "b"], ["u", 1.5, 2], ["v", None, "#N/A"], ["w", 5, True]]
    path = workbook(tmp_path / "x.xlsx", [*rows[2:4], ["v", None, 4], ["w", 5, 6]])
    assert_table(read_table(path), VALUES, "ab", "row names", row_names="uvw")
    path = workbook(tmp_path / "x.xlsx", [], rows, [["other"]])
    with pytest.raises(ValueError, match=r"column 'b': 1 of 3 .*: 'TRUE' \(line 6\)"):
        read_table(path)
    table = read_table(path, drop=["b"])
    notes = ["of 2 sheets 'sheet 1' is read, not 'sheet 2'", "blank lines .* line 2"]
    notes += ["line 1 above the table", "row names"]
    assert_table(table, VALUES[:, :1], "a", *notes, row_names="uvw")
    path = workbook(tmp_path / "x.xlsx", [["a", "b"], [1, "1 234"], [2, "2 000"], [3, "n.d."]])
    assert read_table(path, missing="n.d.").values[:2].tolist() == [[1, 1234], [2, 2000]]
    path = workbook(tmp_path / "x.xlsx", [["a", "b"], [1, 2], [3, "=A2+1"]])
    with pytest.raises(ValueError, match=r"formula '=A2\+1' in line 3 has no stored value"):
        read_table(path)
    with pytest.raises(ValueError, match="is empty"):
        read_table(workbook(tmp_path / "x.xlsx", []))
    with pytest.raises(ValueError, match="not an Excel workbook"):
        write_and_read(tmp_path / "x.xlsx", zipped({"a.xml": b"<a/>"}))
    with pytest.raises(ValueError, match="is no text file, and has no delimiter"):
        read_table(path, delimiter=",")


def test_a_workbook_with_a_remote_cell(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for k, row in enumerate([["a", "b"], [1, 2], [3, 4]], 1):
        for j, cell in enumerate(row, 1):
            book.active.cell(k, j, cell)
    book.active.cell(40_000, 200, 7)
    book.save(tmp_path / "x.xlsx")
    start = time.perf_counter()
    table = read_table(tmp_path / "x.xlsx")
    np.testing.assert_array_equal(table.values, [[1, 2, NAN], [3, 4, NAN], [NAN, NAN, 7]])
    assert table.columns == ("a", "b", "x200") and time.perf_counter() - start < 30
    with pytest.raises(ValueError, match=r"x\.xlsx has .*, and at most 1000 bytes are read"):
        read_table(tmp_path / "x.xlsx", max_bytes=1000)


def test_annotated_data(tmp_path):
    anndata = pytest.importorskip("anndata")
    scipy_sparse = pytest.importorskip("scipy.sparse")
    obs = pd.DataFrame({"cell": ["u", "v", "u"], "n": [1, 2, 3]}, index=["c1", "c2", "c3"])
    var = pd.DataFrame(index=["g1", "g2"])
    dense = np.array([[1.5, 2], [0, 4], [5, 6]])
    for matrix in (dense, scipy_sparse.csr_matrix(dense), scipy_sparse.csc_matrix(dense)):
        anndata.AnnData(matrix, obs=obs, var=var).write_h5ad(tmp_path / "x.h5ad")
        table = read_table(tmp_path / "x.h5ad", label="cell")
        assert table.values.tolist() == dense.tolist() and table.columns == ("g1", "g2")
        assert table.labels == ("u", "v", "u") and table.row_names == ("c1", "c2", "c3")
        assert any("left out: 'n'" in note for note in table.notes)
    with pytest.raises(ValueError, match="at most"):
        read_table(tmp_path / "x.h5ad", max_bytes=1000)
    with pytest.raises(ValueError, match=r"not an \.h5ad file"):
        write_and_read(tmp_path / "y.h5ad", TEXT)


@pytest.mark.parametrize(("name", "extra"), [("x.xlsx", "excel"), ("x.h5ad", "h5ad")])
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, name, extra):
    def missing(library):
        raise ModuleNotFoundError(f"No module named {library!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=rf"not installed: .*'ppl_vae\[{extra}\]'"):
        write_and_read(tmp_path / name, zipped({"a.xml": b"<a/>"}))


# What is no file, or too large


def test_paths_that_are_no_files_raise(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "device.csv").symlink_to("/dev/zero")
    (tmp_path / "a.csv").symlink_to(tmp_path / "b.csv")
    (tmp_path / "b.csv").symlink_to(tmp_path / "a.csv")
    (tmp_path / "dangling.csv").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder.npy").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)
        server.bind("socket.csv")
    for name, error, message in (
        ("pipe.csv", ValueError, "is a pipe, a socket or a device"),
        ("device.csv", ValueError, "is a pipe, a socket or a device"),
        ("socket.csv", ValueError, "is a pipe, a socket or a device"),
        ("a.csv", ValueError, "is a loop of links"),
        ("folder.npy", ValueError, "is a folder"),
        ("dangling.csv", FileNotFoundError, "there is no file"),
        ("none.csv", FileNotFoundError, "there is no file"),
        (f"{'x' * 300}.csv", ValueError, "cannot be read: File name too long"),
        ("a.csv/x.csv", ValueError, "is a loop of links"),
    ):
        start = time.perf_counter()
        with pytest.raises(error, match=message):
            read_table(tmp_path / name)
        assert time.perf_counter() - start < 2
    with pytest.raises(ValueError, match="is a pipe"):
        read_table("/dev/null")


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("x.csv.gz", gzip.compress),
        ("x.csv.bz2", bz2.compress),
        ("x.csv.xz", lzma.compress),
        ("x.zip", lambda data: zipped({"x.csv": data})),
    ],
)
def test_files_that_expand_raise(tmp_path, name, compress):
    content = compress(b"1,2\n" * 400_000)
    assert len(content) < 50_000
    with pytest.raises(ValueError, match=r"more than 1.0 MiB when it is decompressed.*max_bytes"):
        write_and_read(tmp_path / name, content, max_bytes=2**20)


def test_other_files_that_are_too_large_raise(tmp_path):
    with (tmp_path / "sparse.csv").open("wb") as file:
        file.truncate(7 * 2**40)
    with pytest.raises(
        ValueError, match=r"has 7.0 TiB, and at most 1.0 GiB are read; .*max_bytes"
    ):
        read_table(tmp_path / "sparse.csv")
    frame = pd.DataFrame({f"c{k}": np.zeros(100_000) for k in range(10)})
    for suffix in (".parquet", ".feather"):
        path = typed(frame, tmp_path / f"x{suffix}")
        assert path.stat().st_size < 200_000
        with pytest.raises(ValueError, match=r"has \d\.\d MiB, and at most 1.0 MiB are read"):
            read_table(path, max_bytes=2**20)
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros((1000, 1000)))
    with pytest.raises(ValueError, match=r"has 7.6 MiB, and at most 1.0 MiB are read"):
        read_table(tmp_path / "x.npz", max_bytes=2**20)
    for wrong in (0, -1, 1.5):
        with pytest.raises((ValueError, TypeError), match="max_bytes"):
            read_table(tmp_path / "x.npz", max_bytes=wrong)


# Options


def test_options_have_the_defaults_and_the_names_of_read_table():
    _, *parameters = inspect.signature(read_table).parameters.values()
    defaults = {p.name: p.default for p in parameters}
    assert defaults == dataclasses.asdict(TableOptions()) and MAX_BYTES == 2**30
    assert list(defaults) == [field.name for field in dataclasses.fields(TableOptions)]


def test_every_option_is_passed_on(tmp_path):
    path = tmp_path / "x.csv"
    text = "skip\n%c\nn;k;a;b;c\nu;x;1.234,5;9;7\nv;y;2,5;-9;8\n"
    path.write_bytes(text.encode("utf-16"))
    options = TableOptions(
        header=True,
        delimiter=";",
        label="k",
        missing=["-9"],
        image_shape=(1, 2),
        encoding="utf-16",
        decimal=",",
        thousands=".",
        skip_rows=1,
        comment="%",
        columns=["b", "a"],
        drop=["c"],
        index="n",
        max_bytes=1000,
    )
    table = options.read(path)
    assert table.columns == ("b", "a") and table.labels == ("x", "y")
    np.testing.assert_array_equal(table.values, [[9, 1234.5], [NAN, 2.5]])
    assert table.row_names == ("u", "v") and table.image_shape == (1, 2)
