"""How text that has no splits of its own is divided into train and validation.

Files are divided by their names, so that the same file is on the same side on every machine and in every
Python version; documents inside one file are divided by their row; a file of few documents gives the end of
each. A tenth is validation in every case.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from ._files import is_readable

SPLITS = ("train", "validation", "all")
ONE_IN = 10


def side_of(name: str) -> str:
    """Return the side a file of this name is on: "validation" for one name in ten, by its SHA-256, else
    "train".
    """
    return "train" if int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % ONE_IN else "validation"


def divide_files(files: Sequence[Path], split: str) -> list[tuple[Path, str]]:
    """Return the files to read for `split`, each with the part to read of it ("train", "validation" or
    "all").

    Ten or more readable files whose names fall on both sides are divided by their names, and read whole.
    Otherwise every file gives its own part (`divide_documents`).
    """
    if split == "all":
        return [(file, "all") for file in files]
    seen = {"train": 0, "validation": 0}
    for file in files:  # stops at the tenth file or soon after: a large folder is not opened twice
        seen[side_of(file.name)] += is_readable(file)
        if sum(seen.values()) >= ONE_IN and all(seen.values()):
            return [(file, "all") for file in files if side_of(file.name) == split]
    return [(file, split) for file in files]


def divide_documents(documents: Iterable[str], split: str) -> Iterator[str]:
    """Return the documents of one file that belong to `split`.

    Ten or more: every tenth (9, 19, 29, ... counted from 0) is validation. Fewer: the last tenth of the
    characters of each is validation, the rest of it is train.
    """
    if split == "all":
        yield from documents
        return
    rest = iter(documents)
    head = list(islice(rest, ONE_IN))
    if len(head) < ONE_IN:
        for text in head:
            cut = len(text) - len(text) // ONE_IN
            yield text[:cut] if split == "train" else text[cut:]
        return
    for row, text in enumerate(chain(head, rest)):
        if (row % ONE_IN == ONE_IN - 1) == (split == "validation"):
            yield text
