"""Rows of a task to train on: prompt and answer, loss on the answer (or on all of it)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from longroll.data import Tokenizer
from longroll.data.lanes import IGNORED
from longroll.data.windows import Item
from longroll.errors import LongrollError
from longroll.tasks._task import TRAINING, Sample, Task, random_of
from longroll.tasks.babilong import QAS, open_babilong
from longroll.tasks.copying import Copying, CopyRows
from longroll.tasks.haystack import Haystack
from longroll.tasks.niah import Niah
from longroll.tasks.passkey import Passkey
from longroll.tasks.recall import PAIRS, Recall
from longroll.tasks.state_tracking import GROUPS, StateTracking, TrackingRows
from longroll.tasks.variables import HOPS, Variables

TASKS = ("passkey", "niah", "copying", "babilong", "variables", "recall", "tracking")
"""The tasks that one can train on."""


class TaskRows(Dataset[Item]):
    """Samples of tasks, `windows` rows of `length` tokens each, in the order of `longroll.data.Lanes`.

    Item k * lanes + l is step k of lane l. With `windows` = 1 every row is a sample of its own; with more, a
    sample is that much longer and comes in pieces, which makes sense when the state is carried (TBPTT).
    `starts` marks first pieces. Lanes are out of step, their first samples shorter, so that some sample ends
    in every batch: one without any answer would have no loss. Samples are drawn by (seed, number), from the
    tasks in turn.

    Args:
        tasks: the tasks to draw from in turn.
        length: T, tokens of a row.
        rows: how many.
        lanes: rows of a batch, of all ranks together.
        windows: rows of a sample.
        seed: random seed of everything drawn; evaluation draws from other streams.
        answers_only: the loss is on answers; otherwise on every token, prompts included.

    Raises:
        LongrollError: for numbers below 1 and fewer lanes than windows; while reading, for a length too short
            for the task.
    """

    def __init__(
        self,
        tasks: list[Task],
        length: int,
        rows: int,
        *,
        lanes: int = 1,
        windows: int = 1,
        seed: int = 0,
        answers_only: bool = True,
    ) -> None:
        if min(length, rows, lanes, windows) < 1 or not tasks:
            raise LongrollError(
                f"{len(tasks)} tasks, length {length}, {windows} windows: there is nothing to draw."
            )
        if lanes < windows:
            raise LongrollError(
                f"`windows` {windows}: a batch of {lanes} rows is too small for a sample to end in each."
            )
        self.tasks, self.length, self.rows, self.lanes = tasks, length, rows, lanes
        self.windows, self.seed, self.answers_only = windows, seed, answers_only

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Item:
        step, lane = divmod(range(self.rows)[index], self.lanes)
        ahead = lane % self.windows
        turn, window = divmod(step + ahead, self.windows)
        first = 0 if turn else ahead  # windows that this sample goes without
        number = turn * self.lanes + lane
        task = self.tasks[number % len(self.tasks)]
        whole = (self.windows - first) * self.length + 1  # one more: the last input has a target
        sample = task.sample(whole, rng=random_of(TRAINING, self.seed, number))
        ids, learned = row_of(sample, whole, answers_only=self.answers_only)
        labels = np.where(learned, ids[1:], IGNORED)
        piece = slice((window - first) * self.length, (window - first + 1) * self.length)
        return {
            "input_ids": torch.from_numpy(ids[:-1][piece]),
            "shift_labels": torch.from_numpy(labels[piece]),
            "starts": torch.tensor(window == first),
        }


def row_of(sample: Sample, whole: int, *, answers_only: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids (whole,) int64 of a row with a sample, and which targets are learned (whole - 1,).

    A haystack of whole lines may leave room: what follows the answer is text again, and not learned.
    """
    ids = np.resize(sample.tokens, whole).astype(np.int64)
    place = np.arange(1, whole)
    first_learned = len(sample.prompt) if answers_only else 0
    learned = (place >= first_learned) & (place < len(sample.tokens))
    if sample.learned is not None:
        answer = slice(len(sample.prompt) - 1, len(sample.tokens) - 1)
        learned[answer] &= sample.learned[: max(0, whole - len(sample.prompt))]
    return ids, learned


def training_rows(
    task: str,
    tokenizer: Tokenizer,
    *,
    length: int,
    rows: int,
    lanes: int = 1,
    windows: int = 1,
    seed: int = 0,
    haystack: Haystack | None = None,
    instruction: bool = True,
    facts: str | None = None,
    books: str = "none",
    kinds: Sequence[str] = QAS,
    groups: Sequence[str] = GROUPS,
    pairs: int = PAIRS,
) -> TaskRows | CopyRows | TrackingRows:
    """Return rows of a task by its name, to train on.

    Args:
        task: one of `TASKS`.
        tokenizer: the tokenizer of the model.
        length: T, tokens of a row.
        rows: how many.
        lanes: rows of a batch, of all ranks together.
        windows: rows of a sample.
        seed: random seed of everything drawn.
        haystack: what a passkey is hidden in; default: noise.
        instruction: begin a passkey's prompt with the description of the task.
        facts: bAbI's files, for babilong.
        books: what babilong hides its facts in.
        kinds: which of babilong's tasks.
        groups: whose words tracking reads, in turn.
        pairs: keys of a sample of recall.

    Raises:
        LongrollError: for another name, for babilong without facts, and as `TaskRows` and `CopyRows`.
    """
    if task == "copying":
        return CopyRows(Copying(tokenizer), rows, context=length, seed=seed)
    if task == "tracking":
        words = [StateTracking(tokenizer, group) for group in groups]
        return TrackingRows(words, length, rows, seed=seed)
    tasks = open_tasks(
        task,
        tokenizer,
        train=True,
        haystack=haystack,
        instruction=instruction,
        facts=facts,
        books=books,
        kinds=kinds,
        pairs=pairs,
    )
    return TaskRows(tasks, length, rows, lanes=lanes, windows=windows, seed=seed)


def open_tasks(
    task: str,
    tokenizer: Tokenizer,
    *,
    train: bool,
    haystack: Haystack | None = None,
    instruction: bool = True,
    facts: str | None = None,
    books: str = "none",
    kinds: Sequence[str] = QAS,
    pairs: int = PAIRS,
) -> list[Task]:
    """Return what `training_rows` draws from, by its name; `train`: of the training side of babilong's text.

    Raises:
        LongrollError: for another name, copying and tracking among them, and for babilong without facts.
    """
    if task == "babilong":
        if facts is None:
            raise LongrollError("`task` babilong needs `facts`: the folder of bAbI's files.")
        return [*open_babilong(tokenizer, facts, books, kinds, few_shot=False, train=train)]
    if task == "niah":
        return [Niah(tokenizer, new_tokens=len(tokenizer.encode(" 1234567")) + 1)]
    if task == "passkey":
        return [Passkey(tokenizer, haystack=haystack, instruction=instruction)]
    if task == "variables":
        return [Variables(tokenizer, new_tokens=len(tokenizer.encode(" ABCDE" * (HOPS + 1))) + 1)]
    if task == "recall":
        return [Recall(tokenizer, pairs)]
    raise LongrollError(f"`task` {task} is not one of {', '.join(TASKS)}.")
