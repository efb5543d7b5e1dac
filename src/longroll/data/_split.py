"""How text that has no splits of its own is divided into train and validation.

Files are divided by their names, so that the same file is on the same side on every machine and in every
Python version; documents inside one file are dealt by their number; a file of few documents gives the end of
each. A tenth is validation in every case. What holds no text is left out before anything is counted.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

from ._files import has_text, is_visible

T = TypeVar("T")

SPLITS = ("train", "validation", "all")
ONE_IN = 10


def side_of(name: str) -> str:
    """Return the side a file of this name is on: "validation" for one name in ten, by its SHA-256, else
    "train".
    """
    return "train" if _drawn(name) else "validation"


def deal(items: Iterable[T], split: str) -> Iterator[T]:
    """Return the items that belong to `split`: one in each ten is validation.

    Which of ten it is, is drawn by SHA-256 of the number of the ten. Items that recur with a period, as
    questions and answers in turn, fall on both sides.

    Args:
        items: any things; two calls for two sides must give the same ones.
        split: "train" or "validation".
    """
    for number, item in enumerate(items):
        ten, place = divmod(number, ONE_IN)
        if (place == _drawn(str(ten))) == (split == "validation"):
            yield item


def _drawn(name: str) -> int:
    """Return a number below `ONE_IN` that the name draws, the same everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % ONE_IN


def divide_files(files: Sequence[Path], split: str, text_column: str | None = None) -> list[tuple[Path, str]]:
    """Return the files to read for `split`, each with the part to read of it ("train", "validation" or
    "all").

    Ten or more files with text whose names fall on both sides are divided by their names, and read whole.
    Otherwise every file gives its own part (`divide_documents`).

    Args:
        files: the files of a source.
        split: one of `SPLITS`.
        text_column: the column of text of rows.
    """
    if split == "all":
        return [(file, "all") for file in files]
    seen = {"train": 0, "validation": 0}
    for file in files:  # stops at the tenth file or soon after: a large folder is not opened twice
        seen[side_of(file.name)] += has_text(file, text_column)
        if sum(seen.values()) >= ONE_IN and all(seen.values()):
            return [(file, "all") for file in files if side_of(file.name) == split]
    return [(file, split) for file in files]


def divide_documents(documents: Iterable[str], split: str) -> Iterator[str]:
    """Return the documents of one file that belong to `split`; those without text count as if not there.

    Ten or more are dealt (`deal`). Fewer: the last tenth of the characters of each is validation, the rest of
    it is train, not counting white space at its ends.
    """
    if split == "all":
        yield from documents
        return
    rest = filter(is_visible, documents)
    head = list(islice(rest, ONE_IN))
    if len(head) == ONE_IN:
        yield from deal(chain(head, rest), split)
        return
    for text in head:
        end = len(text.rstrip())
        cut = end - (end - (len(text) - len(text.lstrip()))) // ONE_IN
        yield text[:cut] if split == "train" else text[cut:]
