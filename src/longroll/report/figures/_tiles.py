"""Heat maps of tiles in one tone: the value is the opacity, so a map reads the same on a light and a dark page."""

from typing import TYPE_CHECKING

import numpy as np

from longroll.report.style import INK, PAPER, Look, Tone

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS = 24  # shades of a tone: finer than the eye tells apart, few enough to draw each shade as one path


def tiles(ax: "Axes", values: np.ndarray, tone: Tone, top: float, below: Tone | None = None) -> None:
    """Draw a (rows, columns) array as tiles; NaN leaves its place empty.

    Args:
        ax: Where to draw; one unit a tile, the first row on top.
        values: What to show.
        tone: The tone of positive values.
        top: The magnitude that gets the full tone.
        below: The tone of negative values, for a diverging map.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    rows, columns = values.shape
    gap = 0.04
    square = np.array([[gap, gap], [1 - gap, gap], [1 - gap, 1 - gap], [gap, 1 - gap], [gap, gap]])
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    level = np.round(np.clip(np.abs(values) / (top or 1.0), 0, 1) * STEPS)
    for sign, colour in ((1, tone), (-1, below or tone)):
        for step in range(STEPS + 1):
            cells = np.argwhere((level == step) & (values >= 0 if sign > 0 else (level == step) & (values < 0)))
            if len(cells):
                corners = np.concatenate([square + [column, row] for row, column in cells])
                path = Path(corners, codes * len(cells))
                ax.add_patch(PathPatch(path, facecolor=colour.light, alpha=_alpha(step / STEPS), linewidth=0))
    ax.set_xlim(0, columns)
    ax.set_ylim(rows, 0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def ink_on(value: float, top: float) -> str:
    """Choose the colour of what is written on a tile: the page's where the tile is strong, ink elsewhere."""
    return PAPER.light if _alpha(min(abs(value) / (top or 1.0), 1)) > 0.55 else INK.light


def scale_key(ax: "Axes", tone: Tone, low: str, high: str, look: Look, below: Tone | None = None) -> None:
    """Draw a small key under the map: from `low` to `high`, and what they mean."""
    count = 9
    ramp = np.linspace(-1 if below else 0, 1, count)[None]
    key = ax.inset_axes((0, 0, 1, 1), transform=None)
    key.set_axes_locator(_KeyPlace(ax, look))
    tiles(key, ramp, tone, 1.0, below)
    key.set_xticks([])
    key.set_yticks([])
    key.set_in_layout(False)
    middle = {"va": "center", "color": ax.xaxis.label.get_color(), "fontsize": look.small, "annotation_clip": False}
    for text, x, side, shift in ((low, 0.0, "right", -4), (high, count, "left", 4)):
        key.annotate(text, (x, 0.5), xytext=(shift, 0), textcoords="offset points", ha=side, **middle)


class _KeyPlace:
    """Places the key in the strip above the map, at its right."""

    def __init__(self, ax: "Axes", look: Look) -> None:
        self.ax, self.look = ax, look

    def __call__(self, ax: "Axes", renderer: object) -> object:
        from matplotlib.transforms import Bbox

        box, scale = self.ax.bbox, self.ax.figure.dpi / 72
        width, height = 6.5 * self.look.text * scale, 0.8 * self.look.text * scale
        x1 = box.x1 - 3.2 * self.look.text * scale
        pixels = Bbox.from_bounds(x1 - width, box.y1 + 0.5 * self.look.text * scale, width, height)
        return pixels.transformed(self.ax.figure.transFigure.inverted())


def _alpha(part: float) -> float:
    return 0.06 + 0.9 * part
