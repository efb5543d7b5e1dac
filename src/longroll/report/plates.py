"""Which figures a set of runs gives, in order, each with the sentence that says what to look for.

The page and the export draw the same list, so a figure in a paper is the figure of the report.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from longroll.report import data, figures, tables, units
from longroll.report.data import Data
from longroll.report.figures.coverage import has_negative, largest_shift
from longroll.report.figures.remembrance import common_ends, largest_remembrance
from longroll.report.runs import AnyRun, Run, common_unit, ordered
from longroll.report.style import Look, RunStyle, run_styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOK_FOR = {
    "position": (
        "Loss by position. The dashed line marks the training length. A model that generalizes in length "
        "stays "
        "level past that line. The bands are 95 % intervals over texts."
    ),
    "excess": (
        "Loss of a token that was read with the whole text before it, minus the loss of the same token "
        "when the "
        "model starts from the zero state within the training length. Above zero, the carried state does "
        "harm; "
        "below zero, it helps."
    ),
    "states": (
        "Standard deviation of the state, by layer. A state that still changes past the dashed line "
        "leaves the "
        "range that training covered. After a repair the state stays level."
    ),
    "remembrance": (
        "Change of the prediction at T = {end} when all tokens before t are removed. In a model that "
        "generalizes, the curve is low and rises only near T. A curve that rises at small t shows that "
        "the first "
        "tokens still dominate."
    ),
    "remembrance-map": (
        "The same for every pair of t and T. Dark tiles far left of the diagonal show that the first tokens "
        "still dominate the prediction."
    ),
    "coverage": (
        "Shift of the state of each head past the training length, in standard deviations of its states in "
        "range. A dot marks a significant shift. Orange is above the range, blue is below."
    ),
    "blame": (
        "Share of the damage that disappears when the far text is read with the recurrent states, the "
        "attention, "
        "or both held in their training range, with 95 % intervals over texts. The part of each side is its "
        "Shapley value."
    ),
    "task": (
        "Accuracy by length and by depth of the answer in the text. Right of the dashed line the text is "
        "longer "
        "than in training. A model with a flat loss can still fail here, because it has forgotten the answer."
    ),
}

Draw = Callable[[Look], "Figure"]


@dataclass(frozen=True)
class Panel:
    """One drawing and its numbers; `style` is that of its run when it shows one, `note` a table beside it."""

    name: str
    draw: Draw
    data: Data
    style: RunStyle | None = None
    note: tables.Table | None = None


@dataclass(frozen=True)
class Plate:
    """A section of the report: heading, what to look for, one wide drawing or several small, the numbers."""

    name: str
    heading: str
    look_for: str
    panels: list[Panel]
    numbers: list[tables.Table] = field(default_factory=list)
    wide: bool = True


def plates(runs: Sequence[AnyRun], unit: str | None = None) -> list[Plate]:
    """List the figures that the runs hold data for.

    Args:
        runs: Results of `longroll diagnose` or of tasks, or their JSON.
        unit: Unit of loss by position: "perplexity", "bits_per_byte" or "nats"; by default perplexity, or
            bits per byte where the runs differ in their tokens.

    Raises:
        LongrollError: for bits per byte of a run without `bytes_per_token`, and an unknown unit.
    """
    runs = ordered(runs)
    styled = list(zip(runs, run_styles(runs), strict=True))
    unit = unit or common_unit(runs)
    parts = (
        partial(_position, unit=unit),
        _excess,
        _states,
        _remembrance,
        _remembrance_maps,
        _coverage,
        _blame,
        _tasks,
    )
    return [plate for part in parts for plate in part(runs, styled)]


def _position(runs: Sequence[Run], styled: tables.Styled, *, unit: str) -> list[Plate]:
    having = [(run, style) for run, style in styled if run.curve]
    if not having:
        return []
    ring = any(run.edge is not None for run, _ in having)
    text = LOOK_FOR["position"] + (" The ring marks where a run breaks." if ring else "")
    panel = Panel(
        "position",
        lambda look: figures.position_figure(runs, unit, look=look),
        data.position_data(styled, unit),
    )
    heading = f"{units.UNITS[unit][0].upper()}{units.UNITS[unit][1:]} by position"
    return [Plate("position", heading, text, [panel], [tables.curve_table(having)])]


def _excess(runs: Sequence[Run], styled: tables.Styled) -> list[Plate]:
    having = [(run, style) for run, style in styled if run.excess]
    if not having:
        return []
    panel = Panel("excess", lambda look: figures.excess_figure(runs, look=look), data.excess_data(styled))
    return [
        Plate("excess", "Loss above a fresh start", LOOK_FOR["excess"], [panel], tables.excess_tables(having))
    ]


def _states(runs: Sequence[Run], styled: tables.Styled) -> list[Plate]:
    having = [(run, style) for run, style in styled if run.states]
    if not having:
        return []
    panel = Panel("states", lambda look: figures.state_figure(runs, look=look), data.state_data(styled))
    return [
        Plate("states", "The state over position", LOOK_FOR["states"], [panel], tables.state_tables(having))
    ]


def _remembrance(runs: Sequence[Run], styled: tables.Styled) -> list[Plate]:
    having = [(run, style) for run, style in styled if run.remembrance]
    if not common_ends(runs):
        return []
    end = common_ends(runs)[-1]
    text = LOOK_FOR["remembrance"].format(end=units.position(end))
    panel = Panel(
        "remembrance",
        lambda look: figures.remembrance_curves(runs, end, look=look),
        data.remembrance_data(having, [end]),
    )
    return [Plate("remembrance", "Effective remembrance", text, [panel], tables.remembrance_tables(having))]


def _remembrance_maps(runs: Sequence[Run], styled: tables.Styled) -> list[Plate]:
    having = [(run, style) for run, style in styled if run.remembrance]
    found = [run.remembrance for run, _ in having if run.remembrance]
    if not any(len(one.ends) > 1 for one in found):
        return []  # with one end the curves say it all
    top = max(map(largest_remembrance, found))
    panels = [
        Panel(
            f"remembrance-map-{s.label}",
            _remembrance_map(r, s, top),
            data.remembrance_data([(r, s)], one.ends),
            s,
        )
        for (r, s), one in zip(having, found, strict=True)
    ]
    return [
        Plate(
            "remembrance-map", "Remembrance at every length", LOOK_FOR["remembrance-map"], panels, wide=False
        )
    ]


def _remembrance_map(run: Run, style: RunStyle, top: float) -> Draw:
    return lambda look: figures.remembrance_map(run, top=top, look=look, style=style)


def _coverage(runs: Sequence[Run], styled: tables.Styled) -> list[Plate]:
    having = [(run, style) for run, style in styled if run.coverage]
    if not having:
        return []
    found = [run.coverage for run, _ in having if run.coverage]
    top, signed = max(map(largest_shift, found)), any(map(has_negative, found))
    panels = [
        Panel(
            f"coverage-{s.label}",
            _coverage_map(r, top, signed),
            data.coverage_data(r, s),
            s,
            tables.causal_table(r, s),
        )
        for r, s in having
    ]
    return [
        Plate(
            "coverage",
            "Coverage by layer and head",
            LOOK_FOR["coverage"],
            panels,
            tables.coverage_tables(having),
            wide=False,
        )
    ]


def _coverage_map(run: Run, top: float, signed: bool) -> Draw:
    return lambda look: figures.coverage_map(run, top=top, signed=signed, look=look)


def _blame(runs: Sequence[Run], styled: tables.Styled) -> list[Plate]:
    having = [(run, style) for run, style in styled if run.blame and run.blame.parts]
    if not having:
        return []
    panels = [Panel(f"blame-{s.label}", _blame_figure(r), data.blame_data(r, s), s) for r, s in having]
    numbers = tables.blame_tables(having)
    heading = "State or attention"
    return [Plate("blame", heading, LOOK_FOR["blame"], panels, numbers, wide=False)]


def _blame_figure(run: Run) -> Draw:
    return lambda look: figures.blame_figure(run, look=look)


def _tasks(runs: Sequence[Run], styled: tables.Styled) -> list[Plate]:
    names = dict.fromkeys(name for run, _ in styled for name in run.tasks or {})
    return [
        Plate(
            f"task-{name}",
            name.replace("_", " ").capitalize(),
            LOOK_FOR["task"],
            [Panel(f"task-{name}", _task(runs, name), data.task_data(styled, name))],
        )
        for name in names
    ]


def _task(runs: Sequence[Run], name: str) -> Draw:
    return lambda look: figures.task_figure(runs, name, look=look)
