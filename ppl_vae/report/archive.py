"""The folder of a lineage's results: numbers, figures, report, draws.

All files in it are those of one run, at any moment: when the first stage of a run is finished and
the new ``results.json`` is on the disk, the page, the figures and the draws of an earlier run are
removed, and then the new file gets its name. A run that is finished writes it last.
"""

import json
from pathlib import Path
from typing import Any

from ppl_vae.core.files import atomic_file, write_atomically, write_synced
from ppl_vae.interop.arviz import lineage_to_arviz, write_netcdf
from ppl_vae.lineage.report_data import ReportData
from ppl_vae.lineage.result import Lineage
from ppl_vae.report.figures import report_figures
from ppl_vae.report.html import render_page

RESULTS, PAGE, FIGURES, DRAWS = "results.json", "report.html", "figures", "lineage.nc"


def results(lineage: Lineage, data: ReportData | None = None) -> dict[str, Any]:
    """All numbers of the table and the figures, in a form that JSON can hold."""
    return lineage.to_dict() | {"report_data": None if data is None else data.to_dict()}


def write_results(
    folder: Path, lineage: Lineage, data: ReportData | None = None, *, new_run: bool = False
) -> Path:
    """Write ``results.json`` atomically: at any moment the file is complete.

    Args:
        folder: the folder of all results.
        lineage: the results.
        data: those of the figures.
        new_run: whether the other results in the folder are of an earlier run; they are removed
            when the new file is on the disk and has not yet its name.

    Returns:
        its path.
    """
    path = folder / RESULTS
    text = json.dumps(results(lineage, data), indent=1, allow_nan=False)
    with atomic_file(path) as partial:
        write_synced(partial, text.encode() + b"\n")
        if new_run and path.exists():
            _remove_report(folder)
    return path


def read_results(path: str | Path) -> tuple[Lineage, ReportData | None]:
    """The lineage and the data of its figures, from a ``results.json`` or its folder.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if its content is not that of a lineage.
    """
    path = Path(path)
    path = path / RESULTS if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        data = content["report_data"]
        lineage = Lineage.from_dict(content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not contain results of a lineage: {error}") from error
    return lineage, None if data is None else ReportData.from_dict(data)


def _remove_report(folder: Path) -> None:
    for path in (folder / PAGE, folder / DRAWS, *(folder / FIGURES).glob("*.png")):
        path.unlink(missing_ok=True)


def write_report(folder: Path, lineage: Lineage, data: ReportData) -> list[Path]:
    """Write ``report.html``, and its figures as separate files.

    Returns:
        the path of the page and the folder of the figures.
    """
    rendered = [(figure, figure.png()) for figure in report_figures(lineage, data)]
    for figure, png in rendered:
        write_atomically(folder / FIGURES / f"{figure.name}.png", png)
    write_atomically(folder / PAGE, render_page(lineage, data, rendered).encode())
    return [folder / PAGE, folder / FIGURES]


def write_draws(folder: Path, lineage: Lineage) -> Path:
    """Write ``lineage.nc`` for ArviZ: draws of every stage and held-out log p.

    Returns:
        its path.
    """
    path = folder / DRAWS
    write_netcdf(lineage_to_arviz(lineage, seed=int(lineage.about["seed"])), path)
    return path
