"""Whole documents of text, from the standard library, files, folders or the Hugging Face hub."""

import logging
import os
import random
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from ..errors import LongrollError
from ._compressed import MAGIC, Unreadable
from ._files import (
    Skipped,
    check_readable,
    documents_in,
    files_below,
    is_visible,
    note_unreadable,
    standard_library,
)
from ._hub import hub_documents
from ._rows import ROWS, is_rows
from ._split import SPLITS, divide_documents, divide_files

logger = logging.getLogger("longroll")

STDLIB = "stdlib"
LOOKED_AT = 10_000
"""Files of the other side of a split that are looked at, at most."""
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_FILE_ENDINGS = (".txt", ".md", ".py", *ROWS, *MAGIC)


def read_documents(
    source: str | Path = STDLIB,
    *,
    split: str = "train",
    text_column: str | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """Read whole documents lazily; documents without any visible character are left out.

    Local text is divided into train and validation, 9 to 1: the standard library and folders by a hash of
    each file's name (not of its place, so that the split is the same on every machine and copies of a file
    stay on one side); the rows of one file by their number, one in each ten; a folder or file of fewer than
    ten documents by the last tenth of each. Hub datasets have their own splits.

    Skipped files of a folder are counted and named in one warning: files that are binary, in another
    encoding, damaged, empty, or that may not be read. Hidden files are not counted.

    Args:
        source: "stdlib" (the source of the running Python's standard library); a folder, of which every
            UTF-8 file is a document; a file: .json, .jsonl, .csv, .tsv and .parquet hold a document in each
            row, any other is one document, and each may be compressed (.gz, .bz2, .xz, .zst); else a hub
            dataset, `name` or `name:config`. Several, separated by commas, are read in turn, a document from
            each. A `Path` is always local.
        split: "train", "validation" or "all", or a hub dataset's own.
        text_column: the column of text of rows; None: `text`, `content` or the only one of strings. Text
            without rows is refused with it, in a folder skipped.
        seed: read the files of folders in an order shuffled by it, for when a limit cuts the reading short;
            None: in the order of their paths. Rows are always read in their order.

    Raises:
        LongrollError: at once for a missing file, a wrong split, or `text_column` of text without columns;
            while reading for text that is damaged, a column that is not there, a hub that cannot be reached,
            or a source without any text.
    """
    streams = [_never_empty(_stream(one, split, text_column, seed), one, split) for one in _separate(source)]
    return _in_turn(streams)


def _separate(source: str | Path) -> list[str | Path]:
    """Return the single sources of a list separated by commas; a file whose name has a comma is one
    source.
    """
    if isinstance(source, Path) or (source and _exists(_path(source))):
        return [source]
    sources = [one.strip() for one in source.split(",") if one.strip()]
    if not sources:
        raise LongrollError('the source of text is empty: name "stdlib", a file, a folder or a hub dataset')
    return list(sources)


def _stream(source: str | Path, split: str, text_column: str | None, seed: int | None) -> Iterator[str]:
    """Return the documents of one source; what is missing is said here, not at the first document."""
    if source == STDLIB:
        if text_column is not None:
            raise LongrollError(f"`text_column` {text_column}: stdlib is plain text, which has no columns")
        return _local(STDLIB, standard_library(), split, None, seed, Skipped())
    path, notes = _path(source), Skipped()
    if not _exists(path):
        name = str(source)
        if isinstance(source, Path) or not _HUB_ID.fullmatch(name) or name.endswith(_FILE_ENDINGS):
            raise LongrollError(f"{source}: no such file or folder")
        return hub_documents(name, split=split, text_column=text_column)
    if path.is_dir():
        files = files_below(path, unread=notes)
        if text_column is not None:
            for file in files:
                if not is_rows(file):
                    notes.add(file, Unreadable("without columns"))
            files = [file for file in files if is_rows(file)]
            if not files:
                raise LongrollError(
                    f"`text_column` {text_column}: {path} has no file with columns ({', '.join(ROWS)})"
                )
        return _local(path, files, split, text_column, seed, notes)
    try:
        if not path.is_file():
            raise Unreadable("no regular file")
        check_readable(path)
    except Unreadable as problem:
        raise LongrollError(
            f"{path} is not text that longroll reads: {problem}; name a folder, or a file in UTF-8, "
            f"{', '.join(ROWS)}, compressed or not"
        ) from None
    if text_column is not None and not is_rows(path):
        raise LongrollError(
            f"`text_column` {text_column}: {path} is read as plain text, which has no columns; rows are in "
            f"{', '.join(ROWS)}"
        )
    return _local(path, [path], split, text_column, seed, notes)


def _local(
    source: str | Path,
    files: list[Path],
    split: str,
    text_column: str | None,
    seed: int | None,
    notes: Skipped,
) -> Iterator[str]:
    """Return the documents of local files, and a warning of what `notes` holds in the end."""
    if split not in SPLITS:
        raise LongrollError(f"no split {split!r} in local text: it is divided into {', '.join(SPLITS)}")
    parts = divide_files(files, split, text_column)
    if seed is not None:
        random.Random(seed).shuffle(parts)
    alone = files == [source]
    if not alone and source != STDLIB:  # the other side of the split is not read, only inspected
        read = {file for file, _ in parts}
        note_unreadable(islice((file for file in files if file not in read), LOOKED_AT), notes)
    return _noted(
        source,
        split,
        chain.from_iterable(
            divide_documents(documents_in(file, text_column, notes, alone=alone), part)
            for file, part in parts
        ),
        notes,
    )


def _noted(source: str | Path, split: str, documents: Iterator[str], notes: Skipped) -> Iterator[str]:
    """Return `documents`; what was skipped of them is a warning, or the reason why there are none."""
    empty = True
    try:
        for text in documents:
            yield text
            empty = False
    finally:
        said = str(notes)
        if said and not empty:
            logger.warning("%s: %s", source, said)
    if empty and said:
        raise LongrollError(f"{source} has no text (split {split!r}): {said}")


def _never_empty(documents: Iterator[str], source: str | Path, split: str) -> Iterator[str]:
    """Return the documents that have text; a source that has none is an error."""
    empty = True
    for text in documents:
        if is_visible(text):
            empty = False
            yield text
    if empty:
        raise LongrollError(f"{source} has no text (split {split!r}): name another source")


def _in_turn(streams: list[Iterator[str]]) -> Iterator[str]:
    """Return one document from each stream in turn, until all are exhausted."""
    while streams:
        for stream in list(streams):
            try:
                yield next(stream)
            except StopIteration:
                streams.remove(stream)


def _path(source: str | Path) -> Path:
    """Return the path that `source` would be; a `~name` of no user stays as it is."""
    return Path(os.path.expanduser(source))


def _exists(path: Path) -> bool:
    """Return whether `path` exists; a name too long for the file system does not.

    Raises:
        LongrollError: a folder above it may not be searched.
    """
    try:
        os.stat(path)
    except PermissionError:
        raise LongrollError(f"{path}: no permission to read") from None
    except (OSError, ValueError):
        return False
    return True
