"""What each command does; imported when one is run, so that ``--help`` needs no torch."""

import json
from collections.abc import Iterable
from pathlib import Path

from ppl_vae.core.files import write_whole
from ppl_vae.core.state import threads
from ppl_vae.core.validation import check_int, check_option
from ppl_vae.data.tables import Table, digits_table, read_table
from ppl_vae.data.transforms import SCALES
from ppl_vae.evaluation.marginal_likelihood.annealed import Annealing
from ppl_vae.lineage.common import select_stages
from ppl_vae.lineage.stages import STAGES
from ppl_vae.models.ppca import NOISES
from ppl_vae.report.evaluation import Evaluation
from ppl_vae.report.imputation import FilledTable, check_suffix
from ppl_vae.report.lineage_run import LineageRun, describe_table
from ppl_vae.report.terminal import print_line


def run_lineage(
    path: Path | None,
    latent_dim: int | None,
    stages: str | None,
    out: Path,
    seed: int,
    scale: str,
    as_json: bool,
    starts: int,
    *,
    header: bool | None,
    delimiter: str | None,
    label: str | None,
    missing: str | None,
    image_shape: str | None,
) -> bool:
    """``ppl-vae lineage``; whether it was finished.

    Raises:
        ValueError: arguments or data that cannot be used.
    """
    check_option("--scale", scale, SCALES)
    check_int("--starts", starts)
    shape = None if image_shape is None else _shape(image_shape)
    if path is None:
        table = digits_table()
    else:
        table = read(path, header, delimiter, label, missing, shape)
    asked = None if stages is None else [name.strip() for name in stages.split(",")]
    names = [stage.name for stage in select_stages(asked, STAGES)]
    k = latent_dim if latent_dim is not None else _default_latent_dim(table)
    return LineageRun(table, k, names, seed, scale, out, as_json, starts).run()


def impute(
    table: Table,
    source: Path,
    out: Path,
    latent_dim: int | None,
    noise: str | None,
    seed: int,
    starts: int,
    parameter_uncertainty: bool | None,
) -> None:
    """``ppl-vae impute``: fill a table read from ``source``, and write it to ``out``.

    Raises:
        ValueError: arguments or data that cannot be used.
    """
    check_int("--starts", starts)
    if noise is not None:
        check_option("noise", noise, NOISES)
    if check_suffix(out).resolve() == source.resolve():
        raise ValueError(f"--out must be another file than the table itself; got {out}")
    print_line(f"{describe_table(table)}, seed {seed}\n")
    _print_notes(table.notes)
    with threads(1):
        filled = FilledTable.of(
            table,
            latent_dim,
            noise,
            seed=seed,
            starts=starts,
            parameter_uncertainty=parameter_uncertainty,
        )
    for text in (*([str(filled.search)] if filled.search else []), *filled.sentences()):
        print_line(text)
    _print_notes(filled.notes())
    filled.write(out)
    print_line(f"wrote {out}")


def evaluate(
    model: Path,
    table: Table,
    out: Path,
    *,
    draws: int,
    refine: int,
    rows: int,
    annealed: int,
    num_temperatures: int,
    seed: int,
) -> None:
    """``ppl-vae evaluate``: evaluate a saved model on a table, and write every number to ``out``.

    Raises:
        ValueError: arguments or data that cannot be used.
    """
    check_int("rows", rows)
    check_int("annealed", annealed, 0)
    _print_notes(table.notes)
    with threads(1):
        found = Evaluation.of(
            model,
            table,
            draws=draws,
            refine=refine,
            rows=rows,
            annealed=annealed,
            annealing=Annealing(num_temperatures),
            seed=seed,
        )
    for text in found.sentences():
        print_line(text)
    write_whole(out, (json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n").encode())
    print_line(f"wrote {out}")


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print_line(f"note: {note}")


def read(
    path: Path,
    header: bool | None,
    delimiter: str | None,
    label: str | None,
    missing: str | None,
    image_shape: tuple[int, int] | None = None,
) -> Table:
    """A table by the options of the command line; ``missing`` lists markers, by commas."""
    return read_table(
        path,
        header=header,
        delimiter=delimiter,
        label=label,
        missing=None if missing is None else missing.split(","),
        image_shape=image_shape,
    )


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--image-shape must be HEIGHTxWIDTH, such as 28x28; got {text!r}")
    return int(parts[0]), int(parts[1])


def _default_latent_dim(table: Table) -> int:
    # Below the rank of the training rows, which are three quarters of all, and below half of the
    # cells that a row has.
    num_rows, width = table.values.shape
    observed = width - table.num_missing // num_rows
    return max(1, min(10, observed // 2, num_rows // 3))
