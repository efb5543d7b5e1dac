"""The result of `longroll posttrain`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from longroll.results._result import SCHEMA_VERSION, Count, Provenance, Result, Version


@dataclass(frozen=True, kw_only=True)
class PosttrainResult(Result):
    """How a model was post-trained, and the log of the training."""

    kind: Literal["posttrain"] = "posttrain"
    schema_version: Version = SCHEMA_VERSION
    model: str | None
    output: str
    """Folder of the trained model."""
    intervention: str
    recipe: str | None = None
    """What chose the intervention and the settings that were not given."""
    task: str | None
    options: dict[str, Any]
    """The fields of `longroll.training.PosttrainOptions`, and the intervention's arguments."""
    processes: int = 1
    """Each read `batch_size` rows."""
    not_finite_steps: Count = 0
    """Steps that were skipped, and whose states were dropped (`on_not_finite`)."""
    log: list[dict[str, Any]]
    """Entries of transformers' Trainer."""
    declined: str | None = None
    """Why nothing was saved; null where a model was."""
    look: dict[str, Any] | None = None
    """The reading of held-out text before the run (`longroll.measure.held_out.Reading`); null where none was
    made."""
    provenance: Provenance | None = None
