"""Results as JSON text: written whole or not at all, read with one line for what is not JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pydantic_core

from longroll.errors import LongrollError
from longroll.files import write_whole


def write_json(path: str | Path, data: Any) -> Path:
    """Write results whole or not at all; numbers that are not finite become null."""
    return write_whole(path, encode(data) + b"\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        LongrollError: for a missing file and one that is not JSON.
    """
    return decode(read_bytes(path), path)


def read_bytes(path: str | Path) -> bytes:
    """Read a file.

    Raises:
        LongrollError: for a file that cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise LongrollError(f"{path} cannot be read: {error.strerror}.") from None


def encode(data: Any) -> bytes:
    """Return JSON text of plain data; numbers that are not finite become null.

    Raises:
        LongrollError: for data that JSON has no form for.
    """
    try:
        return json.dumps(_finite(data), indent=1, default=_number).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise LongrollError(f"A result must be plain data: {error}.") from None


def decode(text: bytes, source: str | Path) -> Any:
    """Plain data of JSON text; `source` names the file in errors.

    Raises:
        LongrollError: for text that is not JSON, is nested too deeply, or holds a number beyond any range.
    """
    try:
        return pydantic_core.from_json(text)
    except ValueError as error:
        if "recursion" in str(error):
            raise LongrollError(f"{source} is nested too deeply: name a file of results.") from None
        raise LongrollError(f"{source} is not JSON ({error}): name a file of results.") from None


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _number(value: Any) -> float | None:
    """Return a number of another library (NumPy, torch)."""
    number = float(value)
    return number if math.isfinite(number) else None
