"""Large text tables are read at once, with the result of the reader of lines."""

import numpy as np
import pandas as pd
import pytest

from ppl_vae.data.files import regular_texts
from ppl_vae.data.files.tables import read_table


def frame(num_rows=1500, width=4, seed=0):
    rng = np.random.default_rng(seed)
    x = pd.DataFrame(rng.normal(size=(num_rows, width)), columns=[*"abcd"][:width])
    missing = rng.random(x.shape) < 0.1
    missing[:, 0] = False  # no row is empty
    return x.mask(missing)


def text(x, **options):
    return x.to_csv(index=False, **options)


def changed(number, line):
    """The text of a table in which a line is replaced."""
    lines = text(frame()).splitlines()
    lines[number] = line
    return "\n".join(lines) + "\n"


REGULAR = {
    "plain": text(frame()),
    "index": frame().to_csv(),
    "row names": frame().set_axis([f"row {k}" for k in range(1500)]).to_csv(),
    "labels": text(frame().assign(kind=["red", "green"] * 750)),
    "Windows": text(frame()).replace("\n", "\r\n"),
    "no end": text(frame()).rstrip("\n"),
    "decimal commas": text(frame(), sep=";", decimal=","),
    "tabs and markers": text(frame(), sep="\t", na_rep="NA"),
    "whole numbers": text((10 * frame().fillna(0)).round().astype(int)),
    "no header": frame().to_csv(index=False, header=False),
    "title": "All of them\n\n" + text(frame()),
    "comments above": "# a b\n# more\n" + text(frame()),
    "units": "a,b,c,d\n(m),(m),(s),(s)\n" + text(frame()).split("\n", 1)[1],
    "quoted header": '"a","b, all","c","d"\n' + text(frame()).split("\n", 1)[1],
    "truth": text(frame().assign(e=frame()["a"] > 0)),
    "mark": text(frame().fillna(-999.0)),
}
OTHERS = {
    "question marks": text(frame(), na_rep="?"),
    "comment": changed(900, "# a comment"),
    "blank line": changed(900, ""),
    "empty row": changed(900, ",,,"),
    "quotation marks": changed(900, '"1","2","3","4"'),
    "short row": changed(900, "1,2,3"),
    "long row": changed(900, "1,2,3,4,5"),
    "both": changed(900, "1,2,3").replace("\n", "\n1,2,3,4,5\n", 950),
    "short row at the end": changed(1500, "1,2,3"),
    "footer": text(frame()) + "Source: a file,,,\n",
    "footer below": text(frame()) + "\nSource: a file\n",
    "number in words": changed(900, "1,2,three,4"),
    "thousands": changed(900, "1,2 000,3,4"),
    "minus sign": changed(900, "1,−2.5,3,4"),
    "exponent D": changed(900, "1,1.5D+00,3,4"),
    "millions": text(frame(), sep=";").replace("\n0", "\n1.234.567;", 1),
    "points alone": text((frame() * 9).round(), sep=";").replace(".0", ".125"),
    "spaces": text(frame(), sep=" ", na_rep="NA"),
    "old line ends": text(frame()).replace("\n", "\r"),
    "not UTF-8": changed(900, "1,2,gr\udcf6n,4"),
    "zero byte": changed(900, "1,2,\0,4"),
    "one column": text(frame(width=1).fillna(1.5)) + "\n3.5\n",
    "infinite": changed(900, "1,2,inf,4"),
    "large": changed(900, "1,2,1e300,4"),
}


def outcome(path, **options):
    """The table of a file, or the text of the error."""
    try:
        found = read_table(path, **options)
    except ValueError as error:
        return str(error)
    return found


def assert_same(path, monkeypatch, expect_regular, **options):
    monkeypatch.setattr(regular_texts, "MIN_BYTES", 1)
    raw = path.read_bytes()
    from ppl_vae.data.files.tables import NA_MARKERS
    from ppl_vae.data.files.text_tables import TextFormat

    given = TextFormat(("", "nan", *NA_MARKERS))
    if expect_regular:
        assert regular_texts.regular_table(raw, path.name, given, ()) is not None
    at_once = outcome(path, **options)
    monkeypatch.setattr(regular_texts, "MIN_BYTES", 2**40)
    by_lines = outcome(path, **options)
    if isinstance(by_lines, str) or isinstance(at_once, str):
        assert at_once == by_lines
        return
    np.testing.assert_array_equal(at_once.values, by_lines.values)
    for name in ("columns", "row_names", "labels", "label", "notes", "has_names"):
        assert getattr(at_once, name) == getattr(by_lines, name), name


@pytest.mark.parametrize("kind", [*REGULAR, *OTHERS])
def test_both_readers_agree(kind, tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    content = {**REGULAR, **OTHERS}[kind]
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert_same(path, monkeypatch, kind in REGULAR)


def test_errors_have_the_line_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    path.write_text(changed(900, "1,2,1e300,4"))
    monkeypatch.setattr(regular_texts, "MIN_BYTES", 1)
    with pytest.raises(ValueError, match="column 'c', line 901"):
        read_table(path)


@pytest.mark.parametrize("seed", range(20))
def test_both_readers_agree_on_random_changes(seed, tmp_path, monkeypatch):
    rng = np.random.default_rng(seed)
    found = list(text(frame(600, seed=seed)).encode())
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(8000, len(found)))
        found[place] = int(rng.choice(list(b',\n;".#- x1e')))
    path = tmp_path / "t.csv"
    path.write_bytes(bytes(found))
    assert_same(path, monkeypatch, False)
