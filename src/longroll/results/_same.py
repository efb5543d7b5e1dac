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


def same_form(before: Any, now: Mapping[str, Any]) -> bool:
    """Return whether `before`, read from a file, has the names of `now` and values of the same types.

    A text and None are of one type.
    """
    if not isinstance(before, dict) or before.keys() != now.keys():
        return False
    types = ({type(before[name]), type(now[name])} for name in now)
    return all(len(found) == 1 or found == {str, type(None)} for found in types)


def warn_of_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn where `versions` of packages and the kind of `device` are not those that a run was started on."""
    for package in before["versions"] | now["versions"]:
        was, given = before["versions"].get(package), now["versions"].get(package)
        if was != given:
            logger.warning("The run was started with %s %s, not %s.", package, was, given)
    if before["device"] != now["device"]:
        logger.warning("The run was started on %s, not %s.", before["device"], now["device"])
