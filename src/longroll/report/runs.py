"""Open runs, order them, name them, and turn their lists (with nulls) into arrays."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from longroll.errors import LongrollError
from longroll.printable import printable
from longroll.results import DiagnosisResult, LossResult, TaskResult

Run = DiagnosisResult
AnyRun = DiagnosisResult | LossResult | TaskResult | Mapping[str, Any]
"""A run as the public functions of the report take it: a result, or its JSON."""

ROLES = ("base", "none", "random", "fitted", "sp", "tbptt")

# The first pattern that fits a label names the role; the order matters ("state passing, noise" is SP).
_PATTERNS = {
    "tbptt": r"\btb(p)?tt\b|truncated",
    "sp": r"\bsp\b|state[ _-]?passing",
    "fitted": r"\bfitted|\bfitted[ _-]?noise\b",
    "random": r"\brandom|\bnoise\b",
    "none": r"\bnone\b|\bplain\b|\bno intervention\b",
    "base": r"\bbase(line)?\b|\bbefore\b|\boriginal\b",
}


def as_run(run: AnyRun) -> Run:
    """Open a run: a diagnosis as it is, a task or a loss as a diagnosis with nothing else, JSON by its kind.

    JSON that does not name its kind may hold any sections of a diagnosis.

    Raises:
        LongrollError: naming the field, for JSON that is not a valid result.
    """
    if isinstance(run, Mapping):
        kinds: dict[Any, type[DiagnosisResult | LossResult | TaskResult]]
        kinds = {"task": TaskResult, "position_loss": LossResult}
        kind = kinds.get(run.get("kind"), DiagnosisResult)
        run = kind.from_json(run if "kind" in run else {"label": None, "verdict": "", **run}, source="run")
    if isinstance(run, LossResult):
        return DiagnosisResult(
            label=run.model,
            verdict="",
            model=run.model,
            train_length=run.train_length,
            sequences=run.sequences,
            max_position=run.max_position,
            bytes_per_token=run.bytes_per_token,
            curve=run.curve,
            provenance=run.provenance,
        )
    if isinstance(run, TaskResult):
        return DiagnosisResult(
            label=run.label,
            verdict="",
            model=run.model,
            train_length=run.train_length,
            tasks=run.tasks,
            provenance=run.provenance,
        )
    return run


def ordered(runs: Sequence[AnyRun]) -> list[Run]:
    """Put the base first, then none, random, fitted, SP, TBPTT; any other run keeps its place at the end."""
    if isinstance(runs, Mapping) or not all(
        isinstance(run, DiagnosisResult | LossResult | TaskResult | Mapping) for run in runs
    ):
        raise LongrollError("A report is drawn from a list of runs: pass [run] for a single one.")
    if not runs:
        raise LongrollError(
            "A report needs at least one run: pass a file made by `longroll diagnose --json`."
        )
    opened = [as_run(run) for run in runs]
    named = [role_of(run) for run in opened]
    first = named.index("base") if "base" in named else 0
    rest = [i for i in range(len(opened)) if i != first]
    rest.sort(key=lambda i: ROLES.index(named[i]) if named[i] in ROLES else len(ROLES))  # stable
    return [opened[i] for i in [first, *rest]]


def role_of(run: Run) -> str:
    """Name the role of a run from its `intervention` field or its label; "other" when neither tells."""
    for text in (run.intervention, run.label):
        for role, pattern in _PATTERNS.items():
            if re.search(pattern, str(text or "").lower().replace("_", " ")):
                return role
    return "other"


def labels(runs: Sequence[Run]) -> list[str]:
    """Give every run a short and unique label without line breaks."""
    seen: dict[str, int] = {}
    out = []
    for i, run in enumerate(runs):
        text = " ".join(printable(run.label or "").split()) or f"run {i + 1}"
        text = text if len(text) <= 32 else text[:31].rstrip() + "…"
        seen[text] = seen.get(text, 0) + 1
        out.append(text if seen[text] == 1 else f"{text} ({seen[text]})")
    return out


def numbers(values: Iterable[Any] | None) -> np.ndarray:
    """Turn a list, or a list of rows of unequal length, into floats; null and missing become NaN."""
    rows = list(values) if values is not None else []
    if any(isinstance(row, list | tuple) for row in rows):
        flat = [numbers(row) for row in rows]
        out = np.full((len(flat), max(len(row) for row in flat)), np.nan)
        for i, row in enumerate(flat):
            out[i, : len(row)] = row
        return out
    return np.array([np.nan if value is None else float(value) for value in rows], dtype=float)


def number(value: Any) -> float:
    """Turn one value into a float; null is NaN."""
    return float("nan") if value is None else float(value)


def train_lengths(runs: Sequence[Run]) -> list[int]:
    """List the different training lengths, shortest first."""
    return sorted({run.train_length for run in runs if run.train_length})


def first_shown(runs: Sequence[Run]) -> float:
    """Return the first position that figures show: before a sixteenth of T every model is cold."""
    train = train_lengths(runs)
    return max(1.0, train[0] / 16) if train else 1.0


def common_unit(runs: Sequence[Run]) -> str:
    """Choose the unit in which the runs compare: perplexity, or bits per byte when their tokens differ."""
    sizes = [number(run.bytes_per_token) for run in runs]
    if all(np.isfinite(sizes)) and max(sizes) > 1.01 * min(sizes):
        return "bits_per_byte"
    return "perplexity"
