"""Coverage: how far the states past the training length lie from those of training, by layer and head."""

from typing import TYPE_CHECKING, Any

import numpy as np

from longroll.errors import LongrollError
from longroll.report import units
from longroll.report.figures._axes import finite_range
from longroll.report.figures._canvas import canvas
from longroll.report.figures._tiles import ink_on, scale_key, tiles
from longroll.report.runs import AnyRun, as_run, numbers
from longroll.report.style import ABOVE, BELOW, MUTED, WEB, Look
from longroll.results import Coverage

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def coverage_map(
    run: AnyRun, *, top: float | None = None, signed: bool | None = None, look: Look = WEB
) -> "Figure":
    """Draw the standardised shift of every head as a tile; a dot marks a shift that is significant.

    Args:
        run: A diagnosis with a coverage section.
        top: The shift that gets the full tone, one for all runs to be compared; by default the largest.
        signed: Whether the scale runs both ways; by default when the run has negative shifts.
        look: The medium.
    """
    found = as_run(run).coverage
    if found is None:
        raise LongrollError("The run holds no coverage to draw.")
    values = numbers(found.map)  # (layers, heads)
    mark = numbers(found.significant) == 1 if found.significant else None
    names = layer_names(found)
    heads = [str(i) for i in range(values.shape[1])]
    ticks, axes = (names, heads), ("layer", "head")  # (y, x)
    if len(heads) == 1:  # a model without heads: one strip of layers instead of one tall column
        values, mark = values.T, None if mark is None else mark.T
        ticks, axes = ([""], names), ("", "layer")
    rows, columns = values.shape
    top = top or largest_shift(found)
    below = BELOW if (has_negative(found) if signed is None else signed) else None
    side = min(0.88 * look.points / max(columns, 1), 2.4 * look.text)
    height = rows * max(min(side, 2 * look.text), 5) + 6 * look.text
    with canvas(look, max(height, (9 if rows > 1 else 7.5) * look.text)) as fig:
        ax = fig.add_subplot()
        tiles(ax, values, ABOVE, top, below)
        if mark is not None:
            for row, column in np.argwhere(mark & np.isfinite(values)):
                color = ink_on(values[row, column], top, ABOVE if values[row, column] >= 0 else BELOW)
                size = max(0.16 * side, 1.2)
                ax.plot(column + 0.5, row + 0.5, "o", color=color, markersize=size, markeredgewidth=0)
        _count(ax.set_xticks, ticks[1], 0.86 * look.points, 2.4 * look.small)
        _count(ax.set_yticks, ticks[0], height - 6 * look.text, 1.25 * look.small)
        ax.set_xlabel(axes[1])
        ax.set_title(
            axes[0] if look.upright and axes[0] else " ", loc="left", pad=0.7 * look.text, color=MUTED.light
        )
        if not look.upright:
            ax.set_ylabel(axes[0])
        scale_key(ax, ABOVE, units.minus(f"-{_short(top)}") if below else "0", _short(top), look, below)
    return fig


def largest_shift(found: Coverage) -> float:
    """Return the largest standardised shift of a run, in either direction."""
    return max(*(abs(v) for v in finite_range([numbers(found.map)])), 1e-9)


def has_negative(found: Coverage) -> bool:
    """Say whether some head of a run lies below the range seen in training."""
    return finite_range([numbers(found.map)])[0] < 0


def layer_names(found: Coverage) -> list[str]:
    """Name the rows of the map."""
    return [str(layer) for layer in found.layers or range(len(found.map))]


def _count(set_ticks: Any, names: list[str], length: float, size: float) -> None:
    """Label every tile, or every second, fourth, ... so that labels of `size` points fit in `length`."""
    every = 1
    while len(names) / every * size > max(length, size):
        every *= 2
    kept = range(0, len(names), every)
    set_ticks([i + 0.5 for i in kept], [names[i] for i in kept])


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"
