"""The result of `longroll doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from longroll.results._result import SCHEMA_VERSION, Count, Number, Result, Version


@dataclass(frozen=True, kw_only=True)
class DoctorResult(Result):
    """What a machine can run, and which kernels are in use."""

    kind: Literal["doctor"] = "doctor"
    schema_version: Version = SCHEMA_VERSION
    device: str
    threads: Count
    versions: dict[str, str]
    families: list[dict[str, Any]]
    problems: list[str]
    specimen: str


@dataclass(frozen=True, kw_only=True)
class PackingResult(Result):
    """Whether documents packed into one row see each other: `longroll doctor --packing`."""

    kind: Literal["packing"] = "packing"
    schema_version: Version = SCHEMA_VERSION
    model: str
    longroll: Number
    """Relative change of the second document's logits when the first is replaced, in longroll's forward."""
    own: Number
    """The same in the model's own forward; null where it fails."""
    own_error: str
    limit: float
    """Largest change that is taken for rounding."""
    sentences: list[str]
