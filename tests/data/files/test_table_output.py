"""Writing tables: what must not be overwritten, formulas, and files that are whole or absent."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ppl_vae.data.files.table_output import check_output, write_frame

FRAME = pd.DataFrame({"a": [1.5, float("nan")], "b": [-2, 3]}, index=["u", "v"])


def test_a_new_file_and_standard_output_are_accepted(tmp_path):
    for name in ("x.csv", "x.TSV", "x.parquet"):
        check_output(tmp_path / name, inputs=[], force=False)
    check_output(Path("-"), inputs=[], force=False)
    check_output(tmp_path / "x.json", inputs=[], force=False, suffixes=(".json",))
    assert list(tmp_path.iterdir()) == []


def test_an_input_is_refused_by_any_name(tmp_path, monkeypatch):
    source = tmp_path / "t.csv"
    source.write_text("a\n1\n")
    (tmp_path / "sub").mkdir()
    os.link(source, tmp_path / "hard.csv")
    (tmp_path / "soft.csv").symlink_to(source)
    (tmp_path / "chain.csv").symlink_to("soft.csv")
    (tmp_path / "linked").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    names = ["t.csv", source, "sub/../t.csv", "hard.csv", "soft.csv", "chain.csv", "linked/t.csv"]
    for name in names:
        for force in (False, True):
            with pytest.raises(ValueError, match=r"is an input, .*t\.csv, which would be"):
                check_output(Path(name), inputs=[source], force=force)
    # The other way round: the input is given by the name of a link.
    with pytest.raises(ValueError, match=r"is an input"):
        check_output(source, inputs=[tmp_path / "chain.csv"], force=True)
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    check_output(tmp_path / "other.csv", inputs=[source, tmp_path / "loop.csv"], force=False)
    assert source.read_text() == "a\n1\n"


def test_a_file_in_an_input_folder_is_refused(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(model, target_is_directory=True)
    for target in (model / "config.json", tmp_path / "link" / "config.json"):
        with pytest.raises(ValueError, match="is an input"):
            check_output(target, inputs=[model], force=True, suffixes=(".json",))
    check_output(model / "new.json", inputs=[model], force=False, suffixes=(".json",))


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "null.csv").symlink_to("/dev/null")
    (tmp_path / "one.csv").symlink_to(tmp_path / "two.csv")
    (tmp_path / "two.csv").symlink_to(tmp_path / "one.csv")
    for name, message in {
        "folder.csv": "is a folder; give a file in it",
        "pipe.csv": "is a device or a pipe; - is standard output",
        "null.csv": "is a device or a pipe",
        "one.csv": "is a loop of links",
        "none/x.csv": r"there is no folder .*none for the output x\.csv",
        "x.xlsx": r"must end in \.csv or \.tsv or \.parquet; got",
        "x": "must end in",
        f"{'x' * 300}.csv": "is no file",
    }.items():
        with pytest.raises(ValueError, match=message):
            check_output(tmp_path / name, inputs=[], force=True)
    with pytest.raises(ValueError, match=r"must end in \.json"):
        check_output(tmp_path / "x.csv", inputs=[], force=True, suffixes=(".json",))


def test_a_protected_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.csv"
    path.write_text("a\n1\n")
    monkeypatch.setattr(os, "access", lambda name, mode: Path(name) != path)
    with pytest.raises(ValueError, match="exists and is protected from writing"):
        check_output(path, inputs=[], force=True)


def test_a_folder_that_cannot_be_written_to_is_refused():
    with pytest.raises(ValueError, match=r"the output /proc/x\.csv cannot be written: "):
        check_output(Path("/proc/x.csv"), inputs=[], force=True)


@pytest.mark.parametrize(
    ("name", "content", "same"),
    [
        ("x.csv", b"a,b\n1,2\n", True),
        ("x.csv", b"", True),
        ("x.csv", b"\x89PNG\r\n\x1a\n\0\0", False),
        ("x.csv", b'{"a": 1}', False),
        ("x.tsv", b"PK\3\4 a workbook", False),
        ("x.parquet", b"a,b\n1,2\n", False),
        ("x.parquet", b"PAR1...", True),
        ("x.json", b"a,b\n1,2\n", False),
        ("x.json", b'\xef\xbb\xbf {"a": 1}', True),
    ],
)
def test_an_existing_file_of_another_kind_needs_force(tmp_path, name, content, same):
    path = tmp_path / name
    path.write_bytes(content)
    suffixes = (".csv", ".tsv", ".parquet", ".json")
    check_output(path, inputs=[], force=True, suffixes=suffixes)
    if same:
        check_output(path, inputs=[], force=False, suffixes=suffixes)
    else:
        with pytest.raises(ValueError, match=r"exists, and its content is not .* --force"):
            check_output(path, inputs=[], force=False, suffixes=suffixes)
    assert path.read_bytes() == content


@pytest.mark.parametrize("separator", [",", "\t"])
def test_text_tables(tmp_path, separator):
    path = tmp_path / ("x.csv" if separator == "," else "x.tsv")
    write_frame(FRAME, path, index=True)
    lines = [["", "a", "b"], ["u", "1.5", "-2"], ["v", "", "3"]]
    assert path.read_bytes().decode() == "".join(separator.join(row) + "\n" for row in lines)
    write_frame(FRAME, path, index=False)
    assert path.read_text().splitlines()[1] == separator.join(["1.5", "-2"])


def test_numbers_are_written_exactly(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.standard_normal((50, 3)) * 10.0 ** rng.integers(-300, 300, (50, 1)))
    for name in ("x.csv", "x.tsv", "x.parquet"):
        write_frame(frame, tmp_path / name, index=False)
    for found in (
        pd.read_csv(tmp_path / "x.csv", dtype=str).astype(float),
        pd.read_csv(tmp_path / "x.tsv", sep="\t", dtype=str).astype(float),
        pd.read_parquet(tmp_path / "x.parquet"),
    ):
        np.testing.assert_array_equal(found.to_numpy(), frame.to_numpy())
        assert list(found.columns) == ["0", "1", "2"]


def test_no_text_is_run_as_a_formula(tmp_path):
    formulas = ["=1+1", "+cmd", "-cmd", "@SUM(A1)", "\t=1", "\r=1", "-", "=", "--1", "-1+2"]
    plain = ["a=1", "", "'=1", "1-2", "-1.5", "+2", "-1e5", "-.5", "text"]
    texts = formulas + plain
    frame = pd.DataFrame(
        {"=t": texts, "n": -np.arange(len(texts)), "c": pd.Categorical(texts)},
        index=pd.Index(texts, name="@id"),
    )
    original = frame.copy(deep=True)
    write_frame(frame, tmp_path / "x.csv", index=True)
    pd.testing.assert_frame_equal(frame, original)
    found = pd.read_csv(tmp_path / "x.csv", dtype=str, keep_default_na=False)
    expected = [f"'{text}" for text in formulas] + plain
    assert list(found.columns) == ["'@id", "'=t", "n", "c"]
    for name in ("'@id", "'=t", "c"):
        assert found[name].tolist() == expected
    assert found["n"].tolist() == [str(-k) for k in range(len(texts))]
    # Parquet has types, and no spreadsheet runs its texts.
    write_frame(frame, tmp_path / "x.parquet", index=True)
    found = pd.read_parquet(tmp_path / "x.parquet")
    assert found["=t"].tolist() == found["c"].tolist() == found.index.tolist() == texts


def test_dates_and_missing_texts_are_written_as_they_are(tmp_path):
    frame = pd.DataFrame({"day": pd.to_datetime(["2020-01-02", None]), "t": ["a", None]})
    write_frame(frame, tmp_path / "x.csv", index=False)
    assert (tmp_path / "x.csv").read_text() == "day,t\n2020-01-02,a\n,\n"


def test_standard_output(capsysbinary):
    write_frame(FRAME.rename(columns={"a": "α"}), Path("-"), index=True)
    assert capsysbinary.readouterr().out.decode() == ",α,b\nu,1.5,-2\nv,,3\n"


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), r"are distinct; repeated: \['a'\]"),
        (pd.DataFrame([[1, 2]], columns=["1", 1]), r"are distinct; repeated: \['1'\]"),
        (pd.DataFrame({"a": [1, "u"]}), "cannot be written as Parquet"),
    ],
)
def test_a_failure_leaves_the_old_file(tmp_path, frame, message):
    path = tmp_path / "x.parquet"
    write_frame(FRAME, path, index=True)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        write_frame(frame, path, index=False)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="must end in"):
        write_frame(frame, tmp_path / "x.txt", index=False)


FULL = """
import resource, signal, sys
from pathlib import Path
import pandas as pd
from ppl_vae.data.files.table_output import write_frame
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    write_frame(pd.DataFrame({"a": range(5000)}), Path(sys.argv[1]), index=False)
except OSError as error:
    print("refused", error.errno)
"""


@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
def test_a_full_disk_leaves_the_old_file(tmp_path, name):
    path = tmp_path / name
    path.write_text("old")
    shown = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("refused"), shown
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
