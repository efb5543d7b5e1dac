"""The result of `longroll diagnose --no-long`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longroll.results._result import (
    SCHEMA_VERSION,
    Count,
    Number,
    Numbers,
    Provenance,
    Result,
    Version,
    check_lengths,
)


@dataclass(frozen=True, kw_only=True)
class ForecastResult(Result):
    """Where a model is forecast to break, from texts of T tokens."""

    kind: Literal["forecast"] = "forecast"
    schema_version: Version = SCHEMA_VERSION
    model: str | None
    label: str | None = None
    sequences: Count
    train_length: Count
    times: list[Count]
    """Training lengths after which the state is that of each entry."""
    mean: Numbers
    """Nats above the loss from the state of one other text."""
    low: list[Number]
    high: list[Number]
    rise: list[Number]
    """`mean` plus the loss from the zero state, above the level in range."""
    low_rise: list[Number]
    edge: Count | None
    """Position where the loss is forecast to leave its level."""
    sentence: str
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        check_lengths(self, "times", "mean", "low", "high", "rise", "low_rise")
