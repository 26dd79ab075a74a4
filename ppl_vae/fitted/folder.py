"""The folder of a fitted model: the saved program, ``fit.json``, ``run.toml`` and a model card.

``fit.json`` names the parameters that it belongs to by their checksum. A new fit replaces an old
one in this order: the new files under temporary names (``fit.new.json``, ...), the program (whole
or not at all), and then the names of the files. Whenever the process ends, the program in the
folder is that of ``fit.json`` or of ``fit.new.json``; in the second case the next command that
reads or writes the folder completes the replacement.
"""

import hashlib
import json
import os
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch

from ppl_vae.core.files import exclusive_folder, read_regular, write_atomically
from ppl_vae.core.program import Program
from ppl_vae.fitted.metadata import FitMetadata
from ppl_vae.fitted.model import FittedModel, FittedProgram
from ppl_vae.fitted.model_card import model_card
from ppl_vae.fitted.settings import Run
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.storage import load, save
from ppl_vae.models.vae import VAE
from ppl_vae.models.variational_posterior import VBPosterior

METADATA, CARD, RUN, CHECKPOINT = "fit.json", "README.md", "run.toml", "checkpoint.pt"
NEW = {CARD: "README.new.md", RUN: "run.new.toml", METADATA: "fit.new.json"}
"""The files of a new fit under their temporary names; that of ``fit.json`` is kept longest."""
UNFINISHED = "unfinished.toml"
"""The options of a fit that has not been finished; it becomes ``run.toml``."""
FORMAT = 2
"""Version of ``fit.json``."""
NOT_APPLICABLE = {
    "BayesianPPCA": "whose parameters have a prior and no values: save fit_vb(...).guide",
    "PerDatumGuide": "which has one q for each row that was fitted, and none for other rows",
}
"""Why a program that can be saved is not applied to tables, by the name of its class."""


def digest_program(program: Program) -> str:
    """A checksum of the names, types, shapes and values of a program's parameters."""
    found = hashlib.sha256()
    for name, tensor in sorted(program.state_dict().items()):
        if tensor is None:
            continue
        value = tensor.detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def save_fitted(fitted: FittedModel, folder: Path, run: Run | None = None) -> None:
    """Write a fitted model into a folder, in place of the one it holds.

    Args:
        fitted: the model.
        folder: is made if there is none.
        run: what ``run.toml`` holds; by default the settings of the fit.

    Raises:
        ValueError: if it has no metadata of its fit.
    """
    if fitted.metadata is None:
        raise ValueError("there is no metadata of the fit; ppl_vae.save writes a program alone")
    content = {"format": FORMAT} | fitted.metadata.to_dict()
    content["program_digest"] = digest_program(fitted.program)
    content["checksum"] = _checksum(content)
    run = run or Run(None, {}, dict(fitted.metadata.settings))
    texts = {
        CARD: model_card(fitted),
        RUN: run.to_toml(),
        METADATA: _json(content) + "\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    complete_folder(folder)
    with _locked(folder):
        try:
            for name, new in NEW.items():
                write_atomically(folder / new, texts[name].encode())
            save(fitted.program, folder)
            _rename_new(folder)
        except BaseException:
            _complete(folder)
            for new in NEW.values():
                (folder / new).unlink(missing_ok=True)
            raise


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, allow_nan=False, ensure_ascii=False)


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(_json(content).encode("utf-8", "surrogatepass")).hexdigest()


def complete_folder(folder: Path) -> None:
    """Give the files of a new fit their names, if a process ended after it had its program."""
    if (folder / NEW[METADATA]).exists():
        with _locked(folder):
            _complete(folder)


def _locked(folder: Path) -> AbstractContextManager[None]:
    # The program's own folder is locked by save.
    return exclusive_folder(folder.resolve().parent)


def _complete(folder: Path) -> None:
    with suppress(FileNotFoundError, ValueError):  # without a program there is nothing to complete
        digest = digest_program(load(folder))
        if _read_metadata(folder / NEW[METADATA]).program_digest == digest:
            _rename_new(folder)


def _rename_new(folder: Path) -> None:
    for name, new in NEW.items():
        if (folder / new).exists():
            (folder / new).replace(folder / name)


def load_fitted(folder: str | Path) -> FittedModel:
    """Read what :func:`save_fitted` wrote, or a program that :func:`ppl_vae.save` wrote.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it is a file; if a file in it is damaged; if the program is of another class
            than those that can be applied to a table.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {folder}")
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is a file; a model is the folder that ppl-vae fit or ppl_vae.save wrote, "
            "and stands before the table"
        )
    with suppress(OSError):  # a folder that cannot be written to is read as it is
        complete_folder(folder)
    try:
        return _read(folder)
    except (FileNotFoundError, ValueError):
        with _locked(folder):  # until no other process is saving
            return _read(folder)


def _read(folder: Path) -> FittedModel:
    program = load(folder)
    if not isinstance(program, PPCA | VAE | Autoencoder | VBPosterior):
        why = NOT_APPLICABLE.get(type(program).__name__, "which cannot be applied to a table")
        raise ValueError(
            f"{folder} holds a {type(program).__name__}, {why}; give the folder of a PPCA, a VAE, "
            "an autoencoder or the posterior of a Bayesian PPCA"
        )
    return FittedModel(program, _record_of(folder, program), str(folder))


def _record_of(folder: Path, program: FittedProgram) -> FitMetadata | None:
    paths = [folder / name for name in (METADATA, NEW[METADATA]) if os.path.lexists(folder / name)]
    found = [_read_metadata(path) for path in paths]
    digest = digest_program(program)
    for path, metadata in zip(paths, found, strict=True):
        if metadata.program_digest == digest:
            _check_metadata(path, metadata, program)
            return metadata
    if folder / METADATA in paths:
        raise ValueError(
            f"{folder / METADATA} describes another model than the one in the folder, which was "
            f"saved later; without {METADATA} the folder is that of a program in its own units"
        )
    return None


def _read_metadata(path: Path) -> FitMetadata:
    try:
        content = json.loads(read_regular(path))
        checksum, found = content.pop("checksum", None), content.get("format")
        if found == FORMAT and checksum != _checksum(content):
            raise ValueError("its content is not what was saved")
        del content["format"]
        metadata = FitMetadata.from_dict(content) if found == FORMAT else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if metadata is None:
        raise ValueError(
            f"{path} was written by another version of ppl_vae, in format {found}, and format "
            f"{FORMAT} is read; fit again: ppl-vae fit --config {path.parent / RUN} --out OTHER"
        )
    return metadata


def _check_metadata(path: Path, metadata: FitMetadata, program: FittedProgram) -> None:
    """Check that metadata have values of the right kind, for a program of this width.

    Raises:
        ValueError: naming the first that is not.
    """
    data_dim, names = program.data_dim, metadata.columns
    row_parts = (metadata.train_rows, metadata.val_rows, metadata.held_out_rows)
    parts = (*row_parts, metadata.image_shape or ())
    texts = (
        metadata.model,
        metadata.table,
        metadata.table_digest,
        metadata.scaling,
        metadata.date,
        metadata.index or "",
    )
    holds = {
        "columns": all(isinstance(name, str) for name in names) and len({*names}) == data_dim,
        "loc": tuple(metadata.loc.shape) == (data_dim,) and bool(metadata.loc.isfinite().all()),
        "scale": metadata.scale.dim() < 2
        and metadata.scale.numel() in (1, data_dim)
        and bool((metadata.scale > 0).all() & metadata.scale.isfinite().all()),
        "rows": all(isinstance(row, int) and row >= 0 for part in parts for row in part),
        "texts": all(isinstance(text, str) for text in (*texts, *metadata.notes)),
        "settings": isinstance(metadata.settings, dict) and isinstance(metadata.versions, dict),
    }
    if wrong := [name for name, right in holds.items() if not right]:
        raise ValueError(f"{path} is damaged: wrong {', '.join(wrong)}")


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a fitted model, or what an interrupted fit left."""
    names = (METADATA, NEW[METADATA], RUN, UNFINISHED, "config.json")
    return any((folder / name).exists() for name in names)
