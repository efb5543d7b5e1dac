"""The numbers that a figure shows: one long table a figure, written as CSV and described in words."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from longroll.printable import printable
from longroll.report import units
from longroll.report.figures.blame import blame_rows
from longroll.report.figures.coverage import layer_names
from longroll.report.figures.position import shown_curve
from longroll.report.figures.remembrance import curve_at
from longroll.report.runs import Run, first_shown, number, numbers, train_lengths
from longroll.report.style import RunStyle

Cell = str | float
Styled = Sequence[tuple[Run, RunStyle]]


@dataclass(frozen=True)
class Data:
    """What a figure shows: its measure, the models, and a row of numbers for each point.

    The first column of `rows` is the label of the run, and `along` names the column that the x axis shows.
    """

    measure: str
    models: list[str]
    along: str
    head: list[str]
    rows: list[list[Cell]]
    trained: list[int]

    def csv(self) -> str:
        """Return the table as CSV (RFC 4180); what was not measured is an empty cell."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(self.head)
        writer.writerows([_plain(cell) for cell in row] for row in self.rows)
        return text.getvalue()

    def sentence(self) -> str:
        """Say what the figure shows: measure, models, the range along x, and the training length."""
        column = self.head.index(self.along)
        along = [value for row in self.rows if isinstance(value := row[column], float | int)]
        parts = [f"{self.measure} of {', '.join(self.models)}"]
        if along:
            parts.append(f"{self.along} {units.position(min(along))} to {units.position(max(along))}")
        if self.trained:
            parts.append(f"trained to {' and '.join(map(units.position, self.trained))}")
        return "; ".join(parts) + "."


def position_data(styled: Styled, unit: str) -> Data:
    """Return loss by position in `unit` with its 95 % interval, from the first position that the figure
    shows.
    """
    first = first_shown([run for run, _ in styled])
    rows = [
        row for run, style in styled if run.curve for row in _points(style, *shown_curve(run, unit, first))
    ]
    name = units.UNITS[unit]
    head = ["run", "position", unit, "low", "high"]
    return _data(f"{name[0].upper()}{name[1:]}", styled, "position", head, rows)


def excess_data(styled: Styled) -> Data:
    """Return loss above a fresh start in nats, with its 95 % interval."""
    rows = [
        row
        for run, style in styled
        if (e := run.excess)
        for row in _points(style, *(numbers(v) for v in (e.position, e.mean, e.low, e.high)))
    ]
    head = ["run", "position", "nats", "low", "high"]
    return _data("Loss above a fresh start in nats per token", styled, "position", head, rows)


def state_data(styled: Styled) -> Data:
    """Return standard deviation of the state of every layer, also of layers that a small figure leaves
    out.
    """
    first = first_shown([run for run, _ in styled])
    rows: list[list[Cell]] = [
        [style.label, layer.layer, position, std]
        for run, style in styled
        if run.states
        for layer in run.states.layers
        for position, std in zip(run.states.position, numbers(layer.std), strict=False)
        if position >= first
    ]
    head = ["run", "layer", "position", "std"]
    return _data("Standard deviation of the state by layer", styled, "position", head, rows)


def remembrance_data(styled: Styled, ends: Sequence[int]) -> Data:
    """Return effective remembrance at some ends T, with its 95 % interval, by the first token kept t."""
    rows = [
        [style.label, end, *point[1:]]
        for run, style in styled
        if run.remembrance
        for end in ends
        if end in run.remembrance.ends
        for point in _points(style, *curve_at(run.remembrance, end))
    ]
    measure = f"Effective remembrance at T = {', '.join(map(units.position, ends))}"
    return _data(measure, styled, "t", ["run", "T", "t", "remembrance", "low", "high"], rows)


def coverage_data(run: Run, style: RunStyle) -> Data:
    """Return standardised shift of every head, and whether it is significant."""
    found = run.coverage
    assert found is not None
    values = numbers(found.map)
    marks = numbers(found.significant) if found.significant else np.full(values.shape, np.nan)
    names = layer_names(found)
    rows: list[list[Cell]] = [
        [style.label, names[layer], head, value, float(marks[layer, head])]
        for (layer, head), value in np.ndenumerate(values)
    ]
    head = ["run", "layer", "head", "shift", "significant"]
    return _data("Shift of the state in standard deviations by layer", [(run, style)], "head", head, rows)


def blame_data(run: Run, style: RunStyle) -> Data:
    """Share of the damage that each reading recovers, in per cent, with its 95 % interval."""
    assert run.blame is not None
    rows: list[list[Cell]] = [
        [style.label, name, *(100 * number(end) for end in (share.recovered, share.low, share.high))]
        for name, share, _ in blame_rows(run.blame)
    ]
    head = ["run", "reading", "recovered", "low", "high"]
    return _data("Per cent of the damage recovered", [(run, style)], "reading", head, rows)


def task_data(styled: Styled, name: str) -> Data:
    """Score of one task by length and row (depth or kind), with its 95 % interval."""
    having = [(run, style) for run, style in styled if run.tasks and name in run.tasks]
    rows: list[list[Cell]] = []
    for run, style in having:
        grid = (run.tasks or {})[name]
        tables = [numbers(table) for table in (grid.accuracy, grid.low or [], grid.high or [])]
        for i, length in enumerate(grid.lengths):
            for j, row in enumerate(grid.names):
                found = [table[i, j] if table.size else np.nan for table in tables]
                rows.append([style.label, length, row, *found])
    grid = (having[0][0].tasks or {})[name]
    measure = f"{name.replace('_', ' ')}, {(grid.metric or 'accuracy').replace('_', ' ')}"
    head = ["run", "length", "depth" if grid.depths else "row", "accuracy", "low", "high"]
    return _data(measure[0].upper() + measure[1:], having, "length", head, rows)


def _data(measure: str, styled: Styled, along: str, head: list[str], rows: list[list[Cell]]) -> Data:
    shown = {row[0] for row in rows}
    having = [(run, style) for run, style in styled if style.label in shown]
    models = [_named(run, style) for run, style in having]
    return Data(printable(measure), models, along, head, rows, train_lengths([run for run, _ in having]))


def _named(run: Run, style: RunStyle) -> str:
    """Name a run by its label, and by its model where the label does not."""
    model = printable(run.model or "").rstrip("/").split("/")[-1]
    return style.label if not model or model == style.label else f"{style.label} ({model})"


def _points(style: RunStyle, *columns: Iterable[float]) -> list[list[Cell]]:
    return [[style.label, *point] for point in zip(*columns, strict=True)]


def _plain(cell: Cell) -> str:
    """Write a number so that it reads back the same, whole ones without a point."""
    if isinstance(cell, str):
        return printable(cell)
    if not np.isfinite(cell):
        return ""
    return str(int(cell)) if cell == int(cell) else repr(float(cell))
