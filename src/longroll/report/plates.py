"""Which figures a set of runs gives, in order, each with the sentence that says what to look for.

The page and the export draw the same list, so a figure in a paper is the figure of the report.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from longroll.report import figures, tables, units
from longroll.report.figures.remembrance import common_ends
from longroll.report.runs import Run, common_unit, number, ordered, section
from longroll.report.style import Look, RunStyle, run_styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[Look], "Figure"]


@dataclass(frozen=True)
class Panel:
    """One drawing; `style` is that of its run when it shows a single one, `note` a table beside it."""

    name: str
    draw: Draw
    style: RunStyle | None = None
    note: tables.Table | None = None


@dataclass(frozen=True)
class Plate:
    """A section of the report: a heading, what to look for, one wide drawing or several small ones, the numbers."""

    name: str
    heading: str
    look_for: str
    panels: list[Panel]
    numbers: list[tables.Table] = field(default_factory=list)
    wide: bool = True


def plates(runs: Sequence[Run]) -> list[Plate]:
    """List the figures that the runs hold data for."""
    runs = ordered(runs)
    styled = list(zip(runs, run_styles(runs), strict=True))
    parts = (_position, _states, _remembrance, _remembrance_maps, _coverage, _tasks)
    return [plate for part in parts for plate in part(runs, styled)]


def _position(runs: Sequence[Run], styled: tables.Styled) -> list[Plate]:
    having = [(run, style) for run, style in styled if section(run, "curve")]
    if not having:
        return []
    unit = common_unit(runs)
    ring = any(number(run.get("edge")) == number(run.get("edge")) for run, _ in having)
    text = "A model that has learned to live with its own state stays level past the dashed line, where training ended."
    text += " The ring marks where a run breaks; the bands are 95 % intervals." if ring else " The bands are 95 % intervals."
    panel = Panel("position", lambda look: figures.position_figure(runs, unit, look=look))
    heading = f"{units.UNITS[unit][0].upper()}{units.UNITS[unit][1:]} by position"
    return [Plate("position", heading, text, [panel], [tables.curve_table(having)])]


def _states(runs: Sequence[Run], styled: tables.Styled) -> list[Plate]:
    having = [(run, style) for run, style in styled if section(run, "states")]
    if not having:
        return []
    text = "The standard deviation of each layer’s state. One that still moves past the dashed line carries the model "
    text += "into states it was never trained to read; after a repair it stays level."
    panel = Panel("states", lambda look: figures.state_figure(runs, look=look))
    return [Plate("states", "The state over position", text, [panel], tables.state_tables(having))]


def _remembrance(runs: Sequence[Run], styled: tables.Styled) -> list[Plate]:
    having = [(run, style) for run, style in styled if section(run, "remembrance")]
    if not common_ends(runs):
        return []
    end = common_ends(runs)[-1]
    text = f"How much the prediction at T = {units.position(end)} changes when every token before t is forgotten. "
    text += "A curve that jumps up at once hangs on the first tokens; a sound one is low and rises only near T."
    panel = Panel("remembrance", lambda look: figures.remembrance_curves(runs, end, look=look))
    return [Plate("remembrance", "Effective remembrance", text, [panel], tables.remembrance_tables(having))]


def _remembrance_maps(runs: Sequence[Run], styled: tables.Styled) -> list[Plate]:
    having = [(run, style) for run, style in styled if section(run, "remembrance")]
    if not any(len(run["remembrance"]["ends"]) > 1 for run, _ in having):
        return []  # with one end the curves say it all
    text = "The same for every pair of t and T: strong tiles far left of the diagonal are memories of the first tokens."
    panels = [Panel(f"remembrance-map-{s.label}", _of_run(figures.remembrance_map, r, s), s) for r, s in having]
    return [Plate("remembrance-map", "Remembrance at every length", text, panels, wide=False)]


def _of_run(figure: Callable[..., "Figure"], run: Run, style: RunStyle) -> Draw:
    return lambda look: figure(run, look=look, style=style)


def _coverage(runs: Sequence[Run], styled: tables.Styled) -> list[Plate]:
    having = [(run, style) for run, style in styled if (section(run, "coverage") or {}).get("map")]
    if not having:
        return []
    text = "How far each head’s state has left the range seen in training, in standard deviations; a dot marks a "
    text += "significant shift. Orange lies above the range, blue below."
    panels = [
        Panel(f"coverage-{s.label}", _of_run(figures.coverage_map, r, s), s, tables.causal_table(r, s)) for r, s in having
    ]
    return [Plate("coverage", "Coverage by layer and head", text, panels, tables.coverage_tables(having), wide=False)]


def _tasks(runs: Sequence[Run], styled: tables.Styled) -> list[Plate]:
    names = dict.fromkeys(name for run, _ in styled for name, grid in (section(run, "tasks") or {}).items() if grid)
    text = "Accuracy by length and by depth of the answer in the text; right of the dashed line the text is longer "
    text += "than any in training. A flat loss is not yet a long memory: this is the test of it."
    return [
        Plate(f"task-{name}", name.replace("_", " ").capitalize(), text, [Panel(f"task-{name}", _task(runs, name))])
        for name in names
    ]


def _task(runs: Sequence[Run], name: str) -> Draw:
    return lambda look: figures.task_heatmap(runs, name, look=look)
