"""Reading tables: detection, notes on it, and error messages."""

import dataclasses
import gzip
import io
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.datasets import load_digits, load_iris

import oracles
from ppl_vae.data.files.tables import digits_table, read_table

VALUES = np.array([[1.5, 2.0, -3.0], [4.0, 5e-3, 6.0], [7.0, 8.0, 9.25]])
NAN = float("nan")


@pytest.fixture
def read(tmp_path):
    """A function that writes text to a file of this name and reads it as a table."""

    def reader(text, name="x.csv", encoding="utf-8", **options):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
        return read_table(path, **options)

    return reader


def assert_values(table, values, columns=None):
    assert table.values.dtype == np.float64
    np.testing.assert_array_equal(table.values, np.array(values, dtype=float))
    assert columns is None or table.columns == tuple(columns)


def assert_notes(table, *patterns):
    """Each note matches its pattern, and there are no others."""
    assert len(table.notes) == len(patterns), table.notes
    for pattern, note in zip(patterns, table.notes, strict=True):
        assert re.search(pattern, note), note


# Delimiters and headers


@pytest.mark.parametrize("delimiter", [",", ";", "\t", " ", "|", "   "])
@pytest.mark.parametrize("header", ["", "a b c", '"a" "b" "c"'])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_delimiters_headers_and_line_ends(read, delimiter, header, newline):
    lines = [header.replace(" ", delimiter)] if header else []
    lines += [delimiter.join(map(str, row)) for row in VALUES]
    table = read(newline.join(lines) + newline)
    assert_values(table, VALUES, ("a", "b", "c") if header else ("x1", "x2", "x3"))
    assert table.name == "x.csv" and table.row_names is None and table.labels is None
    notes = [] if delimiter in ",\t" else ["delimiter detected: (semicolon|pipe|space)"]
    assert_notes(table, *notes, *([] if header else ["line 1 is used as data"]))


@pytest.mark.parametrize(
    ("name", "text"), [(";", "1;2\n3;4\n"), ("tab", "1\t2\n3\t4\n"), ("space", "1 2\n3  4\n")]
)
def test_given_delimiters_and_headers_are_not_noted(read, name, text):
    table = read(text, delimiter=name, header=False)
    assert_values(table, [[1, 2], [3, 4]])
    assert_notes(table)


def test_a_given_header_overrides_detection(read):
    text = "400,402\n1,2\n3,4\n"
    assert_notes(read(text), "line 1 is used as data, not as column names")
    assert_values(read(text, header=True), [[1, 2], [3, 4]], ("400", "402"))
    assert_notes(read(text, header=True))
    assert_values(read("a,1\n3,4\n5,6\n"), [[3, 4], [5, 6]], ("a", "1"))
    assert_notes(read("a,1\n3,4\n5,6\n"), "column names, although it has numbers")
    with pytest.raises(
        ValueError, match=r"column 'x1': 1 of 3 cells are not numbers: 'a' \(line 1\)"
    ):
        read("a,1\n3,4\n5,6\n", header=False)


def test_delimiter_detection(read):
    assert_values(read("a;b\n1,5;2,5\n3,5;4,25\n"), [[1.5, 2.5], [3.5, 4.25]], "ab")
    assert_values(read("name of it,b\nx y,2\nz w,3\n"), [[2], [3]], ["b"])
    assert_values(read("1, 2\n3, 4\n"), [[1, 2], [3, 4]])
    assert_values(read("a\tb\tc\n1\t\t3\n4\t5\t\n"), [[1, NAN, 3], [4, 5, NAN]])
    table = read("day;v\n01.02.2020;1,5\n02.02.2020;2,5\n")
    assert_values(table, [[1.5], [2.5]], "v")
    assert table.row_names == (
        "01.02.2020",
        "02.02.2020",
    )
    assert_values(read("1\t\t3\n4\t5\t\n"), [[1, NAN, 3], [4, 5, NAN]])
    with pytest.raises(ValueError, match="one character or one of 'tab', 'semicolon'"):
        read("1,2\n", delimiter="::")


def test_quoted_cells(read):
    table = read('who,"a, b",c\n"Smith, J",1,"2"\n"O ""K"" Hu",3,4\n')
    assert_values(table, [[1, 2], [3, 4]], ("a, b", "c"))
    assert table.row_names == ("Smith, J", 'O "K" Hu')
    table = read('"Sepal\nlength",b\n1,2\n3,4\n')
    assert_values(table, [[1, 2], [3, 4]], ("Sepal\nlength", "b"))
    with pytest.raises(ValueError, match="fix the quotation marks in line 3"):
        read('a,b\n1,2\n3,"4\n5,6\n')


def test_one_column_and_byte_order_marks(read):
    text = "\ufeffvalue\n1\n2\n3\n"
    for encoding in ("utf-8", "utf-16-le", "utf-16-be"):
        table = read(text, encoding=encoding)
        assert_values(table, [[1], [2], [3]], ["value"])
        assert_notes(table)
    assert_values(read("1\n2\n"), [[1], [2]], ["x1"])


@pytest.mark.parametrize("suffix", [".csv", ".TSV", ".txt", ".dat", ".data", ".csv.gz", ".CSV.GZ"])
def test_suffixes(read, suffix):
    text = b"a\tb\n1\t2\n3\t4\n"
    packed = gzip.compress(text) if suffix.lower().endswith("gz") else text
    assert_values(read(packed, name="x" + suffix), [[1, 2], [3, 4]], "ab")


def test_column_names_are_made_distinct(read):
    table = read("a,a.1,a,,a\n1,2,3,4,5\n6,7,8,9,0\n")
    assert table.columns == ("a", "a.1", "a.2", "x4", "a.3")
    assert_notes(table, "'a' is repeated; renamed to 'a.2'", "'a' is repeated; renamed to 'a.3'")


def test_column_numbers_of_pandas(read):
    frame = pd.DataFrame(VALUES)
    table = read(frame.to_csv(index=False))
    assert_values(table, VALUES, "012")
    assert_notes(table, "line 1 is used as column names")
    table = read(frame.to_csv())
    assert_values(table, VALUES, "012")
    assert table.row_names == ("0", "1", "2")
    again = pd.read_csv(io.StringIO(frame.to_csv())).to_csv(index=False)
    assert "Unnamed: 0" in again and read(again).row_names == ("0", "1", "2")
    assert_values(read("\t1\t2\n\t3\t4\n"), [[1, 2], [3, 4]], ("x2", "x3"))


def test_numpy_savetxt(tmp_path):
    path = tmp_path / "x.txt"
    np.savetxt(path, VALUES)
    assert_values(read_table(path), VALUES, ("x1", "x2", "x3"))
    np.savetxt(path, VALUES, header="a b c")
    table = read_table(path, delimiter="space")
    assert_values(table, VALUES, "abc")
    assert_notes(table, "lines with # .* skipped: 1", "names are read from line 1, after #")
    np.savetxt(path, VALUES, header="by me\na,b,c", delimiter=",")
    assert_values(read_table(path), VALUES, "abc")
    assert_values(read_table(path, header=False), VALUES, ("x1", "x2", "x3"))
    np.savetxt(path, VALUES, header="made yesterday", delimiter=",")
    table = read_table(path)
    assert_values(table, VALUES, ("x1", "x2", "x3"))
    assert_notes(table, "lines with # .* skipped: 1", "line 2 is used as data")


def test_comments_above_a_header_and_blank_lines(read):
    table = read("# from the lab\n\na,b\n1,2\n\n3,4\n\n")
    assert_values(table, [[1, 2], [3, 4]], "ab")
    assert_notes(table, "lines with # .* skipped: 1", "blank lines .* skipped: line 5")
    assert_values(read("#a,b\n1,2\n3,4\n", header=True), [[1, 2], [3, 4]], "ab")


# Row names


def test_row_names(read):
    for text in (",a,b\nu,1,2\nu,3,4\n", "a,b\nu,1,2\nu,3,4\n"):
        table = read(text)
        assert_values(table, [[1, 2], [3, 4]], "ab")
        assert table.row_names == ("u", "u")
        assert_notes(table, "first column is used as row names: it has text")
    table = read("id,a\nu,1\nv,2\n")
    assert_values(table, [[1], [2]], "a")
    assert table.row_names == ("u", "v")
    table = read("u,1,2\nv,3,4\n")
    assert_values(table, [[1, 2], [3, 4]], ("x2", "x3"))
    assert table.row_names == ("u", "v")


def test_row_names_of_r(read):
    table = read('"mpg" "cyl"\n"Mazda RX4" 21 6\n"Datsun 710" 22.8 4\n', name="x.txt")
    assert_values(table, [[21, 6], [22.8, 4]], ("mpg", "cyl"))
    assert table.row_names == ("Mazda RX4", "Datsun 710")
    table = read('"a","b"\n"1",1.5,2\n"2",3,4\n')
    assert_values(table, [[1.5, 2], [3, 4]], "ab")
    assert table.row_names == ("1", "2")
    table = read('"","1","2"\n"001",1.5,2\n"002",3,4\n')
    assert_values(table, [[1.5, 2], [3, 4]], "12")
    assert table.row_names == ("001", "002")
    with pytest.raises(ValueError, match=r"line 1 has 2 cell\(s\) where 3 are expected"):
        read("a,b\n1,2,3\n4,5,6\n", header=False)
    with pytest.raises(ValueError, match=r"line 1 has 2 cell\(s\) where 3 are expected"):
        read("a,b\n1.5,2,3\n4.5,5,6\n")


def test_the_index_of_pandas(read):
    frame = pd.DataFrame(VALUES, columns=list("abc"))
    for index in (range(3), range(1, 4), [2, 0, 1]):
        table = read(frame.set_index(pd.Index(index)).to_csv())
        assert_values(table, VALUES, "abc")
        assert table.row_names == tuple(map(str, index))
        assert_notes(table, "row names: it has distinct whole numbers and no name")
    table = read(frame.set_index(pd.Index([1, 1, 2])).to_csv())
    assert table.columns == ("x1", "a", "b", "c") and table.row_names is None
    table = read(frame.set_index(pd.Index([1, 2, 3], name="id")).to_csv())
    assert table.columns == ("id", "a", "b", "c")
    assert_notes(table, "'id': distinct whole numbers, like identifiers")


# Labels


def test_iris(read):
    iris = load_iris(as_frame=True)
    frame = iris.data.assign(species=iris.target_names[iris.target])
    table = read(frame.to_csv(index=False))
    assert_values(table, iris.data.to_numpy(), iris.feature_names)
    assert table.label == "species" and table.labels == tuple(frame.species)
    assert_notes(table, "'species' is used as labels: it is text that repeats")
    table = read(frame.to_csv(index=False, header=False))
    assert_values(table, iris.data.to_numpy(), ("x1", "x2", "x3", "x4"))
    assert table.label == "x5"
    assert_notes(table, "line 1 is used as data", "'x5' is used as labels")
    both = frame.assign(target=iris.target).to_csv(index=False)
    assert_notes(read(both), "'species' is used as labels.*; 'target' is kept as data")
    with pytest.raises(ValueError, match="columns of text, 'species': choose one as label"):
        read(both, label="target")
    table = read(iris.frame.to_csv(index=False))
    assert table.labels == tuple(iris.target) and {type(k) for k in table.labels} == {int}
    assert_notes(table, "'target' is used as labels for its name; label 'none' keeps it")
    assert read(iris.frame.to_csv(index=False), label="none").values.shape == (150, 5)
    assert_notes(read(iris.frame.to_csv(index=False), label="target"))


def test_given_labels(read):
    text = "a,b,c\n1,u,2.5\n3,u,4\n5,v,6\n"
    for name in ("b", None):
        table = read(text, label=name)
        assert_values(table, [[1, 2.5], [3, 4], [5, 6]], "ac")
        assert table.labels == (
            "u",
            "u",
            "v",
        )
    table = read("a,c\n1,2.5\n3,4\n", label="c")
    assert table.labels == (2.5, 4.0)
    assert_values(table, [[1], [3]], "a")
    assert read("a,c\nu,2.5\nv,4\n", label="a").labels == ("u", "v")
    assert read("a,c\n1,2.5\n2a,4\n3,5\n", label="a").labels == ("1", "2a", "3")
    assert read("1,7\n2,8\n", label="2").labels == (7, 8)
    assert read("1,7\n2,8\n", label="x2").labels == (7, 8)
    with pytest.raises(ValueError, match=r"no column 'd'; it has 'a', 'b', 'c'$"):
        read(text, label="d")
    many = ",".join(f"c{k}" for k in range(12)) + "\n" + ",".join("1" * 12) + "\n"
    with pytest.raises(ValueError, match=r"it has 'c0', .*, 'c9', \.\.\.$"):
        read(many + many.split("\n")[1], label="d")


def test_missing_labels_raise(read):
    with pytest.raises(ValueError, match=r"'b' is empty in 2 row\(s\), as in line 3; fill"):
        read("a,b\n1,u\n2,\n3,none\n4,u\n")
    assert read("a,b\n1,u\n2,none\n3,u\n", missing="NA").labels == ("u", "none", "u")
    with pytest.raises(ValueError, match=r"label column 'b' is empty in 1 row\(s\)"):
        read("a,b\n1,2\n2,\n", label="b")


def test_text_columns_without_a_role_raise(read):
    with pytest.raises(ValueError, match=r"text, 'b', 'c': choose one as label .* encode them"):
        read("a,b,c\n1,u,x\n2,u,y\n3,v,y\n")
    with pytest.raises(ValueError, match="columns of text, 'day'"):
        read("a,day\n1,2020-01-01\n2,2020-01-02\n")
    assert read("day,a\n2020-01-01,1\n2020-01-02,2\n").row_names == ("2020-01-01", "2020-01-02")
    with pytest.raises(ValueError, match="columns of text, 'b'"):
        read("a,b\n1,red\n2,blue\n")
    with pytest.raises(ValueError, match="columns of text, 'b'"):
        read("a,b\n1,u\n2,u\n", label="none")


# Cells


def test_default_missing_markers(read):
    words = ["", "NA", "n/a", "NaN", "Null", "none", "?", ".", "-", "MISSING"]
    text = "a,b\n" + "".join(f"{k},{word}\n" for k, word in enumerate(words)) + "10,1\n"
    table = read(text)
    assert_values(table, [[k, NAN] for k in range(10)] + [[10, 1]], "ab")
    assert table.num_missing == 10
    found = [f"cells '{re.escape(word)}' are .* missing values: 1" for word in words[5:]]
    assert_notes(table, *found, "'a': the numbers of the rows, like identifiers")
    with pytest.raises(
        ValueError, match=r"'b': 8 of 20 cells are not numbers: 'NA' \(line 3\), 'n/a' \(line 4\)"
    ):
        read(text + "11,1\n" * 9, missing=["-999"])


def test_custom_missing_markers(read):
    text = "a,b,c\n1,-999,3\n-999.0,n.d.,-9990\n5,6, N.D. \n"
    values = [[1, NAN, 3], [NAN, NAN, -9990], [5, 6, NAN]]
    table = read(text, missing=["-999", "n.d."])
    assert_values(table, values)
    assert_notes(table)
    assert_values(read(text.replace("-999,", "-999.00,"), missing=("-999.0", "n.d.")), values)
    with pytest.raises(
        ValueError,
        match=r"column 'b': 1 of 3 cells are not numbers: 'n\.d\.' \(line 3\); give miss",
    ):
        read(text)
    assert_values(read("a\n1\nnan\n\n3\n", missing="n.d."), [[1], [NAN], [3]])


def test_empty_columns_and_rows_are_left_out(read):
    table = read("a,b,c\n1,,3\n,,\n4,,5\n,,\n")
    assert_values(table, [[1, 3], [4, 5]], "ac")
    assert_notes(table, "empty rows are left out: lines 3, 5$", "without any value .* out: 'b'$")
    table = read("a\tb\n1\t2\n\t\n3\t4\n")
    assert_values(table, [[1, 2], [3, 4]])
    # A row is kept if it has a name or a marker, and a cell of a single column if it is quoted.
    assert_values(read("id,a,b\nu,1,2\nv,,\n"), [[1, 2], [NAN, NAN]])
    assert_values(read("a,b\n1,2\nNA,NA\n3,4\n"), [[1, 2], [NAN, NAN], [3, 4]])
    assert_values(read('a\n1\n""\n3\n'), [[1], [NAN], [3]])
    # Pixels keep their places.
    table = read("a,b\n1,\n2,\n", image_shape=(1, 2))
    assert_values(table, [[1, NAN], [2, NAN]])


@pytest.mark.parametrize("delimiter", [";", "\t", " ", "|"])
def test_decimal_commas(read, delimiter):
    lines = ["id a b", "u 1,5 2", "v -,25 NA", "w 1,5e3 1,500"]
    table = read("\n".join(lines).replace(" ", delimiter), name="x.txt")
    assert_values(table, [[1.5, 2], [-0.25, NAN], [1500, 1.5]], "ab")
    assert sum("decimal commas detected, as in 1,5" in note for note in table.notes) == 1


@pytest.mark.parametrize(
    "text",
    [
        "a;b\n1,5;2.5\n3,5;4.5\n",
        "a;b\n1,234;2\n2,345;4\n",
        'a,b\n"1,234",2\n"1,234",4\n',
        'a,b\n"1,5",2.5\n"3,5",4\n',
        "a,b\n$5,2\n$5,4\n",
        "a,b\n5 %,2\n5 %,4\n",
        "a,b\n5€,2\n1 00,4\n",
    ],
)
def test_formatted_numbers_raise(read, text):
    with pytest.raises(ValueError, match=r"column 'a': 2 of 2 cells are not numbers: .*line 2"):
        read(text)


def test_words_among_numbers_raise(read):
    rows = ["1,2"] * 4 + ["n.d.,2", "", "o.k.,2", "n.d.,2", "x,3", "y,4"]
    with pytest.raises(ValueError) as caught:
        read("# c\na,b\n" + "1,2\n" * 6 + "\n".join(rows))
    assert "column 'a': 5 of 15 cells are not numbers: " in str(caught.value)
    assert "'n.d.' (line 13), 'o.k.' (line 15), 'x' (line 17); give missing 'n.d.'" in str(
        caught.value
    )
    with pytest.raises(ValueError, match=r"'1_00' \(line 2\)"):
        read("a,b\n1_00,2\n3,4\n5,6\n")
    with pytest.raises(ValueError, match=r"'bad' \(line 6\)"):
        read('id,a\n"u\nv",1\nw,2\nx,3\ny,bad\n')


def test_infinite_entries_raise(read, tmp_path):
    for word in ("inf", "-Infinity", "1e999"):
        with pytest.raises(ValueError, match=r"x\.csv has 1 infinite entry"):
            read(f"a,b\n1,{word}\n2,3\n")


def test_ragged_rows_raise(read):
    for text, line, found in (
        ("1,2\n3,4\n5,6,7\n", 3, 3),
        ("# c\n\na,b\n1,2\n3\n5,6\n", 5, 1),
        ('a,b\n"1",2\n3\n5,6\n', 3, 1),
        ("1,2\n3,4,5\n6,7,8\n", 1, 2),
        ("a,b,c,d\n3,4,5\n6,7,8\n", 1, 4),
    ):
        width = 3 if line == 1 else 2
        with pytest.raises(
            ValueError, match=rf"line {line} has {found} cell\(s\) where {width} are"
        ):
            read(text)


# Files that cannot be read


def test_unsupported_files_raise(read, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match="is a folder; give a file in it"):
        read_table(tmp_path / "folder.csv")
    for name, message in {
        "x.XLS": r"is a spreadsheet of another kind; save it as \.xlsx",
        "x.ods": "is a spreadsheet",
        "x.mat": "save it as CSV or Parquet",
        "x.doc": r"must end in one of \.csv",
        "x": r"must end in one of \.csv",
        "x.npy.gz": r"must end in one of \.csv",
    }.items():
        with pytest.raises(ValueError, match=message):
            read("1,2\n", name=name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n  \n# nothing\n", "is empty"),
        (b",\n,\n,\n", "is empty: no line has cells"),
        (b"PK\3\4....", "is not a text table, despite its name; save the table as CSV"),
        (b"a,b\n1,2\n\0\0\n", "is not a text table"),
        (
            "a,b\n1,2\nö,2\n".encode("latin-1"),
            "is not UTF-8: byte 0xf6 in line 3; .* such as cp1252 .*--encoding cp1252.*'ö,2'",
        ),
        (b"a,b\n", "has column names and no rows"),
        (b"1,2\n", "has a single row, of 2 numbers; .* give header False"),
        (b"id,b\nu,x\nv,y\n", "columns of text"),
        (b"id\nu\nu\nv\n", "no column of numbers besides row names and labels"),
    ],
)
def test_malformed_text_raises(read, content, message):
    with pytest.raises(ValueError, match=message):
        read(content)


def test_malformed_gzip_raises(read):
    with pytest.raises(ValueError, match="cannot be read: Not a gzipped file"):
        read("1,2\n3,4\n", name="x.csv.gz")
    with pytest.raises(ValueError, match="cannot be read"):
        read(gzip.compress(b"1,2\n3,4\n" * 100)[:-10], name="x.csv.gz")


# Arrays


def test_arrays(tmp_path):
    path = tmp_path / "x.NPY"
    for dtype in (np.float64, np.float32, np.int16, np.uint8, ">f8"):
        with path.open("wb") as file:
            np.save(file, np.abs(VALUES).astype(dtype))
        table = read_table(path)
        assert_values(table, np.abs(VALUES).astype(dtype), ("x1", "x2", "x3"))
        assert_notes(table)
    assert read_table(path, label="3").labels == (3.0, 6.0, 9.25)


def test_arrays_of_images_labels_and_missing_values(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(24).reshape(4, 2, 3))
    table = read_table(path, missing=["5", "n.d."])
    assert table.image_shape == (2, 3) and table.values.shape == (4, 6) and table.num_missing == 1
    assert table.values[1].tolist() == [6, 7, 8, 9, 10, 11]
    with pytest.raises(ValueError, match="5 columns make no images of 2 x 3 pixels"):
        read_table(path, label="1")
    np.save(path, np.arange(24).reshape(4, 6))
    assert read_table(path).image_shape is None
    assert read_table(path, image_shape=(3, 2)).image_shape == (3, 2)
    table = read_table(path, label="x6")
    assert table.labels == (5, 11, 17, 23) and {type(k) for k in table.labels} == {int}


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.arange(3), ValueError, r"must hold one array .* it has int64 \(3,\)"),
        (np.ones((2, 2, 2, 2)), ValueError, r"must hold one array .* \(2, 2, 2, 2\)"),
        (np.array([{}]), ValueError, "not a .npy file of numbers: it has Python objects"),
        (np.ones(3, dtype=[("a", float)]), ValueError, r"not a .npy file .* \[\('a', '<f8'\)\]"),
        (np.array([["a"], ["b"]]), TypeError, "must hold numbers"),
        (np.ones((2, 2), dtype=complex), TypeError, "complex entries"),
        (np.array([[1.0], [np.inf]]), ValueError, "x.npy has 1 infinite entry"),
        (np.ones((0, 3)), ValueError, "x.npy is empty"),
    ],
)
def test_malformed_arrays_raise(tmp_path, array, error, message):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(error, match=message):
        read_table(tmp_path / "x.npy")


def test_files_that_are_not_arrays_raise(read, tmp_path):
    with pytest.raises(ValueError, match=r"not a \.npy file of numbers"):
        read("1,2\n3,4\n", name="x.npy")
    with pytest.raises(ValueError, match=r"not a \.npy file of numbers"):
        read("", name="x.npy")
    np.savez(tmp_path / "x.npz", a=VALUES)
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"not a \.npy file of numbers: the magic string"):
        read_table(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", VALUES)
    for name, option in {"header": True, "thousands": ",", "skip_rows": 2}.items():
        with pytest.raises(ValueError, match=f"has typed cells: it takes no {name}"):
            read_table(tmp_path / "x.npy", **{name: option})
    for name, option in {"delimiter": ",", "encoding": "utf-8"}.items():
        with pytest.raises(ValueError, match=f"is no text file, and has no {name}"):
            read_table(tmp_path / "x.npy", **{name: option})


# The table


def test_digits():
    table = digits_table()
    assert_values(table, load_digits().data / 16)
    assert table.labels == tuple(load_digits().target) and table.label == "digit"
    assert table.image_shape == (8, 8) and table.name == "digits / 16"
    assert table.columns[8 * 3 + 5] == "r3c5" and len(set(table.columns)) == 64
    constant = ("r0c0", "r4c0", "r4c7")
    assert table.constant_columns() == constant


def test_constant_columns_with_missing_values(read):
    table = read("a,b,c,d\n,0.1,1,\n2,0.1,2,\n2,,2,\n")
    assert table.constant_columns() == ("a", "b") and table.num_missing == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.name = "other"


def test_images_in_text(read):
    text = "a,b,c,d,class\n1,2,3,4,0\n5,6,7,8,1\n"
    table = read(text, image_shape=(2, 2))
    assert table.image_shape == (2, 2) and table.labels == (0, 1)
    with pytest.raises(ValueError, match="5 columns make no images of 2 x 2 pixels"):
        read(text, image_shape=(2, 2), label="none")


def test_a_stated_header_stays_one_above_numbers_that_could_be_names(read):
    text = '"c 0" "c 1" "c 2"\n"row 0" -1 0 1\n"row 1" 0 1 0\n'
    table = read(text, delimiter=" ", header=True)
    assert table.columns == ("c 0", "c 1", "c 2") and table.row_names == ("row 0", "row 1")
    assert table.values.tolist() == [[-1, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize(
    ("header", "index", "name"),
    [
        ("plot,a,b", None, "plot"),
        (",a,b", None, None),
        ("a,b", None, None),
        ("b,plot,a", "plot", "plot"),
    ],
)
def test_row_names_keep_the_name_of_their_column(header, index, name, read, tmp_path):
    rows = {"plot,a,b": "r{0},{0},1.5", ",a,b": "r{0},{0},1.5", "a,b": "r{0},{0},1.5"}
    row = rows.get(header, "{0},r{0},1.5")
    text = "\n".join([header, *(row.format(k) for k in range(4))])
    table = read(text, index=index)
    assert table.row_names == ("r0", "r1", "r2", "r3")
    assert table.index == name and table.to_frame().index.name == name


def test_a_caption_below_the_table_is_no_row_of_missing_values(read):
    rows = "".join(f"MS-{k};{k},5;{k * k},25\n" for k in range(6))
    table = read("Stelle;pH;Nitrat\n" + rows + "Quelle: Landesamt;;\n")
    assert len(table.values) == 6 and "below the table left out: 'Quelle" in " ".join(table.notes)
    kept = read("Stelle;pH;Nitrat\n" + rows.replace("MS-", "MS: ") + "MS: neu;;\n")
    assert len(kept.values) == 7 and kept.row_names[-1] == "MS: neu"


@pytest.mark.parametrize(
    ("last", "shown"),
    [
        ("Summe;15;70", "line 8, 'Summe', is kept as data; remove the row"),
        ("mean;3;14\nSD;1;8\n", "line 8, line 9, 'mean', 'SD', are kept as data; remove the rows"),
        ("Grand total:;15;70", "line 8, 'Grand total:', is kept"),
        ("Totalausfall;15;70", None),
        ("Mina;15;70", None),
    ],
)
def test_rows_that_summarise_others_are_noted(read, last, shown):
    rows = "".join(f"MS-{k};{k};{k * k + 0.5}\n" for k in range(6))
    table = read("Stelle;pH;Nitrat\n" + rows + last)
    found = [note for note in table.notes if "kept as data" in note]
    assert len(table.values) == 6 + last.count(";") // 2
    assert len(found) == (shown is not None) and all(shown in note for note in found)


def test_tables_of_summaries_have_no_note_on_them(read):
    summaries = "of,value,n\nmin,1,3\nmax,5,3\nmean,2,4\nmedian,2.5,3\ntotal,9,3\n"
    mixed = "of,value,n\ntotal,1,3\na,5,3\nb,2,4\nc,2.5,3\ntotal,9,3\n"
    for text in (summaries, mixed, "total,value\n1,2.5\n2,3.5\n3,5\n"):
        assert "kept as data" not in " ".join(read(text).notes)


@pytest.mark.parametrize("suffix", [".parquet", ".feather"])
def test_rows_of_typed_tables_that_summarise_others_are_noted(suffix, tmp_path):
    frame = pd.DataFrame({"Plot": ["a", "b", "c", "Total"], "x": [1.0, 2.5, 3.0, 6.5]})
    path = tmp_path / f"x{suffix}"
    getattr(frame, f"to_{suffix[1:]}")(path)
    assert "row 4, 'Total', is kept as data" in " ".join(read_table(path).notes)


# Written by pandas, read back

BOUND = 1e150  # squares of larger numbers are not finite
FLOATS = st.floats(-BOUND, BOUND) | st.just(NAN)
SHAPES = st.tuples(st.integers(2, 6), st.integers(1, 5))


@given(
    values=arrays(np.float64, SHAPES, elements=FLOATS),
    delimiter=st.sampled_from([",", ";", "\t", "|", " "]),
    header=st.booleans(),
    index=st.sampled_from([None, "numbers", "words"]),
    marker=st.sampled_from(["", "NA", "?", "-999.5"]),
    quoting=st.sampled_from([0, 1, 2]),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_written_tables_are_read_exactly(
    tmp_path, values, delimiter, header, index, marker, quoting
):
    marker = "NA" if delimiter == " " else marker
    for line in (values[0], values[:, 0]):  # empty rows and columns would be left out
        line[np.isnan(line)] = 0
    columns = [f"c {k}" for k in range(values.shape[1])]
    rows = [f"row, {k}" for k in range(len(values))]
    frame = pd.DataFrame(values, columns=columns, index=rows if index == "words" else None)
    path = tmp_path / "x.csv"
    kept = index is not None
    frame.to_csv(path, sep=delimiter, header=header, index=kept, na_rep=marker, quoting=quoting)
    numbered = index == "numbers"
    table = read_table(
        path, delimiter=delimiter, header=header, missing=None if marker != "-999.5" else [marker]
    )
    if numbered and not header:  # such an index cannot be distinguished from data
        values = np.column_stack([np.arange(len(values)), values])
    expected = np.where(values == -999.5, np.nan, values) if marker == "-999.5" else values
    np.testing.assert_array_equal(table.values, expected)
    if header:
        assert table.columns == tuple(columns)
    names = {"words": tuple(rows), "numbers": tuple(map(str, range(len(rows))))}
    assert table.row_names == (names.get(index) if header or not numbered else None)


@given(values=arrays(np.float64, SHAPES, elements=FLOATS), kind=st.sampled_from([",", ";", "\t"]))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_detection_on_written_tables(tmp_path, values, kind):
    values[0] = np.where(np.isnan(values[0]), 0, values[0])  # a number in each column
    rows = [f"r{k}" for k in range(len(values))]
    frame = pd.DataFrame(values, columns=[f"c{k}" for k in range(values.shape[1])], index=rows)
    frame.to_csv(tmp_path / "x.csv", sep=kind)
    table = read_table(tmp_path / "x.csv")
    np.testing.assert_array_equal(table.values, values)
    assert table.columns == tuple(frame.columns) and table.row_names == tuple(rows)


# Real tables


def real(*parts):
    return read_table(Path(os.environ["PPL_VAE_DATA"]).joinpath(*parts))


given_data = pytest.mark.skipif("PPL_VAE_DATA" not in os.environ, reason="PPL_VAE_DATA is not set")


@pytest.mark.data
@given_data
def test_tobamovirus_table():
    table = real("Tobamovirus", "tobamovirus.csv")
    values = oracles.sample_spectrum(table.values)[0]
    # The two leading principal components hold 68.8 % of the variance.
    assert values[:2].sum() / values.sum() == pytest.approx(0.688, abs=5e-4)
    assert table.values.shape == (38, 18) and table.columns == tuple(f"X{k}" for k in range(1, 19))
    assert table.labels is None and table.row_names is None and table.notes == ()


@pytest.mark.data
@given_data
def test_metabolite_tables():
    complete = real("pcaMethods", "metaboliteDataComplete.csv")
    incomplete = real("pcaMethods", "metaboliteData.csv")
    assert complete.values.shape == incomplete.values.shape == (154, 52)
    assert complete.num_missing == 0 and incomplete.num_missing == 419
    for table in (complete, incomplete):
        assert table.row_names is not None and len(table.row_names) == 154
        assert table.row_names[0] == "Xylose methoxyamine (4TMS)"
        assert table.columns[:2] == ("X0h", "X0h.1") and table.labels is None
        assert_notes(table, "first column is used as row names")


@pytest.mark.data
@given_data
def test_helix_table():
    table = real("pcaMethods", "helix.csv")
    assert table.values.shape == (1000, 3) and table.columns == ("1", "2", "3")
    assert table.row_names is not None and table.row_names[:2] == ("V1", "V2")
    assert table.values[0].tolist() == [-0.021628, -1.0833, -3.1353]
    assert_notes(table, "line 1 is used as column names, although", "row names")


@pytest.mark.data
@given_data
def test_text_columns_of_a_real_file():
    with pytest.raises(ValueError, match="columns of text, 'set', 'alphabet', 'character'"):
        real("Omniglot", "characters.csv")
