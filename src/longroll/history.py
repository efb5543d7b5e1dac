"""What longroll did to a model, kept in its config.json, so that a repair is known as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ENTRY = "longroll"


def record(config: Any, step: Mapping[str, Any]) -> None:
    """Add a post-training run to a config.

    Args:
        config: of the model.
        step: plain data: `intervention` ("sp", ..., "none" for the control), `steps` and other settings.
    """
    setattr(config, ENTRY, {"posttrain": [*history(config), dict(step)]})


def history(config: Any) -> list[dict[str, Any]]:
    """The post-training runs that a config tells of, in order; an entry of another form tells of none."""
    kept = getattr(config, ENTRY, None)
    runs = kept.get("posttrain") if isinstance(kept, Mapping) else None
    known = [dict(run) for run in runs if isinstance(run, Mapping)] if isinstance(runs, list) else []
    return [run for run in known if isinstance(run.get("intervention"), str)]
