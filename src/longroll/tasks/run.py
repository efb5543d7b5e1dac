"""Measure a task over a grid, or go on where its result file ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longroll import ranks
from longroll.model import RecurrentLM
from longroll.results import TaskResult, check_settings, read_results
from longroll.tasks.baselines import make_reading
from longroll.tasks.evaluate import Cell, Row, evaluate_grid, fingerprint, task_result


def run_task(
    lm: RecurrentLM,
    rows: Sequence[Row],
    lengths: Sequence[int],
    *,
    train_length: int | None = None,
    samples: int = 20,
    batch_size: int = 16,
    reading: str = "plain",
    window: int | None = None,
    label: str | None = None,
    seed: int = 0,
    file: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> TaskResult:
    """Measure every cell of a grid that `file` does not hold yet.

    Args:
        lm: the model.
        rows: rows of the grid; all have one task.
        lengths: its columns, in the task's unit.
        train_length: where figures draw the edge of training, in the same unit.
        samples: samples of each cell.
        batch_size: samples read together.
        reading: how prompts are read, by its name in `longroll.tasks.baselines`.
        window: tokens that a reading works over; default: the model's training length.
        label: names the run in tables and figures; default: the model and the reading.
        seed: random seed of the samples.
        file: the result file; written after every cell.
        progress: called with how many samples are done.

    Where a process group is up, every rank must call this: samples are dealt to the ranks, rank 0 writes.

    Raises:
        LongrollError: for a file of something else, of another model or of other settings, and for what
            `evaluate_grid` and `make_reading` refuse.
    """
    task = rows[0].task
    window = window or lm.train_length
    settings = {"weights": fingerprint(lm), "samples": samples, "seed": seed, "reading": reading}
    settings |= {} if reading == "plain" else {"window": window}
    settings |= task.settings()
    dealt = not ranks.alone()
    cells = ranks.on_first(lambda: finished_cells(file, settings) if file else [])
    file = file if ranks.rank() == 0 else None  # the others hand over their part
    chosen = make_reading(reading, lm, window=window, rows=rows, length=max(lengths))
    began = time.perf_counter()

    def result(cells: Sequence[Cell]) -> TaskResult:
        return task_result(
            lm,
            cells,
            rows,
            lengths,
            label=label or (lm.name if reading == "plain" else f"{lm.name}, {reading}"),
            train_length=train_length,
            settings=settings,
            seed=seed,
            seconds=time.perf_counter() - began,
        )

    cells = evaluate_grid(
        lm,
        rows,
        lengths,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        reading=chosen,
        finished=cells,
        save=(lambda cells: result(cells).write(file)) if file else None,
        progress=progress,
        dealt=dealt,
    )
    found = result(cells)
    if file:
        found.write(file)
    return found


def finished_cells(file: Path, settings: dict[str, Any]) -> list[Cell]:
    """Return the cells of an earlier run with the same settings; none if there was none.

    Raises:
        LongrollError: the file holds something else, or the first setting that differs.
    """
    if not file.is_file():
        return []
    (before,) = read_results(
        file, TaskResult, otherwise="holds no results of a task: name another file, or remove it."
    )
    check_settings(file, before.settings, settings)
    return [cell.to_json() for cell in before.cells]
