"""Random small tables as people have them, written to files of several kinds."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

ROWS = (1, 2, 3, 5, 8, 15, 30, 60)
WIDTHS = (1, 2, 3, 4, 6, 9)
KINDS = ("real", "real", "real", "scaled", "whole", "single", "truth", "copy", "constant")
ODD_KINDS = ("text", "names", "empty", "dates", "almost constant", "huge")
SUFFIXES = (".csv", ".csv", ".tsv", ".parquet", ".npy")
PATTERNS = ("none", "none", "few", "many", "rows", "blocks")


@dataclass(frozen=True)
class RandomTable:
    """A table in a file, and how it is fitted.

    Attributes:
        path: the file.
        frame: its content, without rows of a text file that have no text; NaN marks a missing
            value.
        options: of ``fit``.
    """

    path: Path
    frame: pd.DataFrame
    options: list[str]


def random_table(seed: int, folder: Path) -> RandomTable:
    """The table of a seed."""
    rng = np.random.default_rng(seed)
    num_rows, width = int(rng.choice(ROWS, p=_late(ROWS))), int(rng.choice(WIDTHS))
    signal = rng.normal(size=(num_rows, 2)) @ rng.normal(size=(2, width))
    signal += rng.choice([1e-3, 0.3, 1.0]) * rng.normal(size=signal.shape)
    columns: dict[str, object] = {}
    for k in range(width):
        odd = rng.random() < 0.06
        kind = str(rng.choice(ODD_KINDS if odd else KINDS))
        name = f"{rng.choice(['v', 'größe', 'a b', 'x', '2-'])}{k}"
        columns[name] = _column(kind, signal[:, k], columns, rng)
    frame = pd.DataFrame(columns)
    if rng.random() < 0.2 and num_rows > 2:
        frame = frame.iloc[rng.integers(0, num_rows // 2 + 1, num_rows)].reset_index(drop=True)
    frame = _with_missing(frame, str(rng.choice(PATTERNS)), rng)
    suffix = str(rng.choice(SUFFIXES))
    if suffix == ".npy" and any(kind.kind not in "fiub" for kind in frame.dtypes):
        suffix = ".csv"
    path = folder / f"t{seed}{suffix}"
    if _write(frame, path, rng) == "" and width > 1:
        frame = frame[frame.notna().any(axis=1)].reset_index(drop=True)
    return RandomTable(path, frame, _options(rng))


def _late(values) -> np.ndarray:
    # Larger tables more often.
    weights = np.arange(1, len(values) + 1) ** 1.5
    return weights / weights.sum()


def _column(kind: str, values: np.ndarray, before: dict[str, object], rng) -> object:
    number = len(values)
    plain = {
        "real": lambda: values,
        "scaled": lambda: values * 10.0 ** rng.uniform(-9, 9) + 10.0 ** rng.uniform(-3, 5),
        "whole": lambda: np.round(5 * values).astype(int),
        "single": lambda: values.astype(np.float32),
        "truth": lambda: values > 0,
        "constant": lambda: np.full(number, 3.25),
        "text": lambda: rng.choice(["red", "green"], number).astype(object),
        "names": lambda: np.array([f"row {k}" for k in range(number)], dtype=object),
        "empty": lambda: np.full(number, np.nan),
        "dates": lambda: np.array([f"2024-01-{1 + k % 28:02d}" for k in range(number)], object),
        "almost constant": lambda: 1e6 + 1e-7 * values,
        "huge": lambda: values * 10.0 ** rng.uniform(100, 300),
    }
    if kind == "copy":
        numeric = [c for c in before.values() if np.asarray(c).dtype.kind in "fiu"]
        if not numeric:
            return values
        return np.asarray(numeric[-1]) * float(rng.choice([1.0, -2.0]))
    return plain[kind]()


def _with_missing(frame: pd.DataFrame, pattern: str, rng) -> pd.DataFrame:
    shape = frame.shape
    missing = np.zeros(shape, dtype=bool)
    if pattern in ("few", "many"):
        missing = rng.random(shape) < {"few": 0.1, "many": 0.6}[pattern]
    elif pattern == "rows":
        missing[rng.random(shape[0]) < 0.2] = True
    elif pattern == "blocks":
        missing[: shape[0] // 2, : shape[1] // 2] = True
    numeric = frame.columns[[kind.kind in "fiub" for kind in frame.dtypes]]
    for name in numeric:
        if (gone := missing[:, frame.columns.get_loc(name)]).any():
            frame[name] = frame[name].astype(float).mask(gone)
    return frame


def _write(frame: pd.DataFrame, path: Path, rng) -> str | None:
    # The text that marks a missing value in the file, if it is one of text.
    if path.suffix == ".npy":
        np.save(path, frame.to_numpy(dtype=float))
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        marker = str(rng.choice(["", "NA", "?"]))
        frame.to_csv(path, index=False, na_rep=marker, sep="\t" if path.suffix == ".tsv" else ",")
        return marker
    return None


def _options(rng) -> list[str]:
    found = ["--latent-dim", str(rng.choice(["1", "1", "2", "auto"]))]
    if rng.random() < 0.25:
        found += ["--model", "factor-analysis"]
    if rng.random() < 0.5:
        found += ["--held-out", "0"]
    if rng.random() < 0.3:
        found += ["--scale", str(rng.choice(["none", "standardize"]))]
    return found
