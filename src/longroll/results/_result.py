"""What all results share: typed fields, a schema version, and JSON in and out.

pydantic validates the fields. A field that the schema does not name stays in the object and in its JSON.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, cast

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from longroll.errors import LongrollError
from longroll.results._json import decode, encode, write_json

SCHEMA_VERSION = 1
"""Version of the fields. A file without the field is older: it has some of the fields of version 1."""

_LARGEST = 2**53  # the largest whole number that JSON readers agree on

Number = float | None
"""A measured number; null stands for one that was not finite."""
Count = Annotated[int, Field(ge=0, le=_LARGEST)]
"""A number of tokens, positions, samples or parameters."""
Version = Annotated[int, Field(ge=1, le=SCHEMA_VERSION)]
"""A schema version that this release reads."""
Place = Annotated[float, Field(ge=0, le=_LARGEST)]
"""A position that may be fractional, as the middle of a bin."""
Numbers = Annotated[list[Number], Field(min_length=1)]
"""Measured numbers, one or more."""


def _rows(value: Any) -> Any:
    """Make rows of one entry each of a flat list."""
    flat = isinstance(value, list) and not any(isinstance(row, list) for row in value)
    return [[entry] for entry in value] if flat else value


Table = Annotated[list[Numbers], Field(min_length=1), BeforeValidator(_rows)]
"""Rows of measured numbers; a flat list gives rows of one entry."""
Marks = Annotated[list[list[bool | None]], BeforeValidator(_rows)]
"""Rows of yes and no."""


class Section:
    """A part of a result. Its fields are those of its dataclass, and any other field its file holds."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="allow", allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        """Plain data: every field by its name, null where it holds nothing."""
        return {name: _plain(value) for name, value in vars(self).items()}

    def changed(self, **values: Any) -> Self:
        """Return a copy with other values of some fields.

        `dataclasses.replace` would drop the fields that the schema does not name.
        """
        other = copy.copy(self)
        vars(other).update(values)
        return other


class Result(Section):
    """A result of a command: a section with the fields `kind` and `schema_version`."""

    kind: str
    schema_version: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, source: str | Path = "result") -> Self:
        """Check plain data, and make a result of it.

        Args:
            data: the result; numbers that are not finite count as null.
            source: names the data in errors.

        Raises:
            LongrollError: for a field that is missing, has the wrong type or range, or does not fit another
                field, and for a schema version that is newer than this release.
        """
        return cls.from_text(encode(_plain(dict(data))), source=source)

    @classmethod
    def from_text(cls, text: bytes, *, source: str | Path) -> Self:
        """Check JSON text, as `from_json` does; a NaN or an infinity in it is an error."""
        data = decode(text, source)
        version = data.get("schema_version", SCHEMA_VERSION) if isinstance(data, dict) else SCHEMA_VERSION
        if type(version) is int and version > SCHEMA_VERSION:
            raise LongrollError(
                f"{source}: schema_version {version} is newer than {SCHEMA_VERSION}, the newest that this "
                "release of longroll reads: install a newer one."
            )
        try:
            return cast(Self, _adapter(cast(Any, cls)).validate_json(text, strict=True))
        except ValidationError as error:
            raise LongrollError(f"{source}: {_fault(error, data)}.") from None

    def write(self, path: str | Path) -> Path:
        """Write the result to a JSON file, whole or not at all."""
        return write_json(path, self.to_json())


@dataclass(frozen=True, kw_only=True)
class Provenance(Section):
    """What made a result; the fields are those that `provenance` gives."""

    command: str | None = None
    versions: dict[str, str] | None = None
    seed: int | None = None
    device: str | None = None
    threads: Count | None = None
    """Threads of PyTorch in a process."""
    processes: Count | None = None
    dtype: str | None = None
    date: str | None = None
    seconds: Number = None


def check_lengths(section: Section, *names: str) -> None:
    """Check that lists of a section have as many entries as the first of them.

    Raises:
        ValueError: naming the two fields that differ.
    """
    first = getattr(section, names[0])
    for name in names[1:]:
        values = getattr(section, name)
        if values is not None and len(values) != len(first):
            raise ValueError(f"{name} has {len(values)} entries, {names[0]} has {len(first)}")


def check_width(section: Section, width: int, what: str, *names: str) -> None:
    """Check that every row of some tables of a section has `width` entries, one for each of `what`.

    Raises:
        ValueError: naming the table and its row.
    """
    for name in names:
        for i, row in enumerate(getattr(section, name) or []):
            if len(row) != width:
                raise ValueError(f"{name}[{i}] has {len(row)} entries for {width} {what}")


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_json()
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


_WANTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "dataclass_type": "an object",
    "finite_number": "a finite number",
}


def _fault(error: ValidationError, data: Any) -> str:
    """Say in words what is wrong with the first faulty field."""
    found = error.errors(include_url=False)[0]
    field = _field(found["loc"], data)
    if found["type"] == "missing":
        return f"{field} is missing"
    if found["type"] == "too_short":
        return f"{field} must not be empty"
    if found["type"] in _WANTED:
        return f"{field or 'the file'} must be {_WANTED[found['type']]}, not {_described(found['input'])}"
    if found["type"] == "value_error":
        reason = str(found["ctx"]["error"])
        return f"{field}: {reason}" if field else reason
    return f"{field} {found['msg'].replace('Input should', 'must', 1)}"


def _field(place: tuple[int | str, ...], data: Any) -> str:
    """Return a place in the data as people write it: curve.loss[3]. What pydantic adds for unions is left
    out.
    """
    field = ""
    for part in place:
        inside = isinstance(data, dict | list)
        if isinstance(part, int):
            field += f"[{part}]"
        elif isinstance(data, dict):
            name = re.sub(r"[^\w .,+-]", "?", part)[:60]
            field += f".{name}" if field else name
        if inside:
            known = part in data if isinstance(data, dict) else isinstance(part, int) and part < len(data)
            data = data[cast(Any, part)] if known else None
    return field


def _described(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "an infinity"
    if isinstance(value, int | float):
        return f"{value:g}" if abs(value) < _LARGEST else "a huge number"
    return "a string" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"
