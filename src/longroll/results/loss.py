"""The result of `longroll evaluate loss`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from longroll.results._result import SCHEMA_VERSION, Count, Numbers, Provenance, Result, Version
from longroll.results.diagnosis import Curve


@dataclass(frozen=True, kw_only=True)
class LossResult(Result):
    """Loss in nats at every position."""

    kind: Literal["position_loss"] = "position_loss"
    schema_version: Version = SCHEMA_VERSION
    model: str | None
    train_length: Annotated[Count, Field(ge=1)] | None = None
    """T, where the model tells it."""
    sequences: Count
    reading: str = "plain"
    """How the text was read: `longroll.measure.holds` has other ways."""
    window: Count | None = None
    """Tokens that the reading works over."""
    max_position: Count
    bytes_per_token: Annotated[float, Field(gt=0)] | None
    tokenizer: str | None = None
    prefix_ids: list[int] | None = None
    """What every sequence begins with: BOS."""
    curve: Curve
    loss: Numbers
    """Mean over sequences at each position."""
    provenance: Provenance | None = None
