"""Loss above a fresh start: what reading on costs, whatever the text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from longroll.report import units
from longroll.report.figures._axes import even_ticks, finite_range, name_axes, position_axis, training_edge
from longroll.report.figures._canvas import canvas
from longroll.report.figures._labels import name_curves
from longroll.report.runs import AnyRun, numbers, ordered, train_lengths
from longroll.report.style import MUTED, WEB, Look, run_styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def excess_figure(runs: Sequence[AnyRun], *, look: Look = WEB) -> "Figure":
    """Draw the loss of reading on above that of a fresh start on the same tokens, one curve for each run.

    Args:
        runs: Diagnoses; those without an excess section are left out.
        look: The medium.
    """
    runs = ordered(runs)
    drawn = [(run.excess, style) for run, style in zip(runs, run_styles(runs), strict=True) if run.excess]
    train = train_lengths(runs)
    with canvas(look, look.aspect * look.points) as fig:
        ax = fig.add_subplot()
        shown: list[np.ndarray] = []
        ends: list[tuple[float, float]] = []
        first, last = np.inf, 2.0
        for excess, style in reversed(drawn):  # the base last: on top
            x, y, low, high = (numbers(v) for v in (excess.position, excess.mean, excess.low, excess.high))
            zorder = 3 if style.role == "base" else 2.5
            ax.fill_between(x, low, high, color=style.color, alpha=0.13, linewidth=0, zorder=zorder - 1)
            ax.plot(x, y, color=style.color, linestyle=style.dash, zorder=zorder)
            good = np.isfinite(y)
            ends.insert(0, (x[good][-1], y[good][-1]) if good.any() else (np.nan, np.nan))
            shown += [y, low, high]
            first, last = min(first, *x[:1]), max(last, *x[-1:])
        least, most = finite_range(shown)
        room = 0.06 * max(most - least, 0.1)
        ax.set_ylim(min(least, 0) - room, max(most, 0) + room)
        heights = even_ticks(*ax.get_ylim(), 6)
        ax.set_yticks(heights, [units.tick(t) for t in heights])
        ax.axhline(0, color=MUTED.light, linewidth=0.6 * look.line, zorder=1)
        first = min(first, *(length / 2 for length in train), last / 2)
        position_axis(ax, first, last, train, most=12 if look.columns > 2 else 6, scale=look.x)
        training_edge(ax, train, look)
        name_axes(ax, "position in tokens", "nats above a fresh start", look)
        name_curves(fig, ax, [style for _, style in drawn], ends, look)
    return fig
