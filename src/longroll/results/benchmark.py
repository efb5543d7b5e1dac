"""The result of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longroll.results._result import SCHEMA_VERSION, Provenance, Result, Version


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult(Result):
    """What a benchmark measured. Its numbers are additional fields."""

    kind: Literal["benchmark"] = "benchmark"
    schema_version: Version = SCHEMA_VERSION
    what: str | None = None
    """Name of the benchmark."""
    provenance: Provenance
