"""The result of `longroll calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from longroll.results._result import SCHEMA_VERSION, Count, Number, Numbers, Provenance, Result, Version


@dataclass(frozen=True, kw_only=True)
class CalibrationResult(Result):
    """Scales of the decays of a model, and the loss by octaves of positions before and after."""

    kind: Literal["calibration"] = "calibration"
    schema_version: Version = SCHEMA_VERSION
    model: str | None
    output: str | None
    """Folder of the calibrated checkpoint; null where nothing was saved."""
    train_length: Count
    what: Literal["A", "dt"]
    unit: Literal["layer", "head"]
    scales: dict[str, list[Number]]
    """By the name of the mixer."""
    octaves: list[list[Count]]
    """Positions [start, stop) of each loss."""
    before: Numbers | None
    """Nats; null where nothing was read."""
    after: Numbers | None
    """Nats."""
    passes: Count
    """Readings of all texts."""
    tokens: Count
    """Tokens read by all of them."""
    gain: dict[str, Any] | None = None
    """`longroll.measure.calibration.Gain`: nats that the scales gain, with an interval; null where no scale
    differs from 1."""
    scaled: bool = True
    """Whether the scales were kept."""
    declined: str | None = None
    """Why nothing was saved; null where a model was."""
    look: dict[str, Any] | None = None
    """The reading of held-out text before the search (`longroll.measure.held_out.Reading`)."""
    sentence: str
    provenance: Provenance | None = None
