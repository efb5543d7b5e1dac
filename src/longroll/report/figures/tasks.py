"""Task accuracy over length and depth (or kind): whether a flat loss curve also means a long memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from longroll.errors import LongrollError
from longroll.printable import printable
from longroll.report import units
from longroll.report.figures._axes import name_axes, position_axis, training_edge, value_axis
from longroll.report.figures._canvas import canvas
from longroll.report.figures._labels import name_curves
from longroll.report.figures._tiles import ink_on, tiles
from longroll.report.runs import AnyRun, Run, numbers, ordered, train_lengths
from longroll.report.style import MUTED, WEB, Look, RunStyle, run_styles
from longroll.results import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def task_heatmap(runs: Sequence[AnyRun], task: str = "passkey", *, look: Look = WEB) -> "Figure":
    """Draw accuracy over length (columns) and depth or kind (rows) of one task, one panel for each run.

    Args:
        runs: Diagnoses; those without the task are left out.
        task: The name of the task.
        look: The medium.
    """
    drawn = _having(runs, task)
    grids = [_values(grid) for _, _, grid in drawn]
    widest, tallest = max(g[2].shape[1] for g in grids), max(g[2].shape[0] for g in grids)
    across = 1 if widest > 9 or look.columns <= 2 else min(len(drawn), 2)
    down = -(-len(drawn) // across)
    cell = 0.8 * look.points / across / widest
    row = min(max(0.6 * cell, 2 * look.text), 3 * look.text)
    with canvas(look, down * (tallest * row + 3.2 * look.text) + 2 * look.text) as fig:
        axes = fig.subplots(down, across, squeeze=False).ravel()
        for ax in axes[len(drawn) :]:
            ax.remove()
        for i, ((run, style, grid), (lengths, depths, values), ax) in enumerate(
            zip(drawn, grids, axes, strict=False)
        ):
            tiles(ax, values, style.tone, 1.0)
            ax.set_title(style.label, loc="left", color=style.color, pad=0.55 * look.text)
            every = max(1, int(np.ceil(3.3 * look.small / cell)))
            ax.set_xticks(
                [k + 0.5 for k in range(0, len(lengths), every)],
                [units.position(n) for n in lengths[::every]],
            )
            ax.set_yticks([k + 0.5 for k in range(len(depths))], depths)
            if i >= len(drawn) - across:
                ax.set_xlabel(f"length in {printable(grid.unit or 'tokens')}")
            if i % across == 0 and grid.depths:
                ax.set_ylabel("depth")
            if cell >= 2.5 * look.small:
                for (r, c), value in np.ndenumerate(values):
                    ax.text(
                        c + 0.5, r + 0.5, units.share(value), ha="center", va="center",
                        fontsize=0.92 * look.small, color=ink_on(value, 1.0, style.tone),
                    )  # fmt: skip
            trained = sum(n <= run.train_length for n in lengths) if run.train_length else 0
            if 0 < trained < len(lengths):
                ax.axvline(trained, color=MUTED.light, linewidth=0.7 * look.line, linestyle=(0, (3, 2.4)))
    return fig


def task_curves(runs: Sequence[AnyRun], task: str, *, look: Look = WEB) -> "Figure":
    """Draw accuracy over length, one curve for each run, with its 95 % interval; rows are averaged.

    Args:
        runs: Diagnoses or results of tasks; those without the task are left out.
        task: The name of the task.
        look: The medium.
    """
    drawn = _having(runs, task)
    grids = [_values(grid) for _, _, grid in drawn]
    train = train_lengths([run for run, *_ in drawn])
    low, high = (end([n for lengths, *_ in grids for n in lengths]) for end in (min, max))
    with canvas(look, look.points * look.aspect) as fig:
        ax = fig.subplots()
        ends = []
        for (_, style, grid), (lengths, names, values) in zip(drawn, grids, strict=True):
            mean = values[-1] if names[-1] == "mean" else values.mean(axis=0)
            ax.plot(
                lengths, mean, color=style.color, linestyle=style.dash, marker="o", markersize=2 * look.line
            )
            if len(values) == 1 and grid.low and grid.high:
                below, above = (numbers(end).ravel() for end in (grid.low, grid.high))
                ax.fill_between(lengths, below, above, color=style.color, alpha=0.13, linewidth=0)
            ends.append((lengths[-1], mean[-1]))
        position_axis(ax, low / 1.1, high * 1.1, train, 8 if look.upright else 6, scale=look.x)
        value_axis(ax, 0, 1, log=False, zero=True)
        training_edge(ax, train, look)
        metric = printable(drawn[0][2].metric or "accuracy").replace("_", " ")
        name = metric if metric == "accuracy" else f"{metric} accuracy"
        name_axes(ax, f"length in {printable(drawn[0][2].unit or 'tokens')}", name, look)
        name_curves(fig, ax, [style for _, style, _ in drawn], ends, look)
    return fig


def task_figure(runs: Sequence[AnyRun], task: str, *, look: Look = WEB) -> "Figure":
    """Draw one task: curves where there is one row and no length 0 (BABILong's 0k), a map else."""
    grids = [_values(grid) for _, _, grid in _having(runs, task)]
    single = all(len(names) == 1 and min(lengths) > 0 for lengths, names, _ in grids)
    return (task_curves if single else task_heatmap)(runs, task, look=look)


def _having(runs: Sequence[AnyRun], task: str) -> list[tuple[Run, RunStyle, Grid]]:
    """Return the runs that hold the task, each with its style and the table of the task."""
    runs = ordered(runs)
    having = [
        (run, style, run.tasks[task])
        for run, style in zip(runs, run_styles(runs), strict=True)
        if run.tasks and task in run.tasks
    ]
    if not having:
        raise LongrollError(f"No run holds the task {task!r}.")
    return having


def _values(grid: Grid) -> tuple[list[int], list[str], np.ndarray]:
    """Return lengths, names of the rows and accuracy as (rows, lengths)."""
    return grid.lengths, [printable(name) for name in grid.names], numbers(grid.accuracy).T
