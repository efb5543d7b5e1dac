"""Loss over position: the figure that tells whether a model survives its training length."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from longroll.report import units
from longroll.report.figures._axes import finite_range, name_axes, position_axis, training_edge, value_axis
from longroll.report.figures._canvas import canvas
from longroll.report.figures._labels import name_curves
from longroll.report.runs import AnyRun, Run, first_shown, number, numbers, ordered, train_lengths
from longroll.report.style import PAPER, WEB, Look, run_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def position_figure(runs: Sequence[AnyRun], unit: str = "perplexity", *, look: Look = WEB) -> "Figure":
    """Draw loss over position with its 95 % interval, one curve for each run.

    The first sixteenth of the training length is left out: there every model is cold, and its high loss would
    flatten the rest. A ring marks the position at which a run breaks.

    Args:
        runs: Diagnoses; the base is drawn solid, all others dashed.
        unit: "perplexity", "bits_per_byte" or "nats".
        look: The medium.
    """
    runs = ordered(runs)
    drawn = [(run, style) for run, style in zip(runs, run_styles(runs), strict=True) if run.curve]
    train = train_lengths(runs)
    first = first_shown(runs)
    with canvas(look, look.aspect * look.points) as fig:
        ax = fig.add_subplot()
        shown: list[np.ndarray] = []
        ends: list[tuple[float, float]] = []
        last = 2 * first
        for run, style in reversed(drawn):  # the base last: on top
            x, y, low, high = shown_curve(run, unit, first)
            zorder = 3 if style.role == "base" else 2.5
            ax.fill_between(x, low, high, color=style.color, alpha=0.13, linewidth=0, zorder=zorder - 1)
            ax.plot(x, y, color=style.color, linestyle=style.dash, zorder=zorder, solid_capstyle="round")
            shown += [y, low, high]
            good = np.isfinite(y)
            ends.insert(0, (x[good][-1], y[good][-1]) if good.any() else (np.nan, np.nan))
            last = max(last, *x[-1:], *((run.curve and run.curve.stop) or [])[-1:])
        least, most = finite_range(shown)
        value_axis(ax, least, most, log=most > 6 * least)
        position_axis(ax, first, last, train, most=12 if look.columns > 2 else 6, scale=look.x)
        for run, style in reversed(drawn):
            _ring(ax, run, unit, first, style.color, look)
        training_edge(ax, train, look)
        name_axes(ax, "position in tokens", units.UNITS[unit], look)
        name_curves(fig, ax, [style for _, style in drawn], ends, look)
    return fig


def shown_curve(run: Run, unit: str, first: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return positions, values and interval in the unit, from `first` on."""
    curve = run.curve
    assert curve is not None
    x = numbers(curve.position)
    size = run.bytes_per_token
    y = units.convert(numbers(curve.loss), unit, size)
    low, high = (units.convert(numbers(end), unit, size) if end else y for end in (curve.low, curve.high))
    low, high = (np.where(np.isfinite(y), band, np.nan) for band in (low, high))
    keep = x >= first
    return x[keep], y[keep], low[keep], high[keep]


def _ring(ax: "Axes", run: Run, unit: str, first: float, color: str, look: Look) -> None:
    """Mark the position at which the run breaks."""
    edge = number(run.edge)
    x, y, _, _ = shown_curve(run, unit, first)
    good = np.isfinite(y)
    if np.isfinite(edge) and good.any() and x[good][0] <= edge <= x[good][-1]:
        along = np.log if look.x == "log" else np.asarray
        value = np.interp(along(edge), along(x[good]), y[good])
        ax.plot(
            [edge], [value], "o", color=color, markerfacecolor=PAPER.light, markersize=3.4 * look.line,
            markeredgewidth=0.8 * look.line, zorder=4,
        )  # fmt: skip
