"""What ``ppl-vae lineage`` does."""

from pathlib import Path

from ppl_vae.cli.targets import check_folder
from ppl_vae.core.validation import check_int, check_option
from ppl_vae.data.table_options import TableOptions
from ppl_vae.data.tables import Table, digits_table
from ppl_vae.data.transforms import SCALES
from ppl_vae.lineage.common import select_stages
from ppl_vae.lineage.stages import STAGES
from ppl_vae.report.lineage_run import LineageRun


def run_lineage(
    path: Path | None,
    options: TableOptions,
    latent_dim: int | None,
    stages: str | None,
    out: Path,
    seed: int,
    scale: str,
    as_json: bool,
    starts: int,
) -> None:
    """Run the lineage.

    Raises:
        ValueError: arguments or data that cannot be used.
        OSError: if the folder cannot be written to.
    """
    check_option("--scale", scale, SCALES)
    check_int("--starts", starts)
    asked = None if stages is None else [name.strip() for name in stages.split(",")]
    names = [stage.name for stage in select_stages(asked, STAGES)]
    check_folder(out)
    table = digits_table() if path is None else options.read(path)
    k = latent_dim if latent_dim is not None else _default_latent_dim(table)
    LineageRun(table, k, names, seed, scale, out, as_json, starts).run()


def _default_latent_dim(table: Table) -> int:
    # Below the rank of the training rows, which are three quarters of all, and below half of the
    # cells that a row has.
    num_rows, width = table.values.shape
    observed = width - table.num_missing // num_rows
    return max(1, min(10, observed // 2, num_rows // 3))
