"""State statistics over position: whether the states keep moving past the training length."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from longroll.report.figures._axes import finite_range, position_axis, training_edge, value_axis
from longroll.report.figures._canvas import canvas
from longroll.report.figures._labels import legend
from longroll.report.runs import AnyRun, first_shown, numbers, ordered, train_lengths
from longroll.report.style import MUTED, WEB, Look, run_styles
from longroll.results import LayerStates, States

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def state_figure(runs: Sequence[AnyRun], *, look: Look = WEB) -> "Figure":
    """Draw the standard deviation of the state over position: one panel for each layer, one curve for each
    run.

    A model with more layers than the medium has panels shows some at even distances.
    """
    runs = ordered(runs)
    drawn = [(run.states, style) for run, style in zip(runs, run_styles(runs), strict=True) if run.states]
    layers = sorted({layer.layer for states, _ in drawn for layer in states.layers})
    layers = [layers[i] for i in even(len(layers), look.panels)]
    columns = min(look.columns, max(len(layers), 1)) if len(layers) != 4 else 2
    rows = -(-len(layers) // columns) or 1
    train = train_lengths(runs)
    warm = first_shown(runs)
    height = rows * min(0.78 * look.points / columns, 0.42 * look.points) + 3.4 * look.text
    wide = any(_explodes(numbers(layer.std)) for states, _ in drawn for layer in states.layers)
    with canvas(look, height) as fig:
        axes = fig.subplots(rows, columns, squeeze=False).ravel()
        for ax in axes[len(layers) :]:
            ax.remove()
        for i, (layer, ax) in enumerate(zip(layers, axes, strict=False)):
            shown, first, last = [], np.inf, 2.0
            for states, style in reversed(drawn):
                found = _layer(states, layer)
                if found is None:
                    continue
                x, y = numbers(states.position), numbers(found.std)
                x, y = x[: y.size][x[: y.size] >= warm], y[x[: y.size] >= warm]
                ax.plot(
                    x, y, color=style.color, linestyle=style.dash, zorder=3 if style.role == "base" else 2.5
                )
                shown.append(y)
                first, last = min(first, *x[:1]), max(last, *x[-1:])
            value_axis(ax, *finite_range(shown), log=wide, most=5, zero=True)
            position_axis(
                ax, min(first, last / 2), last, train, most=6 if look.columns > 2 else 4, scale=look.x
            )
            training_edge(ax, train, look, named=False)
            ax.set_title(f"layer {layer}", loc="left", color=MUTED.light, fontsize=look.small)
            if i >= len(layers) - columns:
                ax.set_xlabel("position in tokens" if look.columns > 2 else "position")
            if not look.upright and i % columns == 0:
                ax.set_ylabel("std of the state")
        legend(fig, [style for _, style in drawn], look)
    return fig


def even(count: int, most: int) -> list[int]:
    """Choose at most `most` of `count` indices at even distances, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _explodes(std: np.ndarray) -> bool:
    """Say whether a curve outgrows a linear axis: one scale for all panels, so that they compare."""
    good = std[np.isfinite(std)]
    return bool(good.size and good.max() > 30 * np.median(good))


def _layer(states: States, layer: int) -> LayerStates | None:
    return next((found for found in states.layers if found.layer == layer), None)
