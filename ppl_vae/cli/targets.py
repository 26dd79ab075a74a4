"""Folders that commands write to, checked before any work."""

import tempfile
from pathlib import Path


def check_folder(folder: Path) -> None:
    """Check that a folder can be made, or written to; it is not made.

    Raises:
        OSError: if not.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        if existing.is_symlink():
            raise OSError(f"{existing} is a link to nothing, or a loop of links")
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"--out {folder}: {existing} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"--out {folder} cannot be written: {error.strerror}") from error


def check_model_folder(folder: Path, *, force: bool) -> None:
    """Check that a model can be written to a folder without the loss of something else.

    Raises:
        ValueError: if the folder holds something else than a model, without ``force``.
        OSError: if it cannot be written to.
    """
    # Here, since commands without a model shall not wait for the import of all models.
    from ppl_vae.fitted.folder import is_model_folder

    check_folder(folder)
    if force or not folder.exists() or is_model_folder(folder) or not any(folder.iterdir()):
        return
    raise ValueError(
        f"--out {folder} holds something else than a model; give another folder, or --force to "
        "write into this one"
    )
