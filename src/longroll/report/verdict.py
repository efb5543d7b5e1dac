"""The verdict: before and after in a sentence each, and the levels side by side."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longroll.report import units
from longroll.report.runs import Run, common_unit, train_lengths
from longroll.report.style import RunStyle

Styled = Sequence[tuple[Run, RunStyle]]

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

NOTABLE = 0.02  # nats or bits; a smaller difference is not coloured


@dataclass(frozen=True)
class Statement:
    """What one run comes to: its style, the verdict in a word and in a sentence."""

    style: RunStyle
    word: str
    sentence: str
    rest: str
    """Sentences after the first one: the advice, in small type."""


@dataclass(frozen=True)
class Cell:
    """One level of one run: main number, perplexity, difference to the base and which way it goes."""

    main: str
    perplexity: str
    difference: str
    way: str  # "better", "worse" or ""


@dataclass(frozen=True)
class Level:
    """A row of the table of levels."""

    name: str
    where: str
    cells: list[Cell]


def statements(styled: Styled) -> tuple[list[Statement], list[Statement]]:
    """Return the headline (the base, then the best other run) and the statements on all further runs."""
    said = [_statement(run, style, _price(run, styled)) for run, style in styled]
    if len(styled) == 1:
        return said, []
    best = _best(styled)
    return [said[0], said[best]], [s for i, s in enumerate(said) if i not in (0, best)]


def summary(styled: Styled) -> str:
    """Say what the best repair gains far out and what it costs in range; nothing for a single run."""
    if len(styled) < 2 or common_unit([run for run, _ in styled]) != "perplexity":
        return ""
    base, (best, style) = styled[0][0], styled[_best(styled)]
    values = [run.level(key) for key in ("far", "in_range") for run in (base, best)]
    if not np.isfinite(values).all():
        return ""
    far_base, far_best, in_base, in_best = (
        units.quantity(float(units.convert(v, "perplexity"))) for v in values
    )
    far = _where("far", base)
    at = f"At positions {far}" if far else "In the last octave"
    return (
        f"{at}, {style.label} takes perplexity from {far_base} to {far_best}; "
        f"in range, from {in_base} to {in_best}."
    )


def levels(styled: Styled) -> list[Level]:
    """Make the rows of the table: in range, each multiple of the training length, the last octave."""
    keys = {key for run, _ in styled for key in run.levels or {} if np.isfinite(run.level(key))}
    unit = common_unit([run for run, _ in styled])
    unit = "nats" if unit == "perplexity" else unit
    same = len(train_lengths([run for run, _ in styled])) == 1
    rows = []
    for key in sorted(keys, key=_order):
        base = _value(styled[0][0], key, unit)
        cells = [_cell(run, key, unit, None if i == 0 else base) for i, (run, _) in enumerate(styled)]
        name = {"in_range": "In range", "far": "Far"}.get(key, key.replace("x", units.TIMES))
        rows.append(Level(name, _where(key, styled[0][0]) if same else "", cells))
    return rows


def notes(styled: Styled) -> list[str]:
    """Say of every run in what it was measured unlike the first, so that its levels differ by that too."""
    (first, first_style), *others = styled
    said = []
    for run, style in others:
        for how, (mine, base) in {
            "on {} texts": (run.sequences, first.sequences),
            "to position {}": (run.max_position, first.max_position),
            "in {}": (run.provenance and run.provenance.dtype, first.provenance and first.provenance.dtype),
        }.items():
            if mine and base and mine != base:
                here, there = how.format(mine), how.format(base)
                said.append(f"{style.label} was measured {here}, {first_style.label} {there}.")
        prints = [one.texts.fingerprint for one in (run, first) if one.texts]
        if len(set(prints)) > 1 and run.sequences == first.sequences:
            said.append(f"{style.label} was measured on other texts than {first_style.label}.")
    return said


def _price(run: Run, styled: Styled) -> str:
    """Return what a run costs in range against the base and the control; nothing where its sentence says
    it.
    """
    base = styled[0][0]
    others = [base, *(other for other, style in styled if style.role == "none")]
    if run is base or run.comparisons or len(train_lengths([run, *others])) > 1:
        return ""
    if common_unit([run, *others]) != "perplexity":
        return ""
    from longroll.measure.compare import compare

    compared = [compare(run, other) for other in others if other is not run]
    prices = [comparison.price for comparison in compared if comparison.in_range.low is not None]
    text = ", ".join(prices)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _statement(run: Run, style: RunStyle, price: str) -> Statement:
    word = run.verdict
    plain = {
        "healthy": "Holds at every length measured.",
        "fades": "Fades past its training length.",
        "explodes": "Explodes past its training length.",
    }.get(word, "No verdict.")
    if run.edge is not None and word != "healthy":
        plain = f"Breaks at position {units.position(run.edge)}."
    first, *rest = _SENTENCE_END.split(run.sentence or plain, maxsplit=1)
    # what to do next is said to the model that was diagnosed, not to its repairs
    advice = " ".join([*rest, (run.advice and run.advice.sentence) or ""]).strip()
    advice = advice if style.role == "base" else ""
    return Statement(style, word, units.typeset(f"{first} {price}".strip()), units.typeset(advice))


def _cell(run: Run, key: str, unit: str, base: float | None) -> Cell:
    value = _value(run, key, unit)
    if not np.isfinite(value):
        return Cell(units.MISSING, "", "", "")
    perplexity = units.quantity(float(units.convert(run.level(key), "perplexity"))) if unit == "nats" else ""
    if base is None or not np.isfinite(base):
        return Cell(units.nats(value), perplexity, "", "")
    gain = value - base
    way = "" if abs(gain) < NOTABLE else "better" if gain < 0 else "worse"
    return Cell(units.nats(value), perplexity, units.difference(gain), way)


def _value(run: Run, key: str, unit: str) -> float:
    return float(units.convert(run.level(key), unit, run.bytes_per_token))


def _best(styled: Styled) -> int:
    """Find the run, the base apart, with the least loss far out; a run without that number comes last."""
    return min(range(1, len(styled)), key=lambda i: _far(styled[i][0]))


def _far(run: Run) -> float:
    value = run.level("far")
    return value if np.isfinite(value) else np.inf


def _order(key: str) -> tuple[float, str]:
    if key in ("in_range", "far"):
        return (0.0 if key == "in_range" else np.inf), key
    text = key.rstrip("x")
    return (float(text) if text.replace(".", "", 1).isdigit() else 1e9), key


def _where(key: str, run: Run) -> str:
    """Say at which positions a level was taken, as far as the run tells."""
    train, last = run.train_length, run.max_position
    factor = _order(key)[0]
    if key == "far":
        return units.span(last / 2, last) if last else ""
    if not train:
        return ""
    if key == "in_range":
        return f"to {units.position(train)}"
    return units.span(factor * train / 2, factor * train) if factor < 1e9 else ""  # the octave up to there
