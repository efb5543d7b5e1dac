"""Heat maps of tiles in one tone: the value is the opacity, so a map reads the same in light and dark."""

from typing import TYPE_CHECKING

import numpy as np

from longroll.report.style import INK, MUTED, PAPER, Look, Tone

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

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
            cells = np.argwhere((level == step) & ((values < 0) == (sign < 0)))
            if len(cells):
                corners = np.concatenate([np.add(square, (column, row)) for row, column in cells])
                path = Path(corners, codes * len(cells))
                ax.add_patch(PathPatch(path, facecolor=colour.light, alpha=_alpha(step / STEPS), linewidth=0))
    ax.set_xlim(0, columns)
    ax.set_ylim(rows, 0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def ink_on(value: float, top: float, tone: Tone) -> str:
    """Choose the colour of what stands on a tile, ink or the page's: what reads better, light and dark."""
    alpha = _alpha(min(abs(value) / (top or 1.0), 1)) if np.isfinite(value) else 0.0
    themes = [(_rgb(ink), _rgb(paper), _rgb(of)) for ink, paper, of in _themes(tone)]
    worst = [
        min(_contrast((ink, paper)[i], alpha * of + (1 - alpha) * paper) for ink, paper, of in themes)
        for i in (0, 1)
    ]
    return INK.light if worst[0] >= worst[1] else PAPER.light


def scale_key(ax: "Axes", tone: Tone, low: str, high: str, look: Look, below: Tone | None = None) -> None:
    """Draw a small key above the map: from `low` to `high`, and what they mean."""
    count = 9
    ramp = np.linspace(-1 if below else 0, 1, count)[None]
    key = ax.inset_axes((0, 0, 1, 1), transform=None)
    key.set_axes_locator(_KeyPlace(ax, look))
    tiles(key, ramp, tone, 1.0, below)
    key.set_xticks([])
    key.set_yticks([])
    key.set_in_layout(False)
    for text, x, side, shift in ((low, 0.0, "right", -4), (high, count, "left", 4)):
        end = key.annotate(
            text, (x, 0.5), xytext=(shift, 0), textcoords="offset points", ha=side, va="center"
        )
        end.set(color=MUTED.light, fontsize=look.small, annotation_clip=False)


class _KeyPlace:
    """Places the key in the strip above the map, at its right."""

    def __init__(self, ax: "Axes", look: Look) -> None:
        self.ax, self.look = ax, look

    def __call__(self, ax: object, renderer: object) -> "Bbox":
        from matplotlib.transforms import Bbox

        box, scale = self.ax.bbox, self.ax.figure.dpi / 72
        width, height = 6.5 * self.look.text * scale, 0.8 * self.look.text * scale
        x1 = box.x1 - 3.2 * self.look.text * scale
        pixels = Bbox.from_bounds(x1 - width, box.y1 + 0.5 * self.look.text * scale, width, height)
        return pixels.transformed(self.ax.figure.transFigure.inverted())


def _themes(tone: Tone) -> list[tuple[str, str, str]]:
    return [(INK.light, PAPER.light, tone.light), (INK.dark, PAPER.dark, tone.dark)]


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def _contrast(one: np.ndarray, other: np.ndarray) -> float:
    """Return the contrast ratio of two sRGB colours, as WCAG defines it."""
    linear = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in (one, other)]
    dark, light = sorted(float(c @ (0.2126, 0.7152, 0.0722)) for c in linear)
    return (light + 0.05) / (dark + 0.05)


def _alpha(part: float) -> float:
    return 0.06 + 0.9 * part
