"""Axes shared by the figures: positions in octaves, values, the training edge."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from longroll.report import units
from longroll.report.style import MUTED, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def octaves(low: float, high: float, anchor: float | None, most: int) -> list[float]:
    """Choose at most `most` ticks a whole number of octaves apart, one of them on `anchor` if given."""
    for stride in range(1, 24):
        base = anchor or 1.0
        first = int(np.ceil(np.log2(low / base) / stride - 1e-9))
        last = int(np.floor(np.log2(high / base) / stride + 1e-9))
        if last - first < most:
            return [base * 2.0 ** (stride * i) for i in range(first, last + 1)]
    return [low, high]


def position_axis(
    ax: "Axes", low: float, high: float, train: Sequence[int], most: int, *, scale: str = "log"
) -> None:
    """Make x an axis of positions: log, labelled in octaves of the training length, or linear."""
    from matplotlib.ticker import NullLocator

    if scale == "log":
        ax.set_xscale("log", base=2)
    ax.set_xlim(low, high)
    anchor = float(train[0]) if len(train) == 1 else None
    ticks = octaves(low, high, anchor, most) if scale == "log" else whole_strides(low, high, most)
    ax.set_xticks(ticks, [units.position(t) for t in ticks])
    ax.xaxis.set_minor_locator(NullLocator())


def whole_strides(low: float, high: float, most: int) -> list[float]:
    """Choose at most `most` ticks in [low, high] at multiples of one power of two."""
    stride = 2.0 ** np.ceil(np.log2(high / (most - 1)))
    return [stride * i for i in range(int(np.ceil(low / stride)), int(high / stride) + 1)]


def value_axis(ax: "Axes", low: float, high: float, *, log: bool, most: int = 6, zero: bool = False) -> None:
    """Make y a linear axis (from zero if so asked) or a log axis over [low, high], with round ticks."""
    from matplotlib.ticker import NullLocator

    if log and low > 0:
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(NullLocator())
        margin = (high / low) ** 0.05
        ax.set_ylim(low / margin, high * margin)
        ticks = round_ticks(low / margin, high * margin, most)
    else:
        low = min(low, 0.0) if zero else low
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        ax.set_ylim(low if zero else low - margin, high + margin)
        ticks = even_ticks(*ax.get_ylim(), most)
    ax.set_yticks(ticks, [units.tick(t) for t in ticks])


def even_ticks(low: float, high: float, most: int) -> list[float]:
    """Choose at most `most` round ticks at even distances in [low, high]."""
    from matplotlib.ticker import MaxNLocator

    slack = 1e-9 * (high - low)
    ticks = MaxNLocator(most - 1, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(round(t, 12)) for t in ticks if low - slack <= t <= high + slack]


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """Choose at most `most` log ticks: a few a decade, then one, then whole decades ever further apart."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for leads in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [lead * 10.0**k for k in decades for lead in leads]
        ticks = [t for t in ticks if low <= t <= high]
        if 2 <= len(ticks) <= most:
            return ticks
    whole = [10.0**k for k in decades if low <= 10.0**k <= high]
    return whole[:: max(1, -(-len(whole) // most))] if len(whole) > 1 else [low, high]


def training_edge(ax: "Axes", train: Sequence[int], look: Look, *, named: bool = True) -> None:
    """Draw a dashed line at each training length, with its name above the axes."""
    low, high = ax.get_xlim()
    for length in train:
        if not low <= length <= high:
            continue
        ax.axvline(length, color=MUTED.light, linewidth=0.6 * look.line, linestyle=(0, (3, 2.4)), zorder=1.5)
        if named:
            place = ax.transLimits.transform(ax.transScale.transform((length, ax.get_ylim()[0])))
            late = place[0] > 0.7
            ax.annotate(
                f"trained to {units.position(length)}",
                (length, 1),
                xycoords=ax.get_xaxis_transform(),
                xytext=(0, 0.35 * look.small),
                textcoords="offset points",
                ha="right" if late else "left",
                va="bottom",
                color=MUTED.light,
                fontsize=look.small,
            )


def name_axes(ax: "Axes", x: str, y: str, look: Look) -> None:
    """Name both axes; on the web y stands upright, above the remark at the training edge."""
    ax.set_xlabel(x)
    if look.upright:
        ax.set_title(y, loc="left", pad=2.1 * look.small, color=MUTED.light)
    else:
        ax.set_ylabel(y)


def finite_range(arrays: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the least and the greatest finite value; (0, 1) when there is none."""
    values = np.concatenate([np.ravel(a) for a in arrays]) if arrays else np.array([])
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
