"""Read runs: order them, pick their sections, turn their lists (with nulls) into arrays."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from longroll.errors import LongrollError

Run = Mapping[str, Any]

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


def ordered(runs: Sequence[Run]) -> list[Run]:
    """Put the base first, then none, random, fitted, SP, TBPTT; any other run keeps its place at the end."""
    if isinstance(runs, Mapping) or not all(isinstance(run, Mapping) for run in runs):
        raise LongrollError("A report is drawn from a list of runs: pass [run] for a single one.")
    if not runs:
        raise LongrollError(
            "A report needs at least one run: pass a file made by `longroll diagnose --json`."
        )
    named = [role_of(run) for run in runs]
    first = named.index("base") if "base" in named else 0
    rest = [i for i in range(len(runs)) if i != first]
    rest.sort(key=lambda i: ROLES.index(named[i]) if named[i] in ROLES else len(ROLES))  # stable
    return [runs[i] for i in [first, *rest]]


def role_of(run: Run) -> str:
    """Name the role of a run from its `intervention` field or its label; "other" when neither tells."""
    for text in (run.get("intervention"), run.get("label")):
        for role, pattern in _PATTERNS.items():
            if re.search(pattern, str(text or "").lower().replace("_", " ")):
                return role
    return "other"


def labels(runs: Sequence[Run]) -> list[str]:
    """Give every run a short label of its own: no line breaks, no two alike."""
    seen: dict[str, int] = {}
    out = []
    for i, run in enumerate(runs):
        text = " ".join(str(run.get("label") or f"run {i + 1}").split())
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


def section(run: Run, name: str) -> Mapping[str, Any] | None:
    """Return an optional section of a run, or None when it is missing, null or empty."""
    return run.get(name) or None


def train_lengths(runs: Sequence[Run]) -> list[int]:
    """List the different training lengths, shortest first."""
    return sorted({int(run["train_length"]) for run in runs if run.get("train_length")})


def common_unit(runs: Sequence[Run]) -> str:
    """Choose the unit in which the runs compare: perplexity, or bits per byte when their tokens differ."""
    sizes = [number(run.get("bytes_per_token")) for run in runs]
    if all(np.isfinite(sizes)) and max(sizes) > 1.01 * min(sizes):
        return "bits_per_byte"
    return "perplexity"
