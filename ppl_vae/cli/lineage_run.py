"""What ``ppl-vae lineage`` does."""

from pathlib import Path

import typer

from ppl_vae.cli.options import LineageFlags
from ppl_vae.cli.targets import check_folder
from ppl_vae.core.validation import check_int, check_option
from ppl_vae.data.files.table_options import TableOptions
from ppl_vae.data.files.tables import Table, digits_table
from ppl_vae.data.units import SCALES
from ppl_vae.lineage.names import STAGE_NAMES


def write_lineage(
    path: Path | None,
    options: TableOptions,
    settings: LineageFlags,
    out: Path,
    *,
    as_json: bool,
) -> None:
    """Run the lineage.

    Args:
        path: the table; None is handwritten digits.
        options: how it is read.
        settings: K, stages, seed, scaling and starts.
        out: the folder of the results.
        as_json: whether standard output has the content of results.json only.

    Raises:
        ValueError: arguments or data that cannot be used.
        OSError: if the folder cannot be written to.
    """
    check_option("--scale", settings.scale, SCALES)
    check_int("--starts", settings.starts)
    stages = settings.stages
    asked = None if stages is None else [name.strip() for name in stages.split(",")]
    for name in asked or ():
        check_option("stages", name, STAGE_NAMES)
    check_folder(out)
    table = digits_table() if path is None else options.read(path)
    table.check_several_columns()
    k = _default_latent_dim(table) if settings.latent_dim is None else settings.latent_dim
    if not as_json:
        typer.echo(f"{table.description}; K = {k}, seed {settings.seed}\n")
        for note in table.notes:
            typer.echo(f"note: {note}")
    # After the first lines, since importing all models, plots and formats takes seconds.
    from ppl_vae.cli.lineage_command import LineageRun
    from ppl_vae.lineage.stage import select_stages
    from ppl_vae.lineage.stages import STAGES

    names = [stage.name for stage in select_stages(asked, STAGES)]
    LineageRun(table, k, names, settings=settings, out=out, as_json=as_json).run()


def _default_latent_dim(table: Table) -> int:
    # Below the rank of the training rows, which are three quarters of all, and below half of the
    # cells that a row has.
    num_rows, width = table.values.shape
    observed = width - table.num_missing // num_rows
    return max(1, min(10, observed // 2, num_rows // 3))
