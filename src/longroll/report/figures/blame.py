"""Which side of a hybrid does the damage: what each reading of the far text recovers of it."""

from typing import TYPE_CHECKING

import numpy as np

from longroll.report import units
from longroll.report.figures._axes import even_ticks, finite_range, name_axes
from longroll.report.figures._canvas import canvas
from longroll.report.runs import AnyRun, as_run, number
from longroll.report.style import ABOVE, BELOW, INK, MUTED, WEB, Look, Tone
from longroll.results import BlameResult, BlameShare

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def blame_rows(found: BlameResult) -> list[tuple[str, BlameShare, Tone]]:
    """Return rows of the figure, from the top: readings of the states, of attention, of both, and the two
    parts.
    """
    rows = [(f"states: {share.what}", share, BELOW) for share in found.states]
    rows += [(f"attention: {share.what}", share, ABOVE) for share in found.attentions]
    if found.together is not None:
        rows.append((f"both: {found.together.what}", found.together, INK))
    tones = {"state": BELOW, "attention": ABOVE}
    rows += [(f"part of the {share.what}", share, tones.get(share.what, INK)) for share in found.parts]
    return rows


def blame_figure(run: AnyRun, *, look: Look = WEB) -> "Figure":
    """Draw the share of the damage that each reading recovers, with its 95 % interval over texts.

    Args:
        run: A diagnosis with a blame section.
        look: The medium.
    """
    found = as_run(run).blame
    rows = blame_rows(found) if found is not None else []
    values = np.array([[number(end) for end in (s.low, s.recovered, s.high)] for _, s, _ in rows]) * 100
    values = values.reshape(-1, 3)
    with canvas(look, (len(rows) + 3.5) * 1.9 * look.small) as fig:
        ax = fig.add_subplot()
        heights = np.arange(len(rows))[::-1]
        for height, (low, middle, high), (_, _, tone) in zip(heights, values, rows, strict=True):
            ax.plot([low, high], [height, height], color=tone.light, linewidth=look.line, alpha=0.45)
            ax.plot([middle], [height], "o", color=tone.light, markersize=2.6 * look.line)
        least, most = finite_range([values])
        ax.set_xlim(min(least, 0.0) - 6, max(most, 100.0) + 6)
        ticks = even_ticks(*ax.get_xlim(), 6)
        ax.set_xticks(ticks, [units.tick(tick) for tick in ticks])
        for mark in (0, 100):
            ax.axvline(mark, color=MUTED.light, linewidth=0.6 * look.line, zorder=1)
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.set_yticks(heights, [name for name, _, _ in rows])
        name_axes(ax, "% of the damage recovered", "", look)
    return fig
