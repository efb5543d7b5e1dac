"""A task over a grid of lengths and depths (or kinds), cell by cell, so that a run can be interrupted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from longroll import ranks
from longroll.errors import LongrollError
from longroll.measure.bootstrap import bootstrap_mean
from longroll.model import RecurrentLM
from longroll.results import TaskResult, provenance
from longroll.results import fingerprint as fingerprint  # used beside `evaluate_grid`
from longroll.sizes import check_bytes, check_tokens
from longroll.tasks._task import EVALUATION, Task, random_of
from longroll.tasks.generate import Reading, answer, prefill_samples

Cell = dict[str, Any]
"""`length`, `row`, `samples`, `prompt_tokens`, `seconds`, `scores` {name: {mean, low, high}} and some
`examples`."""

EXAMPLES = 3
"""Answers kept of each cell, to be looked at."""
_Z = 1.959963984540054  # of 95 %


class Row(NamedTuple):
    """One row of the grid: its name in tables (a depth, "qa1", ...), the task, and the depth."""

    name: float | str | None
    task: Task
    depth: float | None = None


def evaluate_grid(
    lm: RecurrentLM,
    rows: Sequence[Row],
    lengths: Sequence[int],
    *,
    samples: int,
    batch_size: int = 16,
    seed: int = 0,
    reading: Reading = prefill_samples,
    finished: Sequence[Cell] = (),
    save: Callable[[list[Cell]], object] | None = None,
    progress: Callable[[int], None] | None = None,
    dealt: bool = False,
) -> list[Cell]:
    """Measure every cell, the shortest lengths first.

    Sample i of a cell is drawn by (seed, length, depth, i): other cells, batch sizes and machines do not
    change it.

    Args:
        lm: the model.
        rows: rows of the grid.
        lengths: its columns, in tokens.
        samples: samples of each cell.
        batch_size: samples read together.
        seed: random seed of the samples.
        reading: how prompts are read; `longroll.tasks.baselines` has others.
        finished: cells measured before, with the same settings: these are kept.
        save: called with all cells after each new one.
        progress: called with how many samples are done, kept ones included.
        dealt: deal the samples of each cell to the ranks, each of which must call this and gets all cells.

    Returns:
        The cells of the grid, kept ones included.

    Raises:
        LongrollError: for no samples, and lengths too short for the task.
    """
    if samples < 1 or batch_size < 1:
        raise LongrollError(f"`samples` {samples}, `batch_size` {batch_size}: both are at least 1.")
    rank, world_size = (ranks.rank(), ranks.world_size()) if dealt else (0, 1)
    together = min(batch_size, -(-samples // world_size))  # so that no rank waits for want of a batch
    _check_sizes(samples, together, len(rows), lengths, world_size)
    cells = list(finished)
    known = {(cell["length"], cell["row"]) for cell in cells}
    done = 0
    for length in sorted(lengths):
        for row in rows:
            if (length, row.name) not in known:
                cell = Cell(length=length, row=row.name, samples=samples)
                began = time.perf_counter()
                answered: dict[int, _Answered] = {}
                for start in range(rank * together, samples, world_size * together):
                    numbers = range(start, min(start + together, samples))
                    answered |= zip(numbers, _measure(lm, row, length, numbers, seed, reading), strict=True)
                    if progress is not None:
                        progress(done + len(answered))
                if dealt:
                    for part in ranks.gather(answered):
                        answered |= part
                in_order = [answered[number] for number in range(samples)]
                cells.append(cell | _summarise(in_order) | {"seconds": round(time.perf_counter() - began, 3)})
                if save is not None:
                    save(cells)
            done += samples
            if progress is not None:
                progress(done)
    return cells


def _check_sizes(samples: int, together: int, rows: int, lengths: Sequence[int], processes: int) -> None:
    check_bytes(f"`samples` {samples}", 400 * samples, "ask for fewer")  # their answers and scores
    longest = max(lengths, default=0)
    prompts = 12 * together * longest  # ids, in 4 and in 8 bytes
    check_bytes(f"`batch_size` {together} x `lengths` {longest}", prompts, "take fewer or shorter samples")
    tokens = samples * rows * sum(lengths)
    check_tokens(f"`samples` {samples} of each length", tokens // processes, "ask for fewer, or shorter ones")


class _Answered(NamedTuple):
    tokens: int
    scores: dict[str, float]
    target: str
    written: str


def _measure(
    lm: RecurrentLM, row: Row, length: int, numbers: range, seed: int, reading: Reading
) -> list[_Answered]:
    task = row.task
    depth = 0 if row.depth is None else 1 + round(1e6 * row.depth)
    batch = [
        task.sample(length, depth=row.depth, rng=random_of(EVALUATION, seed, length, depth, number))
        for number in numbers
    ]
    found = answer(
        lm, batch, new_tokens=task.new_tokens, stop_id=task.stop_id, forced=task.forced, reading=reading
    )
    return [
        _Answered(
            len(sample.prompt), task.score(sample, *ids), sample.target, task.tokenizer.decode(ids.written)
        )
        for sample, ids in zip(batch, found, strict=True)
    ]


def _summarise(answered: list[_Answered]) -> Cell:
    names = answered[0].scores
    return {
        "prompt_tokens": round(sum(one.tokens for one in answered) / len(answered)),
        "scores": {name: summary([one.scores[name] for one in answered]) for name in names},
        "examples": [{"target": one.target, "written": one.written} for one in answered[:EXAMPLES]],
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return mean and 95 % interval: Wilson's for scores that are 0 or 1, the bootstrap's else.

    Scores that are all alike have Wilson's, too: it is as wide as that of any scores from 0 to 1, and the
    bootstrap's would have no width.
    """
    mean = sum(values) / len(values)
    if set(values) <= {0.0, 1.0} or len(set(values)) == 1:
        low, high = wilson(sum(values), len(values))
    else:
        low, high = (end.item() for end in bootstrap_mean(torch.tensor(values)[:, None])[1:])
    return {"mean": mean, "low": low, "high": high}


def wilson(right: float, samples: int) -> tuple[float, float]:
    """Return the ends of Wilson's 95 % interval for `right` out of `samples` (Wilson 1927), good at 0 and 1
    too.
    """
    share, spread = right / samples, _Z**2 / samples
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def grid(cells: Sequence[Cell], rows: Sequence[Row], lengths: Sequence[int], score: str) -> dict[str, Any]:
    """Return what the figures draw of one score: `lengths`, `depths` or `rows`, and values (lengths, rows).

    Rows that are kinds, not depths, get their mean as one more row, as on BABILong's leaderboard.
    """
    found = {(cell["length"], cell["row"]): cell["scores"][score] for cell in cells}
    names = [row.name for row in rows]
    kinds = isinstance(names[0], str)
    table: dict[str, Any] = {"metric": score, "unit": rows[0].task.unit, "lengths": sorted(lengths)}
    table["rows" if kinds else "depths"] = [name for name in names if name is not None]
    for key, end in (("accuracy", "mean"), ("low", "low"), ("high", "high")):
        table[key] = [[found[length, name][end] for name in names] for length in table["lengths"]]
    guessed = [row.task.chance for row in rows]
    if any(guessed):
        table["chance"] = guessed
    if kinds and len(names) > 1:
        table["rows"].append("mean")
        for values in table["accuracy"]:
            values.append(sum(values) / len(values))
        for values in [*table["low"], *table["high"]]:
            values.append(None)
        if any(guessed):
            table["chance"].append(sum(guess or 0 for guess in guessed) / len(guessed))
    return table


def task_result(
    lm: RecurrentLM,
    cells: Sequence[Cell],
    rows: Sequence[Row],
    lengths: Sequence[int],
    *,
    label: str,
    train_length: int | None,
    settings: dict[str, Any],
    seed: int,
    seconds: float,
) -> TaskResult:
    """Return what a result file holds: the cells, and once the grid is whole, its tables.

    Args:
        lm: the model.
        cells: measured so far.
        rows: rows of the grid.
        lengths: lengths of the grid, in tokens.
        label: names the run in tables and figures; "base", "sp", "fitted noise", ... give it their colours.
        train_length: where figures draw the edge of training.
        settings: what has to be the same for more cells to be added.
        seed: random seed of the samples.
        seconds: that it took.
    """
    task = rows[0].task
    result: dict[str, Any] = {
        "task": task.name,
        "label": label,
        "model": lm.name,
        "train_length": train_length,
        "settings": settings,
        "cells": list(cells),
        "provenance": provenance(lm, seed=seed, seconds=seconds),
    }
    held = {(cell["length"], cell["row"]) for cell in cells}
    if held >= {(length, row.name) for length in lengths for row in rows}:
        others = [name for name in cells[0]["scores"] if name != task.metric]
        names = {task.name: task.metric} | {f"{task.name}_{name}": name for name in others}
        result["tasks"] = {key: grid(cells, rows, lengths, name) for key, name in names.items()}
    return TaskResult.from_json(result, source=task.name)
