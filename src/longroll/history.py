"""What longroll did to a model, kept in its config.json, so that a repair is known as one.

Files of state-spaces and BlinkDL have no place for it, so a file beside them holds it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from longroll.errors import LongrollError
from longroll.files import write_whole

ENTRY = "longroll"
BESIDE = "longroll.json"
Kind = Literal["posttrain", "calibrate"]
_NAMED_BY: dict[Kind, str] = {"posttrain": "intervention", "calibrate": "what"}
"""The field that an entry of each kind has at least."""


def record(config: Any, step: Mapping[str, Any], kind: Kind = "posttrain") -> None:
    """Add a post-training run, or a calibration, to a config.

    Args:
        config: the config of the model.
        step: plain data: `intervention` ("sp", ..., "none" for the control), `steps` and other settings; of a
            calibration `what`, `unit` and `scales`.
        kind: what was done.
    """
    told = _all(config)
    setattr(config, ENTRY, told | {kind: [*told.get(kind, []), dict(step)]})


def history(config: Any, kind: Kind = "posttrain") -> list[dict[str, Any]]:
    """Return the post-training runs, or calibrations, that a config tells of, in order; an entry of another
    form tells of none.
    """
    kept = getattr(config, ENTRY, None)
    runs = kept.get(kind) if isinstance(kept, Mapping) else None
    known = [dict(run) for run in runs if isinstance(run, Mapping)] if isinstance(runs, list) else []
    return [run for run in known if isinstance(run.get(_NAMED_BY[kind]), str)]


def _all(config: Any) -> dict[str, Any]:
    """Return what a config tells of, by kind."""
    return {kind: found for kind in _NAMED_BY if (found := history(config, kind))}


def save_beside(config: Any, place: Path) -> None:
    """Write the runs and `train_length` of a config beside an original checkpoint (`place`)."""
    told = {"train_length": getattr(config, "train_length", None), ENTRY: {"posttrain": []} | _all(config)}
    write_whole(_file_beside(place), json.dumps(told, indent=1).encode())


def read_beside(config: Any, place: Path) -> None:
    """Put what `save_beside` wrote, if it did, into a config.

    Raises:
        LongrollError: for a file that is not such JSON.
    """
    file = _file_beside(place)
    if not file.is_file():
        return
    try:
        told = json.loads(file.read_text())
    except ValueError as error:
        raise LongrollError(f"{file} is not valid JSON: {error}.") from None
    length = told.get("train_length") if isinstance(told, dict) else 0
    if length is not None:
        if type(length) is not int or length < 1:
            raise LongrollError(f"{file}: train_length must be a whole number above 0: correct or remove it.")
        config.train_length = length
    setattr(config, ENTRY, told.get(ENTRY))


def _file_beside(place: Path) -> Path:
    """Return `place` is a folder of state-spaces or a file of BlinkDL."""
    return place.with_name(f"{place.name}.longroll.json") if place.suffix == ".pth" else place / BESIDE
