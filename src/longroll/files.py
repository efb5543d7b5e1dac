"""Write a file whole or not at all."""

import os
import tempfile
from pathlib import Path

from longroll.errors import LongrollError


def write_whole(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write to a temporary name in the same folder, then rename: a reader never sees half a file."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes the file private; a report is to be shown
        os.replace(temporary, target)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise _unwritable(target, error) from error
    return target


def _unwritable(path: Path, error: OSError) -> LongrollError:
    reason = error.strerror or type(error).__name__
    return LongrollError(f"Cannot write {path}: {reason}. Name another place.")


def check_writable(path: Path, *, folder: bool = False) -> Path:
    """Find out before the work that its result cannot be written.

    Raises:
        LongrollError: where `path` (a file, or a folder) cannot be made.
    """
    if path.is_dir() and not folder:
        raise LongrollError(f"Cannot write {path}: it is a folder. Name a file.")
    try:
        try_folder(path if folder else path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def try_folder(folder: Path) -> None:
    """Make a folder, and a file in it that goes again; raises OSError where either cannot be made."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
