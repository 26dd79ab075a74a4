"""The folder of a fitted model: the saved program, ``fit.json``, ``run.toml`` and a model card.

``fit.json`` names the parameters that it belongs to by their checksum. A new fit replaces an old
one in this order: the new description as ``fit.new.json``, the program (whole or not at all), and
then the name ``fit.json``. Whenever the process ends, one of the two descriptions belongs to the
program in the folder, so that the folder holds the old model or the new one.
"""

import hashlib
import json
from pathlib import Path

import torch

from ppl_vae.core.files import exclusive_folder, write_whole
from ppl_vae.core.program import Program
from ppl_vae.fitted.model import FittedModel, FittedProgram
from ppl_vae.fitted.model_card import model_card
from ppl_vae.fitted.record import FitRecord
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.storage import load, save
from ppl_vae.models.vae import VAE
from ppl_vae.models.variational_posterior import VBPosterior

RECORD, NEW_RECORD, CARD = "fit.json", "fit.new.json", "README.md"
RUN, CHECKPOINT = "run.toml", "checkpoint.pt"
UNFINISHED = "unfinished.toml"
"""The options of a fit that has not been finished; it becomes ``run.toml``."""
FORMAT = 1
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


def save_fitted(fitted: FittedModel, folder: Path) -> None:
    """Write a fitted model into a folder, in place of the one it holds.

    Raises:
        ValueError: if it has no record of its fit.
    """
    if fitted.record is None:
        raise ValueError("there is no record of the fit; ppl_vae.save writes a program alone")
    content = {"format": FORMAT} | fitted.record.to_dict()
    content["program_digest"] = digest_program(fitted.program)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, allow_nan=False, ensure_ascii=False)
    # The program's own folder is locked by save.
    with exclusive_folder(folder.resolve().parent):
        write_whole(folder / NEW_RECORD, text.encode() + b"\n")
        save(fitted.program, folder)
        (folder / NEW_RECORD).replace(folder / RECORD)
        write_whole(folder / CARD, model_card(fitted).encode())


def load_fitted(folder: str | Path) -> FittedModel:
    """Read what :func:`save_fitted` wrote, or a program that :func:`ppl_vae.save` wrote.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if a file is damaged; if the program is of another class than those that can
            be applied to a table.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {folder}")
    program = load(folder)
    if not isinstance(program, PPCA | VAE | Autoencoder | VBPosterior):
        why = NOT_APPLICABLE.get(type(program).__name__, "which cannot be applied to a table")
        raise ValueError(
            f"{folder} holds a {type(program).__name__}, {why}; give the folder of a PPCA, a VAE, "
            "an autoencoder or the posterior of a Bayesian PPCA"
        )
    return FittedModel(program, _record_of(folder, program), str(folder))


def _record_of(folder: Path, program: FittedProgram) -> FitRecord | None:
    paths = [path for path in (folder / RECORD, folder / NEW_RECORD) if path.exists()]
    records = [_read_record(path) for path in paths]
    digest = digest_program(program)
    for path, record in zip(paths, records, strict=True):
        if record.program_digest == digest:
            _check_record(path, record, program)
            return record
    if (folder / RECORD).exists():
        raise ValueError(
            f"{folder / RECORD} describes another model than the one in the folder, which was "
            f"saved later; without {RECORD} the folder is that of a program in its own units"
        )
    return None


def _read_record(path: Path) -> FitRecord:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("it is of another version")
        return FitRecord.from_dict(content)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _check_record(path: Path, record: FitRecord, program: FittedProgram) -> None:
    """Check that a record has values of the right kind, for a program of this width.

    Raises:
        ValueError: naming the first that is not.
    """
    data_dim, names = program.data_dim, record.columns
    row_parts = (record.train_rows, record.val_rows, record.held_out_rows)
    parts = (*row_parts, record.image_shape or ())
    texts = (record.model, record.table, record.table_digest, record.scaling, record.date)
    holds = {
        "columns": all(isinstance(name, str) for name in names) and len({*names}) == data_dim,
        "loc": tuple(record.loc.shape) == (data_dim,) and bool(record.loc.isfinite().all()),
        "scale": record.scale.dim() < 2
        and record.scale.numel() in (1, data_dim)
        and bool((record.scale > 0).all() & record.scale.isfinite().all()),
        "rows": all(isinstance(row, int) and row >= 0 for part in parts for row in part),
        "texts": all(isinstance(text, str) for text in (*texts, *record.notes)),
        "settings": isinstance(record.settings, dict) and isinstance(record.versions, dict),
    }
    if wrong := [name for name, right in holds.items() if not right]:
        raise ValueError(f"{path} is damaged: wrong {', '.join(wrong)}")


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a fitted model, or what an interrupted fit left."""
    names = (RECORD, NEW_RECORD, RUN, UNFINISHED, "config.json")
    return any((folder / name).exists() for name in names)
