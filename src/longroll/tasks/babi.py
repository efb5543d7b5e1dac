"""bAbI stories from the files of the tasks_1-20_v1-2 release, as BABILong cuts them up."""

from __future__ import annotations

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


def read_stories(folder: str | Path, qa: str, split: str = "test") -> list[Story]:
    """The stories of one task, a story a question: all facts so far in its story, no earlier questions.

    Source: booydar/babilong, babilong/babilong_utils.py (`get_dataset_df`, `TaskDataset`).

    Args:
        folder: of the .txt files, or the one above en-10k and en; the first of these that has the file is
            read.
        qa: "qa1", "qa2", ...
        split: "train" or "test" (or "valid" where there is such a file).

    Raises:
        LongrollError: there is no such file, or it is not of bAbI's format.
    """
    path = _find(Path(folder).expanduser(), qa, split)
    stories: list[Story] = []
    facts: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
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


def _find(folder: Path, qa: str, split: str) -> Path:
    if not folder.is_dir():
        raise LongrollError(f"--facts {folder} is no folder: name the one with bAbI's files (unpacked).")
    for below in _FOLDERS:
        for path in sorted((folder / below).glob(f"{qa}_*_{split}.txt")):
            return path
    raise LongrollError(
        f"--facts {folder} has no {qa}_*_{split}.txt, here or in en-10k or en: get bAbI tasks_1-20_v1-2."
    )
