"""The folder that a climbed lineage is kept in: numbers, pictures, page, draws."""

import json
from pathlib import Path
from typing import Any

from ppl_vae.core.files import write_whole
from ppl_vae.interop.arviz import lineage_to_arviz, write_netcdf
from ppl_vae.lineage.report_data import ReportData
from ppl_vae.lineage.run import Lineage
from ppl_vae.report.figures import pictures
from ppl_vae.report.html import page

RESULTS = "results.json"


def results(lineage: Lineage, shown: ReportData | None = None) -> dict[str, Any]:
    """Every number of the table and the pictures, as JSON can hold them."""
    return lineage.to_dict() | {"report_data": None if shown is None else shown.to_dict()}


def write_results(folder: Path, lineage: Lineage, shown: ReportData | None = None) -> Path:
    """Write ``results.json``; at any moment the file there is a complete one.

    Returns:
        its path.
    """
    path = folder / RESULTS
    text = json.dumps(results(lineage, shown), indent=1, allow_nan=False)
    write_whole(path, text.encode() + b"\n")
    return path


def read_results(path: str | Path) -> tuple[Lineage, ReportData | None]:
    """The table and what its pictures show, from a ``results.json`` or the folder it is in.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is another file.
    """
    path = Path(path)
    path = path / RESULTS if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        shown = content["report_data"]
        found = Lineage.from_dict(content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of a lineage: {error}") from error
    return found, None if shown is None else ReportData.from_dict(shown)


def write_report(folder: Path, lineage: Lineage, shown: ReportData) -> list[Path]:
    """Write ``report.html``, and its pictures as files of their own.

    Returns:
        the page's path and the pictures' folder.
    """
    drawn = [(picture, picture.png()) for picture in pictures(lineage, shown)]
    for picture, png in drawn:
        write_whole(folder / "pictures" / f"{picture.name}.png", png)
    write_whole(folder / "report.html", page(lineage, shown, drawn).encode())
    return [folder / "report.html", folder / "pictures"]


def write_draws(folder: Path, lineage: Lineage) -> Path:
    """Write ``lineage.nc``: draws of every stage and held-out log p, for ArviZ.

    Returns:
        its path.
    """
    path = folder / "lineage.nc"
    write_netcdf(lineage_to_arviz(lineage, seed=int(lineage.about["seed"])), path)
    return path
