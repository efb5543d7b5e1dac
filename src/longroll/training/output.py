"""The folder of a run: refused where it holds something else, and left as it was found by what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longroll import ranks
from longroll.errors import LongrollError
from longroll.files import Lock, delete, existing, remove_empty, try_folder
from longroll.results import write_json
from longroll.training import checkpoints

FOLDER = "checkpoints"
"""Where the checkpoints of a run lie in its output until it is done."""


def goes_on(output: Path, resume: bool) -> bool:
    """Return whether a run goes on from a checkpoint."""
    return resume and checkpoints.any_in(output / FOLDER)


def is_done(output: Path, place: Path, resume: bool, lock: Lock) -> bool:
    """Check that a run may begin, or go on; True where all that is left of it is to clean up.

    Args:
        output: the folder of the run.
        place: what opens the model that it writes there (`saving.opened_as`).
        resume: whether to go on from a checkpoint.
        lock: the lock of the folder of checkpoints, which is taken if that folder is there.

    Raises:
        LongrollError: for a folder that holds something else, is in use, or cannot be written.
    """
    folder = output / FOLDER
    if folder.is_dir() and (checkpoints.any_in(folder) or not checkpoints.others_in(folder)):
        lock.take()
    if resume and checkpoints.removal_of(folder).exists() and not checkpoints.any_in(folder):
        checkpoints.clear_partial(output)
        return True
    _check(output, place, resume)
    checkpoints.clear_partial(output)
    return False


def begin(output: Path, place: Path, started: dict[str, Any], resume: bool, lock: Lock) -> None:
    """Write what a run is, unless its checkpoints hold that.

    Args:
        output: the folder of the run.
        place: what opens the model that it writes there.
        started: what the run is (`identity.describe_run`).
        resume: whether to go on from a checkpoint.
        lock: the lock of the folder of checkpoints, which is taken.

    Raises:
        LongrollError: as `is_done`.
    """
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    lock.take()
    _check(output, place, resume)  # another process may have had the folder meanwhile
    if not checkpoints.any_in(folder):
        write_json(folder / checkpoints.RUN, started)


@contextlib.contextmanager
def left_as_found(output: Path, lock: Lock) -> Iterator[None]:
    """Have a run that ends by an exception before its first checkpoint leave nothing in `output`."""
    folder = output / FOLDER
    found = existing(folder)
    try:
        yield
    except BaseException:
        if ranks.rank() == 0 and not checkpoints.any_in(folder):
            if lock.held:  # else what is there is of another process
                lock.release()
                for name in (checkpoints.RUN, checkpoints.PARTIAL, Lock.FILE):
                    delete(folder / name)
            remove_empty(folder, found)
        raise


def refuse_model(output: Path, *files: Path) -> None:
    """Refuse a folder in which a model lies, or one of `files`.

    Raises:
        LongrollError: naming the folder.
    """
    if (output / "config.json").exists() or any(file.is_file() for file in files):
        raise LongrollError(f"`output` {output} already holds a model: name another folder, or remove it.")


def _check(output: Path, place: Path, resume: bool) -> None:
    """Refuse a folder that holds something else than what a run goes on from, or that cannot be written."""
    folder = output / FOLDER
    interrupted = checkpoints.any_in(folder)
    if output.exists() and not output.is_dir():
        raise LongrollError(f"`output` {output} is a file: name a folder.")
    if not (resume and interrupted):
        refuse_model(output, place)
    if interrupted and not resume:
        raise LongrollError(
            f"`output` {output} holds an interrupted run: go on with it by `resume`, or name another folder."
        )
    others = [] if interrupted else checkpoints.others_in(folder)
    if others:
        raise LongrollError(
            f"`output`: {folder} holds {others[0]}, which is of no run and would be removed with the "
            "checkpoints: name another folder."
        )
    try:
        try_folder(folder)
    except OSError as error:
        raise LongrollError(f"`output`: {folder} cannot be written: {error.strerror}.") from None
