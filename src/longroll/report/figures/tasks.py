"""Task accuracy over length and depth: whether a flat loss curve also means a long memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from longroll.errors import LongrollError
from longroll.report import units
from longroll.report.figures._canvas import canvas
from longroll.report.figures._tiles import ink_on, tiles
from longroll.report.runs import Run, numbers, ordered, section
from longroll.report.style import MUTED, WEB, Look, run_styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def task_heatmap(runs: Sequence[Run], task: str = "passkey", *, look: Look = WEB) -> "Figure":
    """Draw accuracy over length (columns) and depth (rows) of one task, a panel a run.

    Args:
        runs: Diagnoses; those without the task are left out.
        task: The name of the task.
        look: The medium.
    """
    runs = ordered(runs)
    drawn = [
        (run, style)
        for run, style in zip(runs, run_styles(runs), strict=True)
        if (section(run, "tasks") or {}).get(task)
    ]
    if not drawn:
        raise LongrollError(f"No run holds the task {task!r}.")
    grids = [_grid(run, task) for run, _ in drawn]
    widest, tallest = max(g[2].shape[1] for g in grids), max(g[2].shape[0] for g in grids)
    across = 1 if widest > 9 or look.columns <= 2 else min(len(drawn), 2)
    down = -(-len(drawn) // across)
    cell = 0.8 * look.points / across / widest
    row = min(max(0.6 * cell, 2 * look.text), 3 * look.text)
    with canvas(look, down * (tallest * row + 3.2 * look.text) + 2 * look.text) as fig:
        axes = fig.subplots(down, across, squeeze=False).ravel()
        for ax in axes[len(drawn) :]:
            ax.remove()
        for i, ((run, style), (lengths, depths, values), ax) in enumerate(
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
                ax.set_xlabel("length in tokens")
            if i % across == 0 and any(depths):
                ax.set_ylabel("depth")
            if cell >= 2.5 * look.small:
                for (r, c), value in np.ndenumerate(values):
                    ax.text(
                        c + 0.5, r + 0.5, units.share(value), ha="center", va="center",
                        fontsize=0.92 * look.small, color=ink_on(value, 1.0, style.tone),
                    )  # fmt: skip
            trained = sum(n <= run["train_length"] for n in lengths) if run.get("train_length") else 0
            if 0 < trained < len(lengths):
                ax.axvline(trained, color=MUTED.light, linewidth=0.7 * look.line, linestyle=(0, (3, 2.4)))
    return fig


def _grid(run: Run, task: str) -> tuple[list[int], list[str], np.ndarray]:
    """Return lengths, names of the depths and accuracy as (depths, lengths); a task may have no depth."""
    found = run["tasks"][task]
    lengths = [int(n) for n in found["lengths"]]
    depths = [f"{float(d):g}" for d in found.get("depths") or []] or [""]
    values = numbers(found["accuracy"])
    if values.size != len(lengths) * len(depths):
        shape = f"{len(lengths)} lengths x {len(depths)} depths"
        raise LongrollError(f"Task {task!r}: accuracy has shape {values.shape}, not {shape}.")
    return lengths, depths, values.reshape(len(lengths), len(depths)).T
