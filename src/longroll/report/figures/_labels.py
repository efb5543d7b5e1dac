"""Name the curves: at their ends where that is clear, in one quiet row above the figure otherwise."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from longroll.report.style import INK, Look, RunStyle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def name_curves(
    fig: "Figure", ax: "Axes", styles: Sequence[RunStyle], ends: Sequence[tuple[float, float]], look: Look
) -> None:
    """Write each label at the end (x, y) of its curve, or a legend when the labels would collide or crowd."""
    if not _at_ends(fig, ax, styles, ends, look):
        legend(fig, styles, look)


def legend(fig: "Figure", styles: Sequence[RunStyle], look: Look) -> None:
    """Put one row (or a few) of names above the figure."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=s.color, linestyle=s.dash, linewidth=look.line) for s in styles]
    names = [f"\u200b{s.label}" if s.label.startswith("_") else s.label for s in styles]  # "_" hides an entry
    widths = [_width(fig, name, look) + 4.8 * look.text for name in names]
    columns = len(names)
    if sum(widths) > 0.97 * look.points:
        most = max(1, min(len(names), int(0.97 * look.points / max(widths))))
        columns = -(-len(names) // -(-len(names) // most))  # rows of equal length
    fig.legend(
        handles,
        names,
        loc="outside upper left",
        ncols=columns,
        handlelength=2.4,
        columnspacing=1.6,
        borderaxespad=0.2,
        borderpad=0.1,
        labelcolor=INK.light,
    )


def _at_ends(
    fig: "Figure", ax: "Axes", styles: Sequence[RunStyle], ends: Sequence[tuple[float, float]], look: Look
) -> bool:
    """Try direct labels; False, with nothing drawn, when they would not read well."""
    if not styles or not np.isfinite(np.asarray(ends, dtype=float)).all():
        return False
    if max(_width(fig, s.label, look) for s in styles) > (0.2 if look.upright else 0.16) * look.points:
        return False
    fig.draw_without_rendering()  # the axes get their place; only then are distances known
    pixels = ax.transData.transform(np.asarray(ends, dtype=float))
    if np.ptp(pixels[:, 0]) > 0.02 * look.points or pixels[:, 0].min() < ax.bbox.x1 - 0.1 * look.points:
        return False  # a curve that ends early would have its label on top of another curve
    gap = 1.3 * look.text
    wanted = pixels[:, 1]
    placed = spread(wanted, gap, ax.bbox.y0 + gap / 2, ax.bbox.y1 - gap / 2)
    if np.abs(placed - wanted).max() > 1.6 * gap:
        return False
    for style, (x, y), shift in zip(styles, ends, placed - wanted, strict=True):
        ax.annotate(
            style.label,
            (x, y),
            xytext=(0.6 * look.text, shift),
            textcoords="offset points",
            va="center",
            color=style.color,
            annotation_clip=False,
        )
    return True


def spread(wanted: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Move numbers as little as possible so that neighbours are `gap` apart and all lie in [low, high].

    Numbers closer than the gap are pooled and centred on their mean, as in isotonic regression.
    """
    order = np.argsort(wanted, kind="stable")
    pools: list[list[float]] = []  # each: sum of (wanted - rank * gap), count
    for rank, i in enumerate(order):
        pools.append([float(wanted[i]) - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + count]
    level = np.concatenate([[total / count] * int(count) for total, count in pools])
    level = np.clip(level, low, max(low, high - (len(wanted) - 1) * gap))
    placed = np.empty(len(wanted))
    placed[order] = level + gap * np.arange(len(wanted))
    return placed


def _width(fig: "Figure", text: str, look: Look) -> float:
    """Measure a text in points."""
    artist = fig.text(0, 0, text, fontsize=look.text)
    width = artist.get_window_extent().width * 72 / fig.dpi
    artist.remove()
    return float(width)
