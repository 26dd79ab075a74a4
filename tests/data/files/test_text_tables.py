"""Text tables as people and programs write them: read as meant, or questioned by name."""

import bz2
import codecs
import csv
import gzip
import io
import lzma
import re
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from table_files import NAN, assert_table, write_and_read

from ppl_vae.data.files.number_format import NumberFormat
from ppl_vae.data.files.tables import read_table

COLUMN_NAMES = "used as column names, although it has numbers"
ROW_NAMES = "row names"
DATA = "line 1 is used as data"
SEMICOLON = "delimiter detected: semicolon"


@pytest.fixture
def read(tmp_path):
    """A function that writes text to a file of this name and reads it as a table."""
    return lambda text, name="x.csv", **options: write_and_read(tmp_path / name, text, **options)


# Names of columns that are numbers


@pytest.mark.parametrize(
    "header",
    [
        "Country,2019,2020,2021",
        "Land,2019,2020,2021",
        "state,1,5,3",
        ",400,402,404",
    ],
)
def test_numbers_over_row_names_are_column_names(read, header):
    names = header.split(",")[1:]
    table = read(f"{header}\nAlbania,7,2,3\nBelgium,4,6,5\n")
    expected = [[7, 2, 3], [4, 6, 5]]
    assert_table(table, expected, names, COLUMN_NAMES, ROW_NAMES, row_names=["Albania", "Belgium"])


def test_evenly_spaced_numbers_over_numbers_are_column_names(read):
    table = read("wavenumber,4000,3998.5,3997,3995.5\nu,7,2,3,8\nv,4,6,5,9\n")
    assert table.columns == ("4000", "3998.5", "3997", "3995.5") and len(table.values) == 2
    text = "400,401,402,403\n.1,.2,.15,.3\n.1,.3,.2,.15\n"
    expected = [[0.1, 0.2, 0.15, 0.3], [0.1, 0.3, 0.2, 0.15]]
    assert_table(read(text), expected, ["400", "401", "402", "403"], COLUMN_NAMES)
    assert read(text, header=False).values.shape == (3, 4)
    table = read("2019,2020\n1.5,2\n3,4\n")
    assert_table(table, [[1.5, 2], [3, 4]], ["2019", "2020"], COLUMN_NAMES)
    table = read("gene,10,20,30\nBRCA1,1.5,2.5,3.5\nTP53,4.25,5.5,6.5\n")
    assert table.columns == ("10", "20", "30")


@pytest.mark.parametrize(
    "text",
    [
        "Anna,5,3,2\nBob,1,2,3\nCarl,4,5,6\n",
        "1,2,3,4\n2,3,4,5\n3,4,5,6\n",
        "2019,2020\n2020,2021\n2021,2022\n",
        "u,1,2\nv,3,4\n",
    ],
)
def test_numbers_like_those_below_are_data(read, text):
    table = read(text)
    assert len(table.values) == text.count("\n") and DATA in table.notes[0]


# Numbers


@pytest.mark.parametrize(
    ("cells", "numbers"),
    [
        (["1.234,5", "2.000,25"], [1234.5, 2000.25]),
        (["1.234.567", "12"], [1234567, 12]),
        (["1.234.567,25", "-1.000"], [1234567.25, -1000]),
        (["1 234,5", "2"], [1234.5, 2]),
        (["1\u00a0234", "2\u202f345\u202f678.5"], [1234, 2345678.5]),
        (["1\u2009234", "2\u2007345"], [1234, 2345]),
        (["1'234.5", "1\u2019234"], [1234.5, 1234]),
        (["\u22125", "\u20131.5"], [-5, -1.5]),
        (["1.5D+00", "2.5d-1"], [1.5, 0.25]),
        (["-1.5D+02", "1e3"], [-150, 1000]),
        (["1_000", "12_345_678"], [1000, 12345678]),
        (["\u200e5", "\ufeff1 000"], [5, 1000]),
        (["\u00a05\u00a0", " 6 "], [5, 6]),
    ],
)
def test_numbers_as_people_write_them(read, cells, numbers):
    for delimiter in ";\t|":
        text = "".join(f"{cell}{delimiter}1\n" for cell in ["a", *cells])
        table = read(text, name="x.txt")
        assert table.values[:, 0].tolist() == numbers, table
        assert table.columns == ("a", "x2") or table.columns == ("a", "1")
    quoted = "".join(f'"{cell}",7\n' for cell in cells)
    assert read(f"a,b\n{quoted}").values.tolist() == [[number, 7] for number in numbers]


def test_notes_on_unusual_numbers(read):
    table = read("a;b\n1.234,5;−2\n3,5;4\n")
    notes = ["decimal commas .* 1.234,5", "'−2' are read as negative .*: 1", "thousands: 1"]
    assert_table(table, [[1234.5, -2], [3.5, 4]], "ab", SEMICOLON, *notes)
    table = read('a,b\n"1,234.5",2\n"2,000",3\n')
    notes = ["commas are read as separators of thousands, as in 1,234.5", "thousands: 2"]
    assert_table(table, [[1234.5, 2], [2000, 3]], "ab", *notes)
    assert_table(read("a,b\n1.5D+00,2\n2,3\n"), [[1.5, 2], [2, 3]], "ab", "exponent after D: 1")


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ('a,b\n"1,234",2\n"2,345",3\n', "give thousands ',' or decimal ','"),
        ("a;b\n1,234;2\n2,345;3\n", "give thousands ',' or decimal ','"),
        ("a;b\n1,5;2.5\n3,5;4.5\n", r"column 'a': 2 of 2 .* '1,5' \(line 2\)"),
        ("a;b\n1.234.567;2,5\n3;1,234.5\n", r"not numbers: .* \(line \d\)"),
        ("a,b\n1_00,2\n3,4\n5,6\n", r"'1_00' \(line 2\)"),
        ("a;b\n1 23;2\n3;4\n5;6\n", r"'1 23' \(line 2\)"),
        ("a,b\n1.5D,2\n3,4\n5,6\n", r"'1\.5D' \(line 2\)"),
        ("a,b\n0x1F,2\n3,4\n5,6\n", r"'0x1F' \(line 2\)"),
        ("a,b\n<0.1,2\n<0.1,4\n5,6\n", r"'a': 2 of 3 cells .* '<0.1' \(line 2\)"),
        ("a,b\n5 kg,2\n6 kg,4\n", r"'5 kg' \(line 2\), '6 kg' \(line 3\)"),
        ("a,b\n1,n.d.\n2,n.d.\n3,n.d.\n4,1.5\n", "give missing 'n.d.'"),
    ],
)
def test_ambiguous_numbers_are_questioned(read, text, question):
    with pytest.raises(ValueError, match=question):
        read(text)


def test_given_separators(read):
    text = 'a,b\n"1,234",2\n"2,345",3\n'
    assert read(text, thousands=",").values.tolist() == [[1234, 2], [2345, 3]]
    assert read(text, decimal=",").values.tolist() == [[1.234, 2], [2.345, 3]]
    assert read(text, decimal=".").values.tolist() == [[1234, 2], [2345, 3]]
    text = "a;b\n1.234;2\n2.345;3\n"
    assert "points are read as decimal points, as in 1.234; thousands '.'" in read(text).notes[1]
    assert not any("points" in note for note in read(f"{text}0.5;1\n").notes)
    assert read(text).values.tolist() == [[1.234, 2], [2.345, 3]]
    assert read(text, thousands=".").values.tolist() == [[1234, 2], [2345, 3]]
    assert read(text, decimal=",").values.tolist() == [[1234, 2], [2345, 3]]
    assert read("a;b\n1*234;2\n3;4\n", thousands="*").values.tolist() == [[1234, 2], [3, 4]]
    for options, message in (
        ({"decimal": ",,"}, "decimal must be one character"),
        ({"thousands": ""}, "thousands must be one character"),
        ({"thousands": "5"}, "thousands must be one character"),
        ({"decimal": ",", "thousands": ","}, "must differ; both are ','"),
    ):
        with pytest.raises(ValueError, match=message):
            read(text, **options)


LOCALES = st.sampled_from(
    [(".", ""), (",", ""), (",", "."), (".", ","), (",", " "), (".", "\u2019")]
)


def _written(value, decimal, thousands):
    whole, _, fraction = f"{abs(value):,.2f}".partition(".")
    sign = "-" if value < 0 else ""
    return sign + whole.replace(",", thousands) + decimal + fraction


@given(
    values=st.lists(
        st.lists(st.integers(-(10**9), 10**9), min_size=2, max_size=2), min_size=2, max_size=6
    ),
    locale=LOCALES,
    delimiter=st.sampled_from([";", "\t", "|", ","]),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_numbers_of_all_locales(tmp_path, values, locale, delimiter):
    hundredths = [[value / 100 for value in row] for row in values]
    lines = io.StringIO()
    writer = csv.writer(lines, delimiter=delimiter)
    writer.writerow(["a", "b"])
    writer.writerows([_written(value, *locale) for value in row] for row in hundredths)
    found = write_and_read(tmp_path / "x.csv", lines.getvalue(), delimiter=delimiter)
    assert found.values.tolist() == hundredths
    named = write_and_read(
        tmp_path / "x.csv",
        lines.getvalue(),
        delimiter=delimiter,
        decimal=locale[0],
        thousands=locale[1] or None,
    )
    assert named.values.tolist() == hundredths


@given(st.text("0123456789.,+-eEdD '_", max_size=12))
def test_what_is_a_number_by_the_plain_format(cell):
    number_format = NumberFormat(thousands=":")
    try:
        expected = float(cell.strip().lower().replace("d", "e")) if "_" not in cell else None
    except ValueError:
        expected = None
    assert number_format.is_number(cell) == (expected is not None)


# Markers of missing values, truth values


def test_errors_of_spreadsheets_are_missing(read):
    table = read("a,b,c\n1,#N/A,3\n#DIV/0!,2,3\n#N/A,5,6\n")
    notes = ["'#DIV/0!' are read as missing values: 1", "'#N/A' are read as missing values: 2"]
    expected = [[1, NAN, 3], [NAN, 2, 3], [NAN, 5, 6]]
    assert_table(table, expected, "abc", *notes)
    # A first column that is mostly errors, or mostly numbers, holds no row names and no labels.
    rows = "".join(f"#VALUE!,{k * k},{k}\n" for k in range(9))
    table = read(f"a,b,c\n{rows}7.5,3,1\n")
    assert table.columns == ("a", "b", "c") and table.values[9, 0] == 7.5
    assert np.isnan(table.values[:9, 0]).all()
    table = read("#N/A,1,2\n3,4,5\n")
    assert_table(table, [[NAN, 1, 2], [3, 4, 5]], ["x1", "x2", "x3"], DATA, "'#N/A' are read")
    assert read("a,b\n1,#REF!\n2,3\n", missing="-9").num_missing == 1


def test_columns_that_are_mostly_numbers_are_data(read):
    for text in (
        ",a,b\n1.5,2,3\nn.d.,5,6\n2.5,1,1\n",
        "id,a,b\n1 000,2,3\n5,5,6\n6,1,x\n",
        "a,b\n1 %,2\n2 %,3\n2 %,4\n",
    ):
        with pytest.raises(ValueError, match=r"column '\w+': \d of 3 cells are not numbers"):
            read(text)
    numbers = "".join(f"{25 + k},{k * k % 7}\n" for k in range(80))
    table = read(f"target,b\n{numbers}")
    assert_table(table, table.values, ["target", "b"], "'target' is kept as data; label makes")


def test_truth_values_are_numbers(read):
    table = read("a,flag\n1,TRUE\n2,FALSE\n3,\n")
    assert_table(table, [[1, 1], [2, 0], [3, NAN]], ["a", "flag"], "TRUE and FALSE .* in 'flag'")
    table = read("f,g\ntrue,False\nfalse,False\ntrue,True\n")
    assert_table(table, [[1, 0], [0, 0], [1, 1]], "fg", "in 'f', 'g'")
    table = read("a,flag,kind\n1,TRUE,u\n2,FALSE,v\n3,TRUE,u\n")
    assert table.labels == ("u", "v", "u") and table.columns == ("a", "flag")
    assert read("a,flag\n1,TRUE\n2,FALSE\n", label="flag").labels == ("TRUE", "FALSE")
    with pytest.raises(ValueError, match=r"column 'flag': 1 of 3 .* 'TRUE' \(line 2\)"):
        read("a,flag\n1,TRUE\n2,0\n3,1\n")


# Lines that are not rows


def test_the_line_that_states_the_delimiter(read):
    for text in ("sep=;\na;b\n1;2\n3;4\n", "\ufeffSEP=;\r\na;b\r\n1;2\r\n3;4\r\n"):
        assert_table(read(text), [[1, 2], [3, 4]], "ab", "line 1 gives the delimiter")
    assert read("sep=\t\na\tb\n1\t2\n3\t4\n").columns == ("a", "b")
    assert read('"sep=|"\na|b\n1|2\n3|4\n').columns == ("a", "b")


@pytest.mark.parametrize(
    "above",
    [
        "Report of 2020\n",
        "Report of 2020\n\n",
        "Report,,\n",
        '"A title, with commas"\nby me\n',
        "Instrument,XYZ\nOperator,me\n\n",
        "Last updated,2020-01-01\n\n",
    ],
)
def test_titles_are_left_out(read, above):
    table = read(f"{above}a,b,c\n1,2,3\n4,5,6\n")
    assert table.columns == ("a", "b", "c") and table.values.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert any("line" in n and "above the table left out" in n for n in table.notes)


def test_titles_over_two_columns_are_no_names(read):
    for text, columns in (
        ("A title\nname,2001\nr,2\ns,5\n", ("2001",)),
        ("A title\n\n2000,2001\n5,2\n7,5\n", ("2000", "2001")),
        ("A title\na,b\n1,2\n3,4\n", ("a", "b")),
        ("value\nr,2\ns,4\n", ("value",)),
    ):
        table = read(text)
        assert table.columns == columns and len(table.values) == 2, text


@pytest.mark.parametrize(
    "below",
    [
        "\nSource: World Bank, 2020\n",
        "Source: a bank\n",
        "* p < 0.05\n",
        "Note: mine,,\n",
        "\nTwo words, and more\n",
        "# the end\n",
        "# the end, at last\n",
    ],
)
def test_footers_are_left_out(read, below):
    table = read(f"a,b,c\n1,2,3\n4,5,6\n{below}")
    assert table.values.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert any("left out" in note and "line" in note for note in table.notes)


def test_units_are_left_out(read):
    table = read("t,mass,x\ns,kg,m\n1,2,3\n4,5,6\n")
    assert_table(
        table, [[1, 2, 3], [4, 5, 6]], ["t", "mass", "x"], "line 2 left out: .*'s, kg, m'"
    )
    table = read("name,mass,x\n,kg,m\nu,2,3\nv,5,6\n")
    assert_table(table, [[2, 3], [5, 6]], ["mass", "x"], "line 2", ROW_NAMES, row_names="uv")
    assert read("t\n[s]\n1\n2\n").values.tolist() == [[1], [2]]
    with pytest.raises(ValueError, match=r"'s' \(line 2\)"):
        read("t\ns\n1\n2\n3\n")


def test_comments_between_rows_are_left_out(read):
    table = read("a,b\n1,2\n# half way\n3,4\n")
    assert_table(table, [[1, 2], [3, 4]], "ab", "comments are left out: line 3")
    with pytest.raises(ValueError, match=r"'#1' \(line 3\)"):
        read("a,b\n1,2\n#1,7\n3,4\n4,5\n")
    table = read("% one\na,b\n% two, 3\n1,2\n%3,4\n5,6\n", comment="%")
    assert_table(table, [[1, 2], [5, 6]], "ab", "comments are left out: lines 1, 3, 5")
    assert read("//x\na,b\n1,2\n//y,9\n3,4\n", comment="//").values.shape == (2, 2)
    with pytest.raises(ValueError, match="comment must be a text"):
        read("a\n1\n", comment=" ")


def test_skipped_lines(read):
    text = "7 lines of, text\n1,2,3,4\na,b\n1,2\nx,4\n5,6\n7,8\n"
    with pytest.raises(ValueError, match=r"column 'a': 1 of 4 .*: 'x' \(line 5\)"):
        read(text, skip_rows=2)
    assert read(text.replace("x", "3"), skip_rows=2).columns == ("a", "b")
    for wrong in (-1, 1.5, True):
        with pytest.raises((ValueError, TypeError), match="skip_rows"):
            read(text, skip_rows=wrong)
    with pytest.raises(ValueError, match="is empty"):
        read(text, skip_rows=99)


def test_delimiters_at_the_ends_of_lines(read):
    for text in ("a,b,\n1,2,\n3,4,\n", "a,b\n1,2,\n3,4,\n"):
        assert_table(read(text), [[1, 2], [3, 4]], "ab", "columns without any value .*: 'x3'")
    table = read("a,b\n1,2,,\n3,4\n5,6\n")
    assert_table(table, [[1, 2], [3, 4], [5, 6]], "ab", "after the last column .*: line 2$")
    table = read("a,b,c\n1,,3\n,,\n4,,5\n,,\n")
    assert_table(table, [[1, 3], [4, 5]], "ac", "rows .* out: lines 3, 5$", "columns .* 'b'$")
    many = "a,b\n" + "1,2\n,\n" * 8
    assert_table(read(many), [[1, 2]] * 8, "ab", "lines 3, 5, 7, 9, 11 and 3 others")


# Encodings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_unicode_encodings(tmp_path, encoding, newline):
    text = newline.join(["größe,β", "1.5,2", "3,4", ""])
    table = write_and_read(tmp_path / "x.csv", text, written_as=encoding)
    assert table.values.tolist() == [[1.5, 2], [3, 4]] and table.columns == ("größe", "β")
    marked = encoding in ("utf-8-sig", "utf-16", "utf-32")
    assert marked or f"encoding detected: {encoding}" in table.notes[0]


@pytest.mark.parametrize("encoding", ["utf-32-le", "utf-32-be"])
def test_utf_32(tmp_path, encoding):
    for mark in ("", "\ufeff"):
        table = write_and_read(tmp_path / "x.csv", f"{mark}ä,b\n1,2\n3,4\n", written_as=encoding)
        assert table.columns == ("ä", "b") and table.values.tolist() == [[1, 2], [3, 4]]


def test_given_encodings(read):
    for encoding in ("cp1252", "latin-1", "cp437", "mac-roman", "utf-8", "cp037"):
        table = read("größe,b\n1,2\n3,4\n".encode(encoding), encoding=encoding)
        assert table.columns == ("größe", "b") and table.notes == ()
    text = "größe,b\n1,2\n3,4\n".encode("cp1252")
    for wrong in ("base64", "nonsense", "rot13", ""):
        with pytest.raises(ValueError, match="encoding must be the name of an encoding of text"):
            read(text, encoding=wrong)
    with pytest.raises(ValueError, match=r"is not UTF-8: byte 0xf6 in line 1; .* 'größe,b'"):
        read(text)
    with pytest.raises(ValueError, match="is not ASCII: byte 0xf6 in line 1"):
        read(text, encoding="ascii")


# Columns


def test_chosen_and_dropped_columns(read):
    text = "name,a,b,kind,c\nu,1,2,x,3\nv,4,5,y,6\nw,7,8,x,9\n"
    table = read(text, columns=["c", "a"], label="kind")
    assert_table(table, [[3, 1], [6, 4], [9, 7]], "ca", ROW_NAMES, row_names="uvw", labels="xyx")
    table = read(text, drop=["name", "kind"])
    assert_table(table, [[1, 2, 3], [4, 5, 6], [7, 8, 9]], "abc")
    table = read(text, index="kind", drop=["name"])
    assert table.row_names == ("x", "y", "x") and table.columns == ("a", "b", "c")
    table = read(text, index="a", columns=["b"])
    assert_table(table, [[2], [5], [8]], "b", row_names="147")
    table = read("1,2,3\n4,5,6\n", drop=["2"], columns=["3"])
    assert table.columns == ("x3",) and table.values.tolist() == [[3], [6]]
    assert read("id,a\n001,2\n002,3\n", index="id").row_names == ("001", "002")
    assert read("id,a\nu,2\nv,3\n", index="none", drop=["id"]).row_names is None
    for options, message in (
        ({"columns": ["aa"]}, r"no column 'aa'; it has .*; did you mean 'a'\?"),
        ({"drop": ["z"]}, "no column 'z'"),
        ({"index": "z"}, "no column 'z'"),
        ({"columns": ["a", "a"]}, "columns must be distinct names"),
        ({"columns": []}, "columns must be distinct names, at least one"),
        ({"columns": ["a"], "drop": ["a"]}, "cannot be used as well: 'a'"),
        ({"label": "kind", "drop": ["kind"]}, "cannot be used as well: 'kind'"),
    ):
        with pytest.raises(ValueError, match=message):
            read(text, **options)
    with pytest.raises(TypeError, match="must be lists of names"):
        read(text, drop="name")


def test_text_columns_are_listed_with_what_to_do(read):
    text = "Id,Name,Sex,Ticket,Age\n1,A,m,A/5,3\n2,B,f,12,4\n3,C,m,13,5\n"
    with pytest.raises(ValueError) as caught:
        read(text)
    message = str(caught.value)
    assert "columns of text, 'Name', 'Sex': choose one as label" in message
    assert "column 'Ticket': 1 of 3 cells" in message
    table = read(text, label="Sex", index="Name", drop=["Ticket", "Id"])
    assert_table(table, [[3], [4], [5]], ["Age"], row_names="ABC", labels="mfm")


def test_identifiers_and_times_are_noted(read):
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((12, 2)).round(3)

    def table(name, cells):
        lines = [f"{cell},{a},{b}" for cell, (a, b) in zip(cells, noise.tolist(), strict=True)]
        return read("\n".join([f"{name},a,b", *lines]))

    for name, cells, note in (
        ("user_id", rng.permutation(900)[:12], "like identifiers"),
        ("PassengerId", range(5, 17), "like identifiers"),
        ("k", range(1, 13), "the numbers of the rows"),
        ("t", range(1600000000, 1600000720, 60), r"seconds since 1970 \(2020-09-13 to 2020"),
        ("t", range(1600000000000, 1600000720000, 60000), "milliseconds since 1970"),
        ("day", range(20200101, 20200113), "like dates"),
        ("account", range(10**17, 10**17 + 24, 2), "16 digits or more"),
    ):
        found = table(name, cells)
        assert found.columns == (name, "a", "b")
        assert re.search(f"'{name}': .*{note}.*drop leaves a column out", found.notes[0])
    assert table("k", rng.permutation(900)[:12]).notes == ()
    assert table("age", [20 + k % 5 for k in range(12)]).notes == ()
    with pytest.raises(ValueError, match=r"of text, 'day' \(of dates: 'day'\).*as index"):
        read("a,day\n1,2020-01-01\n2,2020-01-01\n")


@pytest.mark.parametrize(
    "mark", ["-999", "1e20", "-9999", "9999", "-99.99", "9.96921e+36", "1000"]
)
def test_values_that_repeat_far_from_the_rest_are_noted(read, mark):
    rng = np.random.default_rng(1)
    values = rng.uniform(0, 100 if mark != "1000" else 10, (30, 2)).round(2)
    cells = [[str(v) for v in row] for row in values.tolist()]
    for k in (4, 9, 20):
        cells[k][1] = mark
    text = "a,b\n" + "".join(",".join(row) + "\n" for row in cells)
    table = read(text)
    (note,) = table.notes
    written = repr(float(mark)).removesuffix(".0")
    assert f"{written} occurs 3 times in 'b', first in line 6, far from" in note
    assert f"give missing '{written}'" in note
    marked = read(text, missing=[written])
    assert marked.num_missing == 3 and marked.notes == ()


def test_ordinary_values_are_not_noted(read):
    rng = np.random.default_rng(2)
    columns = {
        "gauss": rng.standard_normal(200),
        "counts": rng.poisson(0.3, 200),
        "heavy": rng.standard_cauchy(200),
        "wages": np.exp(2 * rng.standard_normal(200)).round(2),
        "binary": rng.integers(0, 2, 200),
        "percent": rng.integers(0, 101, 200),
    }
    rows = zip(*columns.values(), strict=True)
    table = read("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]))
    assert table.notes == ()


@pytest.mark.parametrize("value", ["1e160", "-1e300", "1e200"])
def test_values_whose_squares_are_not_finite_raise(read, value):
    with pytest.raises(ValueError, match=r"1 entry beyond 1e\+150 .* column 'b', line 3; rescale"):
        read(f"a,b\n1,2\n3,{value}\n5,6\n")
    assert read(f"a,b\n1,2\n3,{value}\n5,6\n", missing=[value]).num_missing == 1


def test_wide_rows(read):
    row = ",".join(["1.5"] * 10_000)
    with pytest.raises(ValueError, match=r"single row, of 10000 numbers; .* one number per line"):
        read(f"{row}\n")
    table = read("1.5,2,3\n", header=False)
    assert_table(table, [[1.5, 2, 3]], ["x1", "x2", "x3"], "single row, to which no model")
    assert read("a,b\n1,2\n").values.tolist() == [[1, 2]]
    with pytest.raises(ValueError, match=r"line 3 has 10000 cell\(s\) where 2 are expected"):
        read(f"a,b\n1,2\n{row}\n3,4\n5,6\n")
    names = ",".join(f"g{k}" for k in range(1000))
    row = ",".join(["1.5"] * 1000)
    assert read(f"{names}\n{row}\n{row}\n").values.shape == (2, 1000)


def test_messages_on_texts_can_be_followed(read):
    """What a message recommends is enough to read the table."""
    rng = np.random.default_rng(0)
    rows = [
        f"{k},{name} {k},{'mf'[k % 2]},{['', 'PC '][k % 3 == 0]}{100 + 7 * k},{rng.normal():.2f}"
        for k, name in enumerate(["Ann", "Bob", "Eve"] * 20)
    ]
    text = "\n".join(["Id,Name,Sex,Ticket,Age", *rows]) + "\n"
    with pytest.raises(ValueError, match=r"'Ticket': 20 of 60 cells .* drop the column") as caught:
        read(text)
    dropped = re.search(r"on the command line: --drop (.*)", str(caught.value)).group(1)
    assert dropped == "Name,Sex,Ticket"
    assert read(text, drop=dropped.split(",")).columns == ("Id", "Age")
    with pytest.raises(ValueError, match=r"'Ticket': 20 of 60 cells .*--drop Name,Sex,Ticket$"):
        read(text, drop=["Name", "Sex"])


def test_remarks_on_some_rows_are_no_labels(read):
    text = "a,b,remark\n" + "".join(
        f"{k}.5,{k % 7},{'new sensor' if k % 9 == 0 else ''}\n" for k in range(30)
    )
    with pytest.raises(ValueError, match=r"columns of text, 'remark'.*--drop remark"):
        read(text)
    assert read(text, drop=["remark"]).columns == ("a", "b")


def test_given_markers_replace_the_usual_ones_and_the_message_states_it(read):
    text = "a,b\n" + "".join(f"{k}.25,{[k + 0.5, 'NA', -999][k % 3]}\n" for k in range(30))
    (note,) = read(text).notes
    assert "give missing '-999' (on the command line --missing -999)" in note
    with pytest.raises(ValueError, match=r"replace the usual ones: .*--missing -999,NA$"):
        read(text, missing=["-999"])
    assert read(text, missing=["-999", "NA"]).num_missing == 20


def test_files_that_are_not_as_their_names(tmp_path):
    text = b"a,b\n" + b"".join(b"%d.5,%d\n" % (k, k % 7) for k in range(12))
    (tmp_path / "twice.csv").write_bytes(codecs.BOM_UTF8 * 2 + text)
    assert read_table(tmp_path / "twice.csv").columns == ("a", "b")
    for module, suffix in ((gzip, "gz"), (bz2, "bz2"), (lzma, "xz")):
        path = tmp_path / f"{suffix}.csv"
        path.write_bytes(module.compress(text))
        with pytest.raises(ValueError, match=rf"is compressed, .* ends in \.csv\.{suffix}"):
            read_table(path)
        assert len(read_table(path.rename(f"{path}.{suffix}")).values) == 12


@pytest.mark.parametrize("cell", ["x", "a.", "http://a/", '""'])
def test_long_cells(tmp_path, cell):
    """A long cell takes no time that is quadratic in its length."""
    path = tmp_path / "long.csv"
    for length in (100_000, 200_000):
        long = cell * (length // len(cell))
        long = f'"{long}"' if '"' in cell else long
        rows = [f"{long if k == 1 else f'u{k}'},{k}.5,{k % 7}" for k in range(12)]
        path.write_text("name,a,b\n" + "\n".join(rows) + "\n")
        if length > csv.field_size_limit() and cell != '""':
            message = "a cell in line 3 has more than 131,072 characters"
            with pytest.raises(ValueError, match=message):
                read_table(path)
        else:
            start = time.process_time()
            assert read_table(path).values.shape == (12, 2)
            assert time.process_time() - start < 5
