"""bAbI stories as BABILong cuts them up: from the files of tasks_1-20_v1-2, or from BABILong on the hub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from longroll.errors import LongrollError

_FOLDERS = (".", "en-10k", "en", "en-valid-10k")


@dataclass(frozen=True)
class Story:
    """The facts before one question, the question and its answer."""

    facts: tuple[str, ...]
    question: str
    answer: str


def read_stories(source: str | Path, qa: str, split: str = "test") -> list[Story]:
    """Return the stories of one task, a story a question: all facts so far in its story, no earlier
    questions.

    Source: booydar/babilong, babilong/babilong_utils.py (`get_dataset_df`, `TaskDataset`).

    Args:
        source: folder of the .txt files, or the one above en-10k and en (the first that has the file is
            read); or a hub id like RMT-team/babilong-1k-samples, whose `split` is its own.
        qa: "qa1", "qa2", ...
        split: "train" or "test" (or "valid" where there is such a file).

    Raises:
        LongrollError: the file or dataset does not exist, or it is not of bAbI's format.
    """
    folder = Path(os.path.expanduser(source))
    if not folder.exists() and isinstance(source, str) and source.count("/") == 1 and source[0] not in "./~":
        return _from_hub(source, qa)
    path = _find(folder, qa, split)
    stories: list[Story] = []
    facts: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as problem:
        raise LongrollError(f"`source`: {path} cannot be read: {problem}.") from None
    for number, line in enumerate(lines, start=1):
        count, _, text = line.partition(" ")
        if not count.isdigit() or not text:
            raise LongrollError(f"{path}, line {number}: not bAbI's format (a number, a space, a sentence).")
        if count == "1":
            facts = []
        if "\t" in text:
            question, answer = text.split("\t")[:2]
            stories.append(Story(tuple(facts), question.strip(), answer))
        else:
            facts.append(text.strip())
    return stories


def _from_hub(name: str, qa: str) -> list[Story]:
    """Return the stories of a dataset like RMT-team/babilong-1k-samples, config 0k: facts without noise."""
    from datasets import load_dataset

    try:
        rows: Iterable[Mapping[str, str]] = load_dataset(name, "0k", split=qa)
    except Exception as problem:  # datasets, the hub's client and HTTP each have their own
        said = " ".join(str(problem).split())[:200]
        raise LongrollError(
            f"`source` {name} is not a folder here and is not available from the hub: {said}"
        ) from None
    return stories_of(rows)


def stories_of(rows: Iterable[Mapping[str, str]]) -> list[Story]:
    """Return stories of rows with `input`, `question` and `target`, a sentence of the input being a fact."""
    return [
        Story(
            tuple(f"{fact.strip().rstrip('.')}." for fact in row["input"].split(". ")),
            row["question"].strip(),
            row["target"].strip(),
        )
        for row in rows
    ]


def _find(folder: Path, qa: str, split: str) -> Path:
    if not folder.is_dir():
        raise LongrollError(f"`source` {folder} is not a folder: name the one with bAbI's unpacked files.")
    for below in _FOLDERS:
        for path in sorted((folder / below).glob(f"{qa}_*_{split}.txt")):
            return path
    raise LongrollError(
        f"`source` {folder} has no {qa}_*_{split}.txt, here or in en-10k or en: get bAbI tasks_1-20_v1-2."
    )
