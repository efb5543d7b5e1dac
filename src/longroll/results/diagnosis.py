"""The result of `longroll diagnose`: where a model breaks, how badly, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from longroll.results._result import (
    SCHEMA_VERSION,
    Count,
    Marks,
    Number,
    Numbers,
    Place,
    Provenance,
    Result,
    Section,
    Table,
    Version,
    check_lengths,
    check_width,
)
from longroll.results.task import Grid

Positions = Annotated[list[Count], Field(min_length=1)]
REQUIRED_LEVELS = ("in_range", "far")


@dataclass(frozen=True, kw_only=True)
class Curve(Section):
    """Loss in nats over bins of positions [start, stop), with 95 % intervals."""

    position: Annotated[list[Place], Field(min_length=1)]
    """Middle of each bin."""
    loss: Numbers
    start: list[Count] | None = None
    stop: list[Count] | None = None
    low: list[Number] | None = None
    high: list[Number] | None = None

    def __post_init__(self) -> None:
        check_lengths(self, "position", "loss", "start", "stop", "low", "high")


@dataclass(frozen=True, kw_only=True)
class Excess(Section):
    """Loss in nats above that of a fresh start on the same tokens, with 95 % intervals."""

    position: Positions
    mean: Numbers
    low: Numbers
    high: Numbers

    def __post_init__(self) -> None:
        check_lengths(self, "position", "mean", "low", "high")


@dataclass(frozen=True, kw_only=True)
class LayerStates(Section):
    """Statistics of the state of one layer, one entry for each position."""

    layer: Count
    std: Numbers
    kind: str | None = None
    heads: Count | None = None
    norm: list[Number] | None = None
    max: list[Number] | None = None
    rank: list[Number] | None = None
    std_heads: list[list[Number]] | None = None
    rank_heads: list[list[Number]] | None = None
    conv: dict[str, list[Number]] | None = None


@dataclass(frozen=True, kw_only=True)
class States(Section):
    """Statistics of the recurrent state over position."""

    position: Positions
    layers: Annotated[list[LayerStates], Field(min_length=1)]

    def __post_init__(self) -> None:
        for layer in self.layers:
            if len(layer.std) != len(self.position):
                raise ValueError(
                    f"std of layer {layer.layer} has {len(layer.std)} entries, position has "
                    f"{len(self.position)}"
                )


@dataclass(frozen=True, kw_only=True)
class Remembrance(Section):
    """Effective remembrance for every first token kept (rows) and token predicted (columns)."""

    starts: Positions
    ends: Positions
    mean: Table
    low: Table | None = None
    high: Table | None = None
    distance: str | None = None

    def __post_init__(self) -> None:
        check_lengths(self, "starts", "mean", "low", "high")
        check_width(self, len(self.ends), "ends", "mean", "low", "high")


@dataclass(frozen=True, kw_only=True)
class Causal(Section):
    """The share of the damage that holding some heads in their training range recovers."""

    what: str
    recovered: Number
    low: Number = None
    high: Number = None
    heads: list[list[Count | None]] | None = None
    """Layer and head of each; null for a whole layer."""


@dataclass(frozen=True, kw_only=True)
class Coverage(Section):
    """Shift of every head past the training length in standard deviations, layers x heads."""

    map: Table
    layers: list[Count] | None = None
    significant: Marks | None = None
    """Whether the shift is more than sampling noise."""
    log_variance_ratio: Table | None = None
    energy: Table | None = None
    p: Table | None = None
    in_range: Positions | None = None
    """Positions of the in-range states."""
    far: Positions | None = None
    """Positions of the far states."""
    false_discoveries: float | None = None
    """Share of the heads called significant that may be so by chance."""
    ranking: list[str] | None = None
    """Heads by how far they are out."""
    causal: list[Causal] | None = None
    causal_sentence: str | None = None
    explained: bool | None = None

    def __post_init__(self) -> None:
        check_lengths(self, "map", "layers", "significant")
        for i, (row, marks) in enumerate(zip(self.map, self.significant or [], strict=False)):
            if len(row) != len(marks):
                raise ValueError(f"significant[{i}] has {len(marks)} entries, map[{i}] has {len(row)}")


@dataclass(frozen=True, kw_only=True)
class BlameShare(Section):
    """A share of the damage that a reading recovers, or that a side does, with its interval over texts."""

    what: str
    recovered: Number
    low: Number
    high: Number


@dataclass(frozen=True, kw_only=True)
class BlameResult(Section):
    """Which side of a hybrid does the damage past the training length."""

    verdict: Literal["state", "attention", "both", "neither"] | None
    """The side that causes the damage; null where the texts do not decide it."""
    sentence: str
    damage: Number
    """Nats above a fresh start, over the last octave of the positions read."""
    parts: list[BlameShare]
    """The part of the states and that of the attention (Shapley values); empty without damage."""
    states: list[BlameShare]
    """What readings recover that hold the recurrent states in range."""
    attentions: list[BlameShare]
    """What readings recover that hold attention in range."""
    together: BlameShare | None = None
    """Share of the damage that the best of each kind recover together."""
    positions: str | None = None
    """How attention takes positions: `none`, `rotary`, `other`."""
    factor: Number = None
    """By which rotary positions were scaled."""
    length: Count | None = None
    """Positions read, of which `damage` is the last octave; null in older files."""
    left: list[BlameShare] = field(default_factory=list)
    """The share of the damage that each side does while the other side alone is held in range."""


@dataclass(frozen=True, kw_only=True)
class IID(Section):
    """Whether the states where training ends could be IID noise."""

    share_not_iid: Number
    """Share of the heads that are not IID."""
    state_rank: Number
    """Median effective rank of the states."""
    noise_rank: Number
    """Median effective rank of Fitted Noise."""


@dataclass(frozen=True, kw_only=True)
class Stationarity(Section):
    """Whether the texts end as they go on."""

    drift: Number
    p: Number
    stationary: bool


@dataclass(frozen=True, kw_only=True)
class Texts(Section):
    """Mean loss of each text in nats, for the comparison with another run."""

    fingerprint: str
    """Hash of the tokens."""
    in_range: Numbers
    far: Numbers


@dataclass(frozen=True, kw_only=True)
class Difference(Section):
    """Nats by which the run reads above another, with the 95 % interval over texts."""

    mean: Number
    low: Number
    high: Number
    paired: bool
    """Whether each text was compared with itself."""


@dataclass(frozen=True, kw_only=True)
class Comparison(Section):
    """The run against another one."""

    label: str
    in_range: Difference
    far: Difference | None


@dataclass(frozen=True, kw_only=True)
class Precision(Section):
    """Effect of the dtype of the weights."""

    dtype: str
    largest: Number = None
    """The largest float16 activation."""
    where: str | None = None
    """The module that gave it."""
    not_finite_from: Count | None = None
    """The first position at which a loss is not finite."""
    finite_in_float32: bool | None = None


@dataclass(frozen=True, kw_only=True)
class AdviceResult(Section):
    """What to do next: an intervention (or the recipe that chooses it), its reasons, and a command."""

    sentence: str
    intervention: str | None = None
    command: str | None = None
    steps: Count | None = None
    tokens: Count | None = None
    seconds: Number = None


_SECTIONS = ("iid", "stationarity", "remembrance", "coverage", "blame")


@dataclass(frozen=True, kw_only=True)
class DiagnosisResult(Result):
    """Where a model breaks, how badly, and why. A section that is absent or null was not measured."""

    kind: Literal["diagnosis"] = "diagnosis"
    schema_version: Version = SCHEMA_VERSION
    label: str | None
    """Names the run in tables and figures."""
    verdict: str
    sentence: str | None = None
    model: str | None = None
    architecture: str | None = None
    parameters: Count | None = None
    train_length: Annotated[Count, Field(ge=1)] | None = None
    sequences: Count | None = None
    max_position: Count | None = None
    bytes_per_token: Annotated[float, Field(gt=0)] | None = None
    tokenizer: str | None = None
    prefix_ids: list[int] | None = None
    """What every sequence begins with: BOS."""
    edge: Count | None = None
    """Position at which the loss leaves its level in range; null for a model that holds."""
    severity: Number = None
    """Nats above a fresh start over the last octave of positions."""
    levels: dict[str, Number] | None = None
    """Mean loss in nats: `in_range`, `2x`, `8x`, ... times the training length, `far`."""
    curve: Curve | None = None
    excess: Excess | None = None
    states: States | None = None
    iid: IID | None = None
    stationarity: Stationarity | None = None
    remembrance: Remembrance | None = None
    coverage: Coverage | None = None
    blame: BlameResult | None = None
    """Set for hybrids that break."""
    advice: AdviceResult | None = None
    tasks: dict[str, Grid] | None = None
    intervention: str | None = None
    """The intervention that the model was trained with, by its short name."""
    texts: Texts | None = None
    comparisons: dict[str, Comparison] | None = None
    """Against the model before a repair (`against`), and against a `control`."""
    precision: Precision | None = None
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        for name in REQUIRED_LEVELS:
            if self.levels is not None and name not in self.levels:
                raise ValueError(f"levels.{name} is missing")

    def to_json(self) -> dict[str, Any]:
        """Plain data; sections that were not measured are left out."""
        data = super().to_json()
        return {name: value for name, value in data.items() if value is not None or name not in _SECTIONS}

    def level(self, name: str) -> float:
        """Return mean loss in nats of a level; NaN where it was not measured or is not finite."""
        value = (self.levels or {}).get(name)
        return math.nan if value is None else value
