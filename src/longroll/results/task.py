"""The result of a task: its cells, and once the grid is whole, its tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from longroll.results._result import (
    SCHEMA_VERSION,
    Count,
    Number,
    Provenance,
    Result,
    Section,
    Table,
    Version,
    check_lengths,
    check_width,
)


@dataclass(frozen=True, kw_only=True)
class Score(Section):
    """Mean of a score over the samples of a cell, with its 95 % interval."""

    mean: float
    low: Number = None
    high: Number = None


@dataclass(frozen=True, kw_only=True)
class Cell(Section):
    """One length and row of a grid."""

    length: Count
    row: float | str | None
    """A depth, the name of a kind, or null in a grid of one row."""
    samples: Count
    scores: Annotated[dict[str, Score], Field(min_length=1)]
    prompt_tokens: Count | None = None
    seconds: Number = None
    examples: list[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Grid(Section):
    """A table of one score, lengths x rows, as figures draw it."""

    lengths: Annotated[list[Count], Field(min_length=1)]
    accuracy: Table
    low: Table | None = None
    high: Table | None = None
    depths: list[float] | None = None
    rows: list[str] | None = None
    """Names of kinds, in place of depths."""
    metric: str | None = None
    unit: str | None = None
    chance: list[Number] | None = None
    """What a guess scores in each row, where that is above 0."""

    def __post_init__(self) -> None:
        width, names = len(self.accuracy[0]), self.names
        if len(self.accuracy) != len(self.lengths) or {len(row) for row in self.accuracy} != {len(names)}:
            raise ValueError(
                f"accuracy has shape ({len(self.accuracy)}, {width}), not {len(self.lengths)} lengths x "
                f"{len(names)} depths"
            )
        if self.chance is not None and len(self.chance) != width:
            raise ValueError(f"chance has {len(self.chance)} entries for {width} depths")
        check_lengths(self, "lengths", "low", "high")
        check_width(self, width, "depths", "low", "high")

    @property
    def names(self) -> list[str]:
        """Names of the rows; one empty name where the grid has a single row."""
        return self.rows or [f"{depth:g}" for depth in self.depths or []] or [""]


@dataclass(frozen=True, kw_only=True)
class TaskResult(Result):
    """Cells measured so far, and the tables of a grid that is whole."""

    kind: Literal["task"] = "task"
    schema_version: Version = SCHEMA_VERSION
    task: str
    label: str | None
    model: str | None = None
    train_length: Annotated[Count, Field(ge=1)] | None
    settings: dict[str, Any]
    """What has to be the same for more cells to be added."""
    cells: list[Cell] = field(default_factory=list)
    tasks: dict[str, Grid] | None = None
    """A table a score; absent while cells are missing."""
    provenance: Provenance | None = None
