"""Checkpoints that are whole or not there: written aside, synced, renamed, and committed by a manifest.

`transformers.Trainer` writes into checkpoint-N in place, so that a run killed there leaves a folder that
looks like a checkpoint. Here a folder is a checkpoint from the moment its manifest is written, which is last.
The manifest holds the sizes and SHA-256 sums of all files; a run resumes only where they still hold.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from longroll.errors import LongrollError, named
from longroll.files import delete, existing, remove_empty, write_whole
from longroll.results import read_json

MANIFEST = "manifest.json"
RUN = "run.json"
"""What a run is, beside its checkpoints and in each of them."""
PARTIAL = ".partial"
"""Where checkpoints are written before they are committed."""
_REMOVED = ".removed-"
_PREFIX = "checkpoint-"
_NAME = re.compile(rf"{_PREFIX}\d+", re.ASCII)
_LOST = re.compile("gloo|NCCL|Connection|Broken pipe")  # what is said of a process that died

logger = logging.getLogger("longroll")


def checkpoint_of(folder: str | Path, step: int) -> Path:
    """Return where Trainer keeps the checkpoint of a step."""
    return Path(folder) / f"{_PREFIX}{step}"


def commit(partial: Path, folder: Path) -> None:
    """Turn the finished folder `partial` into the checkpoint `folder`, on the same file system.

    A process killed before the end leaves `folder` without a manifest, or none; an earlier `folder` of that
    name is removed.
    """
    files = sorted(file for file in partial.rglob("*") if file.is_file())
    with ThreadPoolExecutor() as pool:  # hashing and syncing release the GIL
        entries = dict(zip((str(f.relative_to(partial)) for f in files), pool.map(_seal, files), strict=True))
    for directory in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
        sync(directory)
    remove(folder)
    partial.rename(folder)
    sync(folder.parent)
    write_whole(folder / MANIFEST, json.dumps({"files": entries}, indent=1).encode())
    sync(folder)


def damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint; None: every file is as it was committed."""
    if not os.path.lexists(folder / MANIFEST):
        return f"{MANIFEST} is missing: it was not written to its end"
    expected = _manifest(folder)
    if expected is None:
        return f"{MANIFEST} cannot be read"
    if not expected:
        return f"{MANIFEST} names no file"
    held = {str(path.relative_to(folder)): path for path in folder.rglob("*")}  # a name may lead elsewhere
    for name in expected:
        if name not in held:
            return f"{name} is missing"
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _damage_of(held[name], *expected[name]), expected)
        return next((what for what in found if what), None)


def any_in(folder: Path) -> bool:
    """Return whether `folder` holds a checkpoint, whole or not."""
    return bool(_newest_first(folder))


def others_in(folder: Path) -> list[str]:
    """Return the names in `folder` that no run wrote there, but hidden ones."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [name for name in names if not (name == RUN or name.startswith(".") or _NAME.fullmatch(name))]


def newest_whole(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in `folder`, with a warning for each newer one that is damaged."""
    for checkpoint in _newest_first(folder):
        what = damage(checkpoint)
        if what is None:
            return checkpoint
        logger.warning("%s is damaged and not used: %s.", checkpoint, what)
    return None


def checkpoint_to_resume(folder: Path, asked: str | os.PathLike[str] | bool | None) -> str | None:
    """Resolve the `resume_from_checkpoint` of `Trainer.train`.

    Args:
        folder: the folder of the checkpoints.
        asked: a checkpoint; True: the newest whole one in `folder`, or none, with a warning, where all are
            damaged; None, False: none.

    Raises:
        LongrollError: for a named checkpoint that is damaged, and True where there is none.
    """
    if not asked:
        return None
    if asked is True:
        if not any_in(folder):
            raise LongrollError(f"{folder} holds no checkpoint: train without resume_from_checkpoint.")
        found = newest_whole(folder)
        if found is None:
            logger.warning("No checkpoint in %s is whole: the run starts from the beginning.", folder)
        return str(found) if found else None
    what = damage(Path(asked))
    if what is not None:
        raise LongrollError(f"{asked} is no whole checkpoint: {what}. Resume from another one.")
    return str(asked)


def described_by(folder: Path) -> Path:
    """Return the description of the run whose checkpoints lie in `folder`, put back where it was damaged.

    Raises:
        LongrollError: where there is neither one nor a copy of it in a checkpoint.
    """
    file = folder / RUN
    copy = next(filter(_is_sealed, (checkpoint / RUN for checkpoint in _newest_first(folder))), None)
    if copy is None:
        if not file.is_file():
            raise LongrollError(
                f"{file} is missing, so that nothing says which run goes on: put it back, or name another "
                "`output`."
            )
    elif not (file.is_file() and file.read_bytes() == copy.read_bytes()):
        logger.warning("%s is damaged: the copy in %s is used.", file, copy.parent.name)
        delete(file)
        write_whole(file, copy.read_bytes())
    return file


def rotate(folder: Path, keep: int | None, best: str | None = None) -> None:
    """Remove all but the `keep` newest committed checkpoints and `best`, and what was not committed.

    Args:
        folder: the folder of the checkpoints.
        keep: at least 1; None or 0: keep all.
        best: a checkpoint that stays.
    """
    committed = [c for c in _newest_first(folder) if (c / MANIFEST).is_file()]
    kept = set(committed[:keep] if keep else committed) | {Path(best) for best in (best,) if best}
    for checkpoint in _newest_first(folder):
        if checkpoint not in kept:
            remove(checkpoint)


def clear_partial(folder: Path) -> None:
    """Remove what a killed process left half written or half removed in `folder`."""
    for path in [folder / PARTIAL, *folder.glob(f"{_REMOVED}*")]:
        delete(path)


def remove(folder: Path) -> None:
    """Remove a folder by a rename first: a process killed meanwhile leaves no half of it under its name."""
    if os.path.lexists(folder):
        gone = removal_of(folder)
        delete(gone)
        folder.rename(gone)
        delete(gone)


def removal_of(folder: Path) -> Path:
    """Return where `remove` keeps a folder while it removes it."""
    return folder.with_name(_REMOVED + folder.name)


@contextmanager
def readable(checkpoint: str | os.PathLike[str] | None) -> Iterator[None]:
    """Say in one line that a checkpoint cannot be read, whatever its files hold and their sums say.

    Raises:
        LongrollError: for what another library raises within, but a lack of memory and a lost process.
    """
    try:
        yield
    except (LongrollError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if checkpoint is None or (isinstance(error, RuntimeError) and _LOST.search(str(error))):
            raise
        raise LongrollError(
            f"{checkpoint} cannot be read: {named(error)}. Remove it, to go on from an older one."
        ) from error


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """Yield a folder to write in, whose files are moved into `folder` when they are whole and on the disk.

    Where they cannot be written, nothing of them is left.
    """
    partial, found = folder / PARTIAL, existing(folder)
    delete(partial)
    try:
        partial.mkdir(parents=True)
        yield partial
    except BaseException:
        delete(partial)
        remove_empty(folder, found)
        raise
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
        sync(file)
        file.replace(folder / file.name)
    sync(folder)
    partial.rmdir()


def sync(path: Path) -> None:
    """Have the operating system write a file or folder to its disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob(f"{_PREFIX}*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)), reverse=True)


def _seal(file: Path) -> dict[str, Any]:
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _is_sealed(file: Path) -> bool:
    """Return whether a file is as its checkpoint's manifest says."""
    entries = _manifest(file.parent) or {}
    return file.name in entries and _damage_of(file, *entries[file.name]) is None


def _manifest(folder: Path) -> dict[str, tuple[int, str]] | None:
    """Return bytes and sums of the files of a checkpoint; None where its manifest cannot be read."""
    file = folder / MANIFEST
    try:
        if not file.is_file():  # a pipe would wait
            return None
        entries: dict[str, Any] = read_json(file)["files"]
        return {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (LongrollError, OSError, KeyError, TypeError, AttributeError):
        return None


def _damage_of(file: Path, size: int, digest: str) -> str | None:
    try:
        if not file.is_file() and file.exists():
            return f"{file.name} is no file"
        found = file.stat().st_size
        if found != size:
            return f"{file.name} has {found} bytes, not {size}"
        return None if _sha256(file) == digest else f"{file.name} has other contents than were saved"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
