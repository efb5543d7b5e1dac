"""Local files: which ones a source holds, and the documents inside one."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ._rows import is_rows, read_rows

SNIFFED = 8192  # bytes looked at for a NUL, as git and grep do
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


def standard_library() -> list[Path]:
    """Every .py file of the running Python's standard library but its tests, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [file for file in files_below(root, skipped=NOT_LIBRARY) if file.suffix == ".py"]


def files_below(root: Path, *, skipped: frozenset[str] = frozenset()) -> list[Path]:
    """The files below `root` in the order of their paths: not the hidden ones, each folder once.

    Links to folders are followed; a folder that was seen before (a loop, a second link) is not entered again.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped)
        paths = (Path(folder, name) for name in files if not name.startswith("."))
        found += [path for path in paths if path.is_file()]  # no broken links, pipes or sockets
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def is_readable(path: Path) -> bool:
    """Whether `path` holds documents, judged by its name and its first 8 KiB."""
    if is_rows(path):
        return True
    try:
        with path.open("rb") as file:
            return b"\0" not in file.read(SNIFFED)
    except OSError:
        return False


def read_text(path: Path) -> str | None:
    """The text of a UTF-8 file, without a byte order mark; None if it is binary or cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(SNIFFED)
            return None if b"\0" in head else (head + file.read()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None


def documents_in(path: Path, text_column: str | None) -> Iterator[str]:
    """The documents of one file: a row each (.jsonl, .parquet), else its whole text, else nothing."""
    if is_rows(path):
        yield from read_rows(path, text_column)
    elif (text := read_text(path)) is not None:
        yield text
