"""The result of `longroll calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longroll.results._result import SCHEMA_VERSION, Count, Number, Numbers, Provenance, Result, Version


@dataclass(frozen=True, kw_only=True)
class CalibrationResult(Result):
    """Scales of the decays of a model, and the loss by octaves of positions before and after."""

    kind: Literal["calibration"] = "calibration"
    schema_version: Version = SCHEMA_VERSION
    model: str | None
    output: str | None
    """Folder of the calibrated checkpoint."""
    train_length: Count
    what: Literal["A", "dt"]
    unit: Literal["layer", "head"]
    scales: dict[str, list[Number]]
    """By the name of the mixer."""
    octaves: list[list[Count]]
    """Positions [start, stop) of each loss."""
    before: Numbers
    """Nats."""
    after: Numbers
    """Nats."""
    passes: Count
    """Readings of all texts."""
    tokens: Count
    """Tokens read by all of them."""
    sentence: str
    provenance: Provenance | None = None
