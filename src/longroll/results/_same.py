"""Whether work that goes on is the work that was begun."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longroll.errors import LongrollError

logger = logging.getLogger("longroll")


def check_settings(place: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare the settings that results in `place` were measured with and those asked for.

    Raises:
        LongrollError: naming the first setting that differs.
    """
    for name in {**before, **now}:
        held, wanted = before.get(name), now.get(name)
        if held != wanted:
            raise LongrollError(
                f"{place} holds results with {name} = {held!r}, not {wanted!r}: name another file, remove "
                "this one, or use the same settings to go on with it."
            )


def warn_of_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn where `versions` of packages and the kind of `device` are not those that a run was started on."""
    for package in before["versions"] | now["versions"]:
        was, given = before["versions"].get(package), now["versions"].get(package)
        if was != given:
            logger.warning("The run was started with %s %s, not %s.", package, was, given)
    if before["device"] != now["device"]:
        logger.warning("The run was started on %s, not %s.", before["device"], now["device"])
