"""Effective remembrance: how much the tokens before t still matter for the prediction at T."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from longroll.errors import LongrollError
from longroll.printable import printable
from longroll.report import units
from longroll.report.figures._axes import even_ticks, finite_range, name_axes
from longroll.report.figures._canvas import canvas
from longroll.report.figures._labels import name_curves
from longroll.report.figures._tiles import ink_on, scale_key, tiles
from longroll.report.runs import AnyRun, Run, as_run, numbers, ordered
from longroll.report.style import MUTED, WEB, Look, RunStyle, run_styles
from longroll.results import Remembrance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DISTANCES = {"tv": "total variation", "js": "Jensen-Shannon", "kl": "KL divergence"}


def common_ends(runs: Sequence[Run]) -> list[int]:
    """List the ends T that every run with a remembrance section was measured at."""
    ends = [set(run.remembrance.ends) for run in runs if run.remembrance]
    return sorted(set.intersection(*ends)) if ends else []


def remembrance_curves(runs: Sequence[AnyRun], end: int | None = None, *, look: Look = WEB) -> "Figure":
    """Draw EffRem_T(t) over t for one end T, one curve for each run.

    Args:
        runs: Diagnoses; those without a remembrance section are left out.
        end: The end T; by default the largest one that all runs share.
        look: The medium.
    """
    runs = ordered(runs)
    shared = common_ends(runs)
    if end is None and shared:
        end = shared[-1]
    if end is None or end not in shared:
        raise LongrollError(f"No common remembrance end {end}: the runs share {shared or 'none'}.")
    drawn = [
        (run.remembrance, style) for run, style in zip(runs, run_styles(runs), strict=True) if run.remembrance
    ]
    with canvas(look, look.aspect * look.points) as fig:
        ax = fig.add_subplot()
        ends: list[tuple[float, float]] = []
        shown: list[np.ndarray] = []
        for found, style in reversed(drawn):
            x, y, low, high = curve_at(found, end)
            zorder = 3 if style.role == "base" else 2.5
            ax.fill_between(x, low, high, color=style.color, alpha=0.13, linewidth=0, zorder=zorder - 1)
            ax.plot(x, y, color=style.color, linestyle=style.dash, zorder=zorder)
            ends.insert(0, (x[-1], y[-1]) if x.size else (np.nan, np.nan))
            shown += [y, high]
        top = max(finite_range(shown)[1], 0.1)
        ax.set_ylim(0, min(1.06 * top, 1.02) if top <= 1 else 1.06 * top)
        ax.set_xlim(0, end)
        heights = even_ticks(*ax.get_ylim(), 6)
        ax.set_yticks(heights, [units.tick(t) for t in heights])
        ticks = [end * i / 4 for i in range(5)]
        ax.set_xticks(ticks, [units.position(t) for t in ticks])
        distance = printable(drawn[0][0].distance or "tv")
        what = f"effective remembrance at T = {units.position(end)} ({DISTANCES.get(distance, distance)})"
        name_axes(ax, "t, the first token kept", what if look.columns > 2 else "effective remembrance", look)
        name_curves(fig, ax, [style for _, style in drawn], ends, look)
    return fig


def remembrance_map(
    run: AnyRun, *, top: float | None = None, look: Look = WEB, style: RunStyle | None = None
) -> "Figure":
    """Draw effective remembrance for every start t (columns) and end T (rows) of one run.

    Where starts and ends share a grid only its starts are drawn: those close to an end are for the curves.

    Args:
        run: A diagnosis with a remembrance section.
        top: The value that gets the full tone, one for all runs to be compared; by default the largest.
        look: The medium.
        style: The run's style among others; by default that of a base.
    """
    style = style or run_styles([run])[0]
    found = as_run(run).remembrance
    if found is None:
        raise LongrollError("The run holds no remembrance to draw.")
    starts, ends = found.starts, found.ends
    values = numbers(found.mean).T  # (ends, starts): T runs down the page
    grid = [i for i, start in enumerate(starts) if start == 0 or start in ends]
    if len(grid) > 2:
        starts, values = [starts[i] for i in grid], values[:, grid]
    cell = min(0.88 * look.points / max(len(starts), 1), 3 * look.text)
    height = max(len(ends) * max(0.8 * cell, 1.7 * look.text), 4 * look.text) + 5.2 * look.text
    top = top or largest_remembrance(found)
    with canvas(look, height) as fig:
        ax = fig.add_subplot()
        tiles(ax, values, style.tone, top)
        longest = 0.62 * max(len(units.position(s)) for s in starts) + 0.8  # in ems
        every = max(1, int(np.ceil(len(starts) * longest * look.small / (0.86 * look.points))))
        columns = range(0, len(starts), every)
        ax.set_xticks([i + 0.5 for i in columns], [units.position(starts[i]) for i in columns])
        ax.set_yticks([i + 0.5 for i in range(len(ends))], [units.position(e) for e in ends])
        ax.set_xlabel("t, the first token kept")
        if look.upright:
            ax.set_title("T, the token predicted", loc="left", pad=0.7 * look.text, color=MUTED.light)
        else:
            ax.set_ylabel("T")
            ax.set_title(" ", pad=0.7 * look.text)  # keeps the strip for the key
        if cell >= 2.6 * look.small:
            for (row, column), value in np.ndenumerate(values):
                ax.text(
                    column + 0.5, row + 0.5, units.share(value), ha="center", va="center",
                    fontsize=0.92 * look.small, color=ink_on(value, top, style.tone),
                )  # fmt: skip
        else:
            scale_key(ax, style.tone, "0", units.share(top), look)
    return fig


def largest_remembrance(found: Remembrance) -> float:
    """Return the largest effective remembrance of a run; at least 0.1, so that noise stays pale."""
    return max(finite_range([numbers(found.mean)])[1], 0.1)


def curve_at(found: Remembrance, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return starts, remembrance and interval at one end, without the starts that lie past it."""
    x, column = numbers(found.starts), found.ends.index(end)
    y = numbers(found.mean)[:, column]
    low, high = (numbers(table)[:, column] if table else y for table in (found.low, found.high))
    keep = np.isfinite(y)
    return x[keep], y[keep], low[keep], high[keep]
