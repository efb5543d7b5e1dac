"""The numbers behind each figure, as tables of text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longroll.report import units
from longroll.report.figures.blame import blame_rows
from longroll.report.figures.coverage import layer_names
from longroll.report.runs import Run, number, numbers
from longroll.report.style import RunStyle

_WORTH_A_ROW = 0.05  # of the damage
_CAUSAL_CAPTION = "Damage undone by holding heads in their training range."

Styled = Sequence[tuple[Run, RunStyle]]


@dataclass(frozen=True)
class Table:
    """A table: its caption, the names of its columns, its rows; the first column names the row."""

    caption: str
    head: list[str]
    rows: list[list[str]]


def curve_table(styled: Styled) -> Table:
    """Return loss in every bin of positions with its interval, one column for each run."""
    found: dict[tuple[float, float], dict[int, str]] = {}
    for column, (run, _) in enumerate(styled):
        curve = run.curve
        if curve is None:
            continue
        loss = numbers(curve.loss)
        low, high = (numbers(end) if end else np.full(loss.shape, np.nan) for end in (curve.low, curve.high))
        middle = numbers(curve.position)
        start, stop = (
            numbers(edge) if edge else middle + i for i, edge in enumerate((curve.start, curve.stop))
        )
        for i, value in enumerate(loss):
            text = units.nats(value)
            if np.isfinite(low[i]) and np.isfinite(high[i]):
                text += f" [{units.nats(low[i])}, {units.nats(high[i])}]"
            found.setdefault((start[i], stop[i]), {})[column] = text
    rows = [
        [units.span(*key), *(found[key].get(column, units.MISSING) for column in range(len(styled)))]
        for key in sorted(found)
    ]
    return Table(
        "Loss in nats per token [95 % interval]",
        ["positions [from, to)", *(s.label for _, s in styled)],
        rows,
    )


def excess_tables(styled: Styled) -> list[Table]:
    """Return loss above a fresh start with its interval, one table for each run."""
    tables = []
    for run, style in styled:
        if run.excess is None:
            continue
        excess = run.excess
        columns = [numbers(values) for values in (excess.position, excess.mean, excess.low, excess.high)]
        rows = [
            [units.position(p), units.nats(mean), f"[{units.nats(low)}, {units.nats(high)}]"]
            for p, mean, low, high in zip(*columns, strict=True)
        ]
        head = ["position", "nats", "95 % interval"]
        tables.append(Table(f"{style.label}: nats above a fresh start", head, rows))
    return tables


def state_tables(styled: Styled) -> list[Table]:
    """Return standard deviation of the state: one table for each run, one column for each layer."""
    tables = []
    for run, style in styled:
        if run.states is None:
            continue
        layers = run.states.layers
        columns = [numbers(layer.std) for layer in layers]
        rows = [
            [units.position(t), *(units.quantity(column[i]) for column in columns)]
            for i, t in enumerate(run.states.position)
        ]
        head = ["position", *(f"layer {layer.layer}" for layer in layers)]
        tables.append(Table(f"{style.label}: standard deviation of the state", head, rows))
    return tables


def remembrance_tables(styled: Styled) -> list[Table]:
    """Return effective remembrance, one table for each run and one column for each end."""
    tables = []
    for run, style in styled:
        found = run.remembrance
        if found is None:
            continue
        rows = [
            [units.position(s), *(units.share(v) or units.MISSING for v in row)]
            for s, row in zip(found.starts, numbers(found.mean), strict=True)
        ]
        head = ["t", *(f"T = {units.position(e)}" for e in found.ends)]
        tables.append(Table(f"{style.label}: effective remembrance", head, rows))
    return tables


def coverage_tables(styled: Styled) -> list[Table]:
    """Return standardised shift of every head, and what moving a head back recovers."""
    tables = []
    for run, style in styled:
        found = run.coverage
        if found is None:
            continue
        values = numbers(found.map)
        names = layer_names(found)
        rows = [[name, *(units.quantity(v) for v in row)] for name, row in zip(names, values, strict=True)]
        head = ["layer", *(f"head {i}" for i in range(values.shape[1]))]
        tables.append(Table(f"{style.label}: standardised shift", head, rows))
    return tables


def blame_tables(styled: Styled) -> list[Table]:
    """Return what each reading recovers of the damage of a hybrid, one table for each run."""
    tables = []
    for run, style in styled:
        if run.blame is None:
            continue
        rows = [
            [name, *map(_percent, (share.recovered, share.low, share.high))]
            for name, share, _ in blame_rows(run.blame)
        ]
        caption = f"{style.label}: {units.typeset(run.blame.sentence)}"
        tables.append(Table(caption, ["reading", "recovered", "low", "high"], rows))
    return tables


def _percent(share: float | None) -> str:
    value = 100 * number(share)
    return units.minus(f"{value:.0f} %") if np.isfinite(value) else units.MISSING


def causal_table(run: Run, style: RunStyle) -> Table | None:
    """Return what putting a head's state back into the training range recovers of the loss."""
    found = run.coverage
    causal = (found and found.causal) or []
    causal = [one for one in causal if not abs(one.recovered or 0) < _WORTH_A_ROW]
    rows = [[one.what, f"{100 * number(one.recovered):.0f} %"] for one in causal]
    rows = [[what, units.MISSING if "nan" in share else units.minus(share)] for what, share in rows]
    return (
        Table(
            units.typeset((found and found.causal_sentence) or _CAUSAL_CAPTION),
            ["held in range", "damage undone"],
            rows,
        )
        if rows
        else None
    )
