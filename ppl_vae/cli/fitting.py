"""What ``ppl-vae fit`` does."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ppl_vae.cli.console import LOG, StageDisplay, log_notes
from ppl_vae.cli.options import TableFlags
from ppl_vae.cli.output import write_json
from ppl_vae.cli.reading import read_file
from ppl_vae.cli.targets import check_model_folder
from ppl_vae.cli.torchrun import was_restarted
from ppl_vae.core.files import write_atomically
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.data.files.tables import Table
from ppl_vae.fitted.fit import fit_table
from ppl_vae.fitted.folder import (
    CHECKPOINT,
    RUN,
    UNFINISHED,
    complete_folder,
    save_fitted,
)
from ppl_vae.fitted.metadata import digest_table
from ppl_vae.fitted.model import FittedModel
from ppl_vae.fitted.settings import FitSettings, Run
from ppl_vae.report.terminal import print_line

EXTENDABLE = ("epochs", "device", "threads")
"""Settings that may change where a fit goes on."""


def fit_and_save(
    table: Path | None,
    out: Path,
    settings: dict[str, Any],
    options: dict[str, Any],
    *,
    config: Path | None,
    resume: bool,
    as_json: bool,
    force: bool,
) -> None:
    """Fit a model to a table, and write its folder.

    Args:
        table: the file; None for that of the configuration.
        out: the folder.
        settings, options: what was given, as in ``run.toml``.
        config: a configuration whose settings and options hold unless given.
        resume: whether to go on with the interrupted fit in the folder.
        as_json: whether the findings are written as JSON.
        force: whether to write into a folder that holds something else than a model.

    Raises:
        ValueError: if arguments or data cannot be used.
        OSError: if the folder cannot be written to.
    """
    resume = resume or (was_restarted() and (out / UNFINISHED).exists())
    base, source = _base(out, None if resume and was_restarted() else config, resume)
    if resume:
        _check_unchanged(base, settings, options, source)
    run = Run(
        table=str(table.resolve()) if table is not None else base.table,
        options=base.options | options,
        settings=base.settings | settings,
        digest=base.digest if resume else None,
    )
    if run.table is None:
        raise ValueError(f"give a table to fit, or a --config that names one; {source} does not")
    chosen = FitSettings.from_plain(run.settings, str(source))
    path, run = Path(run.table), replace(run, settings=chosen.to_plain())
    check_model_folder(out, force=force)
    data = read_file(TableFlags.from_given(run.options, source), path)
    run = _with_digest(run, data)
    print_or_log = LOG.info if as_json else print_line
    print_or_log(f"{data.description}; {chosen.model}, seed {chosen.seed}")
    log_notes(data.notes)
    fitted = _fit(data, chosen, out, run, resume=resume)
    assert fitted.metadata is not None
    log_notes(fitted.metadata.notes)
    if as_json:
        write_json(_summary(fitted, out))
        return
    print_line(str(fitted.metadata.history).splitlines()[0])
    print_line(str(fitted.metadata.held_out or "no rows were held out"))
    print_line(f"wrote {out} (ppl-vae score {out} TABLE, ppl-vae report {out})")


def _base(out: Path, config: Path | None, resume: bool) -> tuple[Run, Path]:
    # The configuration whose settings hold unless given, and its file.
    if resume and config is not None:
        raise ValueError("give --config or --resume, not both")
    if config is not None:
        return replace(Run.read(config), digest=None), config
    if not resume:
        return Run(None, {}, {}), Path("the command line")
    for path in (out / UNFINISHED, out / RUN):
        if path.exists() or path.is_symlink():
            return Run.read(path), path
    raise FileNotFoundError(f"--resume: there is no fit in {out}")


def _check_unchanged(
    base: Run, settings: dict[str, Any], options: dict[str, Any], source: Path
) -> None:
    """Check that a resumed fit is not asked for with other settings.

    Raises:
        ValueError: naming those that differ.
    """
    defaults = FitSettings().to_plain()
    before = defaults | base.settings
    changed = [
        name
        for name, value in settings.items()
        if name not in EXTENDABLE and value != before.get(name)
    ]
    changed += [name for name, value in options.items() if value != base.options.get(name)]
    if changed:
        raise ValueError(
            f"--resume goes on with the fit that {source} describes, in which {changed} are "
            "other; leave these options out, or start again without --resume"
        )


def _with_digest(run: Run, table: Table) -> Run:
    digest = digest_table(table)
    if run.digest not in (None, digest):
        raise ValueError(
            f"--resume: the content of {run.table} has changed since the fit was begun; start "
            "again without --resume"
        )
    return replace(run, digest=digest)


def _fit(table: Table, settings: FitSettings, out: Path, run: Run, *, resume: bool) -> FittedModel:
    checkpoint, writes = out / CHECKPOINT, Processes.current().rank == 0
    if writes:
        complete_folder(out)
    if writes and not resume:
        checkpoint.unlink(missing_ok=True)
    if writes:
        write_atomically(out / UNFINISHED, run.to_toml().encode())
    with _resumable(out), StageDisplay().live() as display:
        fitted = fit_table(
            table,
            settings,
            checkpoint=checkpoint if settings.has_networks else None,
            progress=display.update,
            on_stage=display.begin,
            name=str(out),
        )
        LOG.debug("execution: %s", fitted.metadata and fitted.metadata.history.execution)
        if writes:
            save_fitted(fitted, out, run)
            (out / UNFINISHED).unlink()
    return fitted


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Add to an interruption how the fit is resumed."""
    try:
        yield
    except KeyboardInterrupt as error:
        kept = "begins again"
        if (out / CHECKPOINT).exists():
            kept = f"goes on from {out / CHECKPOINT}"
        error.args = (f"ppl-vae fit --resume --out {out} {kept}",)
        raise


def _summary(fitted: FittedModel, out: Path) -> dict[str, Any]:
    metadata = fitted.metadata
    assert metadata is not None
    return {
        "folder": str(out),
        "model": metadata.model,
        "latent_dim": fitted.latent_dim,
        "columns": metadata.columns,
        "num_train": len(metadata.train_rows),
        "num_val": len(metadata.val_rows),
        "num_held_out": len(metadata.held_out_rows),
        "held_out": metadata.held_out,
        "algorithm": metadata.history.algorithm,
        "steps": metadata.history.steps,
        "seconds": metadata.history.seconds,
        "stopped": metadata.history.stopped,
        "notes": metadata.notes,
    }
