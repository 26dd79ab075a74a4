"""Tables of commands: advice that can be followed, and the options that hold for later tables."""

import re
import shlex

import numpy as np
import pandas as pd
import pytest

from commands import failing, frame, read, run
from ppl_vae.cli.options import TableFlags
from ppl_vae.core.text import as_row, listed

RNG = np.random.default_rng(0)
N = 40
NUMBERS = RNG.normal(size=(N, 2)).round(3)


def passengers(num_rows):
    """A table like that of the passengers of the Titanic."""
    numbers = [f"{prefix} {7 * k + 100}".strip() for k, prefix in _prefixes(num_rows)]
    return pd.DataFrame(
        {
            "Id": range(1, num_rows + 1),
            "Name": [f"Moran, Mr. J {k}" for k in range(num_rows)],
            "Sex": ["male", "female"] * (num_rows // 2),
            "Age": [20 + k % 30 for k in range(num_rows)],
            "Ticket": numbers,
            "Fare": [7.25 + k % 7 for k in range(num_rows)],
        }
    )


def _prefixes(num_rows):
    return [(k, ["", "", "", "A/5", "PC"][k % 5]) for k in range(num_rows)]


def with_texts(**columns):
    return pd.DataFrame({"a": NUMBERS[:, 0], "b": NUMBERS[:, 1], **columns})


def some(word, step, share=NUMBERS[:, 0]):
    return [word if k % step == 0 else str(value) for k, value in enumerate(share)]


TABLES = {
    "like Titanic": (passengers(N), ["Id", "Age", "Fare"]),
    "like Titanic, few rows": (passengers(10), ["Id", "Age", "Fare"]),
    "like Titanic, tiny": (passengers(4), ["Id", "Age", "Fare"]),
    "commas in names": (
        with_texts(**{"note, free": [f"n{k}" for k in range(N)], 'the "x"': some("R2D2", 3)}),
        ["a", "b"],
    ),
    "two markers": (
        with_texts(c=some("bdl", 7), d=some("n.d.", 9), e=some("NA", 5)),
        ["a", "b", "c", "d", "e"],
    ),
    "a marker and texts": (
        with_texts(c=some("bdl", 7), name=[f"n{k}" for k in range(N)], s=["u", "v"] * (N // 2)),
        ["a", "b", "c"],
    ),
    "a typing error": (with_texts(c=["1.2.3", *map(str, NUMBERS[1:, 0])]), ["a", "b", "c"]),
    "many texts": (
        with_texts(**{f"t{k}": [f"{k}n{i}" for i in range(N)] for k in range(30)}),
        ["a", "b"],
    ),
}


def options_of(message):
    """The options that a message gives for the command line."""
    return shlex.split(re.search("on the command line: (.*)", message).group(1))


def parsed(arguments):
    """The options as the command line reads them."""
    names = [name.removeprefix("--") for name in arguments[::2]]
    return TableFlags(**dict(zip(names, arguments[1::2], strict=True))).options()


@pytest.mark.parametrize("kind", TABLES)
def test_the_options_in_a_message_are_enough_to_read_the_table(kind, tmp_path):
    table, expected = TABLES[kind]
    table.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(ValueError) as caught:
        TableFlags().options().read(tmp_path / "t.csv")
    found = parsed(options_of(str(caught.value))).read(tmp_path / "t.csv")
    assert list(found.columns) == expected
    assert int(np.isfinite(found.values[:, :2]).sum()) == 2 * len(table)


def test_options_that_were_given_are_among_those_of_the_message(tmp_path):
    passengers(N).to_csv(tmp_path / "t.csv", index=False)
    for flags, kept in (
        (TableFlags(drop="Id"), ["Age", "Fare"]),
        (TableFlags(columns="Fare,Ticket,Age"), ["Fare", "Age"]),
    ):
        with pytest.raises(ValueError) as caught:
            flags.options().read(tmp_path / "t.csv")
        found = parsed(options_of(str(caught.value))).read(tmp_path / "t.csv")
        assert list(found.columns) == kept


def test_commas_of_unknown_meaning_are_asked_about_beside_texts(tmp_path):
    table = with_texts(c=["1,234"] * N, name=[f"n{k}" for k in range(N)])
    table.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(ValueError, match="--drop name --thousands , "):
        TableFlags().options().read(tmp_path / "t.csv")


def test_lists_are_rows_of_csv():
    for parts in (["a"], ["a", "b, c", 'd "e"'], [], ["-999", "NA"]):
        assert listed(as_row(parts)) == parts
    assert listed("a, b ,c") == ["a", "b", "c"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_row_names_that_are_numbers_stay_row_names(suffix, tmp_path):
    """Tables that a model wrote are read as the fitted one, whatever else was left out of it."""
    table = frame().assign(remark=[f"n{k}" for k in range(60)], plot=range(100, 160))
    table.to_csv(tmp_path / "t.csv", index=False)
    options = ["--index", "plot", "--drop", "remark", "--label", "kind", "--latent-dim", 2]
    model, filled = tmp_path / "m", tmp_path / f"filled.{suffix}"
    run("fit", tmp_path / "t.csv", "--out", model, *options)
    run("impute", model, tmp_path / "t.csv", "--out", filled)
    found = read(run("score", model, filled))
    assert found.columns[0] == "plot" and found["plot"].tolist() == list(range(100, 160))
    assert np.isfinite(found["log_p"]).all()


def test_the_column_of_row_names_of_a_fit_is_one_of_later_tables(folder, tmp_path):
    table = frame().drop(columns="kind")
    table.rename(index="r{}".format).rename_axis("plot").to_csv(tmp_path / "t.csv")
    run("fit", tmp_path / "t.csv", "--out", tmp_path / "m", "--latent-dim", 2)
    table.rename_axis("plot").to_csv(tmp_path / "numbered.csv")
    found = run("score", tmp_path / "m", tmp_path / "numbered.csv")
    assert "numbered.csv is read with --index plot, as" in found.stderr
    assert read(found)["plot"].tolist() == list(range(60))
    other = read(run("score", tmp_path / "m", tmp_path / "numbered.csv", "--index", "none"))
    assert "plot" not in other


def test_columns_of_text_that_a_model_does_not_have_are_left_out(folder, tmp_path):
    table = frame().assign(remark=[f"n{k}" for k in range(60)])
    table.to_csv(tmp_path / "t.csv", index=False)
    found = run("score", folder / "ppca", tmp_path / "t.csv")
    assert "columns that the model does not have are left out: 'kind', 'remark'" in found.stderr
    expected = read(run("score", folder / "ppca", folder / "mine.csv"))
    pd.testing.assert_frame_equal(read(found), expected)


def test_markers_of_a_fit_are_not_dropped_in_silence(tmp_path, monkeypatch, capsys):
    marked = frame().drop(columns="kind").fillna(-999.0)
    marked.to_csv(tmp_path / "t.csv", index=False)
    options = ["--missing", "-999", "--latent-dim", 2, "--out", tmp_path / "m"]
    run("fit", tmp_path / "t.csv", *options)
    marked.astype(object).replace(-999.0, "NA").to_csv(tmp_path / "other.csv", index=False)
    error = failing(monkeypatch, capsys, "score", tmp_path / "m", tmp_path / "other.csv")
    assert error.endswith("on the command line: --missing -999,NA")


def test_what_cannot_be_read_is_found_before_a_stage_begins(folder, tmp_path, monkeypatch, capsys):
    for verb in (["report"], ["impute", folder / "mine.csv"]):
        arguments = [verb[0], tmp_path / "none", *verb[1:]]
        out = tmp_path / ("p.html" if verb[0] == "report" else "p.csv")
        monkeypatch.setattr("sys.argv", ["ppl-vae", *map(str, [*arguments, "--out", out])])
        error = failing(monkeypatch, capsys, *arguments, "--out", out)
        assert "none" in error
    assert capsys.readouterr().err == ""


def test_usage_lines_have_the_arguments_in_capitals():
    usage = {
        "score": "MODEL TABLE",
        "fit": "[TABLE]",
        "report": "SOURCE [TABLE]",
        "impute": "[MODEL] TABLE",
        "compare": "MODEL MODEL... TABLE",
    }
    for verb, arguments in usage.items():
        first = run(verb, "--help").stdout.splitlines()[0]
        assert first.endswith(f" {verb} [OPTIONS] {arguments}")
