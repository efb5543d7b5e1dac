"""Counts and sizes that no machine holds or no run ends with: refused before anything is taken."""

from __future__ import annotations

from contextlib import suppress
from decimal import Decimal
from pathlib import Path

import psutil

from longroll.errors import LongrollError

GIB = 2**30
ROOM = 0.94
"""Share of a device's memory that tensors can take: the rest holds the driver, libraries and gaps."""
SPEED = 1_000_000
"""Tokens a second that one device reads at best: a small model on a fast GPU."""
YEAR = 365 * 24 * 3600  # seconds
MOST_TOKENS = SPEED * YEAR
"""Tokens that one process can be asked to read."""


_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def machine_bytes() -> int:
    """Return the bytes of main memory that there are: the machine's, or its container's."""
    held: int = psutil.virtual_memory().total
    for file in _LIMITS:
        with suppress(OSError, ValueError):  # no container; "max"
            held = min(held, int(Path(file).read_text()))
    return held


def check_bytes(what: str, least: float, advice: str, *, held: int | None = None) -> None:
    """Refuse what takes more memory than there is.

    Args:
        what: the arguments and their values.
        least: bytes that it takes at least.
        advice: what to ask for instead.
        held: bytes of the device; None: of the machine.

    Raises:
        LongrollError: with the bytes of both.
    """
    held = machine_bytes() if held is None else held
    if least > held:
        gib = _short(Decimal(least) / GIB)
        raise LongrollError(f"{what} takes at least {gib} GiB, and there are {held / GIB:,.0f}: {advice}.")


def check_tokens(what: str, tokens: int, advice: str) -> None:
    """Refuse work that takes more than a year on any device.

    Args:
        what: the arguments and their values.
        tokens: tokens that one process reads.
        advice: what to ask for instead.

    Raises:
        LongrollError: with the tokens and the years.
    """
    if tokens > MOST_TOKENS:
        years = _short(Decimal(tokens) / MOST_TOKENS)
        raise LongrollError(
            f"{what} is {_short(tokens)} tokens, {years} years at {SPEED:,} tokens a second: {advice}."
        )


def _short(number: float | int | Decimal) -> str:
    """Return a number to three digits, a whole one in full below a million."""
    exact = Decimal(number)
    if exact < 100:
        return f"{exact:.3g}"
    return f"{exact:,.0f}" if exact < 10**6 else f"{exact:.2e}"
