"""Local files: which ones a source holds, the documents inside one, and what of them could not be read."""

import logging
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import LongrollError
from ._compressed import DAMAGE, Unreadable, inner_name, open_bytes, unreadable
from ._rows import encoding_of, is_rows, read_rows

logger = logging.getLogger("longroll")

SNIFFED = 8192  # bytes looked at for a NUL, as git and grep do
REPLACED = (
    1000  # a file of which at most one byte in so many is not UTF-8 is damaged UTF-8, not another encoding
)
NAMED = 3  # files named of each reason
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
OTHER_FORMATS = (
    ".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".lz4", ".br",
    ".pdf", ".docx", ".xlsx", ".pptx", ".odt", ".epub", ".arrow", ".feather", ".orc", ".avro",
)  # fmt: skip
"""Formats that hold text which longroll does not unpack."""


class Skipped:
    """Notes on files that were skipped or read with replaced bytes, for a warning of one line.

    Attributes:
        files: names of files by the reason why they were skipped.
        replaced: bytes that are not UTF-8, by the name of the file in which they read as U+FFFD.
    """

    def __init__(self) -> None:
        self.files: dict[str, list[str]] = {}
        self.replaced: dict[str, int] = {}

    def add(self, path: Path, problem: Unreadable) -> None:
        """Note a file that was skipped."""
        detail = f": {problem.detail}" if problem.detail else ""
        self.files.setdefault(problem.reason, []).append(f"{path.name}{detail}")

    def __str__(self) -> str:
        parts = [f"{len(names)} {reason} ({_some(names)})" for reason, names in self.files.items()]
        count = sum(map(len, self.files.values()))
        files = "1 file" if count == 1 else f"{count} files"
        said = [f"{files} not read: {', '.join(parts)}"] if parts else []
        if self.replaced:
            counts = [f"{name}: {count}" for name, count in self.replaced.items()]
            said.append(f"bytes that are not UTF-8 read as U+FFFD ({_some(counts)})")
        return "; ".join(said)


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def standard_library() -> list[Path]:
    """Return every .py file of the running Python's standard library but its tests, in the order of their
    paths.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    return [file for file in files_below(root, skipped=NOT_LIBRARY) if file.suffix == ".py"]


def files_below(
    root: Path, *, skipped: frozenset[str] = frozenset(), unread: Skipped | None = None
) -> list[Path]:
    """Return the files below `root` in the order of their paths: not the hidden ones, each folder once.

    Links to folders are followed; a folder that was seen before (a loop, a second link) is not entered again.
    `unread` notes folders that may not be entered, and links, pipes and sockets without a file behind.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    notes = Skipped() if unread is None else unread

    def note(problem: OSError) -> None:
        notes.add(Path(problem.filename), unreadable(problem))

    for folder, folders, files in os.walk(root, followlinks=True, onerror=note):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped)
        for path in (Path(folder, name) for name in files if not name.startswith(".")):
            try:
                if not stat.S_ISREG(os.stat(path).st_mode):
                    raise Unreadable("no regular file")
                found.append(path)
            except OSError as problem:
                notes.add(path, unreadable(problem))
            except Unreadable as problem:
                notes.add(path, problem)
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def check_readable(path: Path) -> None:
    """Check that `path` holds documents, judged by its name and its first 8 KiB.

    Raises:
        Unreadable: it does not, and why.
    """
    if inner_name(path).endswith(OTHER_FORMATS):
        raise Unreadable("of a format that is not read", path.suffix)
    if is_rows(path):
        return
    try:
        with open_bytes(path) as file:
            head = file.read(SNIFFED)
    except DAMAGE as problem:
        raise unreadable(problem) from None
    if encoding_of(head) == "utf-8-sig" and b"\0" in head:
        raise Unreadable("binary", f"NUL byte at {head.index(0)}")


def has_text(path: Path, text_column: str | None = None) -> bool:
    """Return whether `path` holds a document with a visible character; it is read no further than to that.

    Args:
        path: a file, of which the first 8 KiB say whether it is text.
        text_column: the column of text, for a file of rows.
    """
    try:
        check_readable(path)
        if is_rows(path):
            return any(map(is_visible, read_rows(path, text_column)))
        with open_bytes(path) as file:
            head = file.read(SNIFFED)
            return is_visible(_decoded(head)[0]) or is_visible(_decoded(head + file.read())[0])
    except (Unreadable, LongrollError, *DAMAGE):
        return False


def is_visible(text: str) -> bool:
    """Return whether a text has a visible character."""
    return bool(text) and not text.isspace()


def read_text(path: Path, notes: Skipped) -> str:
    """Return the text of a file in UTF-8 (or UTF-16, if it begins by saying so), without a byte order mark.

    A few bytes that are not UTF-8 read as U+FFFD, and `notes` counts them.

    Raises:
        Unreadable: no permission, binary, damaged, or in another encoding.
    """
    check_readable(path)
    try:
        with open_bytes(path) as file:
            data = file.read()
    except DAMAGE as problem:
        raise unreadable(problem) from None
    text, wrong = _decoded(data)
    if wrong:
        notes.replaced[path.name] = wrong
    return text


def _decoded(data: bytes) -> tuple[str, int]:
    """Return the text of `data`, and how many places of it are not in its encoding.

    Raises:
        Unreadable: so many that it is in another encoding.
    """
    encoding = encoding_of(data)
    try:
        return data.decode(encoding), 0
    except UnicodeDecodeError as problem:
        text = data.decode(encoding, errors="replace")
        wrong = text.count("\ufffd") - (data.count(b"\xef\xbf\xbd") if encoding == "utf-8-sig" else 0)
        if wrong > max(1, len(data) // REPLACED) or len(text) < 10 * wrong:
            found = f"byte 0x{data[problem.start]:02x} at {problem.start}"
            raise Unreadable(f"not {encoding.removesuffix('-sig').upper()}", found) from None
    return text, wrong


def note_unreadable(files: Iterable[Path], notes: Skipped) -> None:
    """Note which of `files` would be skipped, judged by their first 8 KiB."""
    for path in files:
        try:
            check_readable(path)
            if not is_rows(path):
                with open_bytes(path) as file:
                    _decoded(file.read(SNIFFED))
        except Unreadable as problem:
            notes.add(path, problem)
        except DAMAGE as problem:
            notes.add(path, unreadable(problem))


def documents_in(path: Path, text_column: str | None, notes: Skipped, *, alone: bool) -> Iterator[str]:
    """Return the documents of one file: a row each, or its whole text.

    A file of a folder (not `alone`) that cannot be read is skipped and noted, unless `text_column` names what
    its rows should have.

    Raises:
        LongrollError: the file cannot be read.
    """
    if not is_rows(path):
        try:
            text = read_text(path, notes)
        except Unreadable as problem:
            if alone:
                raise LongrollError(f"{path} has no text that can be read: {problem}") from None
            notes.add(path, problem)
            return
        if is_visible(text):
            yield text
        else:
            notes.add(path, Unreadable("empty"))
        return
    rows = read_rows(path, text_column)
    try:
        first = next(rows, None)
    except LongrollError as problem:
        if alone or text_column is not None:
            raise
        said = str(problem).removeprefix(str(path)).lstrip(": ")
        notes.add(path, Unreadable("without rows of text", said))
        return
    if first is None:
        notes.add(path, Unreadable("empty"))
        return
    yield first
    yield from rows
