"""The result of `longroll quickstart`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from longroll.results._result import SCHEMA_VERSION, Count, Number, Provenance, Result, Version


@dataclass(frozen=True, kw_only=True)
class QuickstartResult(Result):
    """The specimen before and after its repair; losses in nats, `far` over the last octave of positions."""

    kind: Literal["quickstart"] = "quickstart"
    schema_version: Version = SCHEMA_VERSION
    verdict_before: str
    verdict_after: str
    sentence_before: str
    sentence_after: str
    train_length: Annotated[Count, Field(ge=1)]
    edge_before: Count | None
    loss_in_range_before: Number
    loss_in_range_after: Number
    loss_far_before: Number
    loss_far_after: Number
    max_position: Count
    seconds: Number
    report: str
    """File of the report."""
    model: str
    """Folder of the repaired model."""
    provenance: Provenance | None = None
