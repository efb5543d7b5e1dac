"""The result of `longroll plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from longroll.results._result import SCHEMA_VERSION, Count, Provenance, Result, Version


@dataclass(frozen=True, kw_only=True)
class PlanResult(Result):
    """What a model needs, by its config."""

    kind: Literal["plan"] = "plan"
    schema_version: Version = SCHEMA_VERSION
    model: str
    parameters: Count
    device_bytes: Count
    """Memory of one device."""
    train_length: Count
    length: Count
    """Positions of a reading."""
    sequences: Count
    chunk_size: Count
    """Tokens of a text in one forward of a reading."""
    state_bytes: Count
    """Recurrent and conv state of one text."""
    keys_and_values_bytes: Count
    """Keys and values of one text after `length` tokens."""
    operations: float
    """Floating-point operations of a forward, a token."""
    rows: list[dict[str, Any]]
    """A reading, and training in several settings: `setting`, `tokens`, `memory` by part, `total` (bytes a
    device), `fits`, `tokens_per_second`."""
    sentence: str
    provenance: Provenance
