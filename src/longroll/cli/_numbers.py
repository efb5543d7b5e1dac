"""Lengths as people write them: 4096, 16k, 1.5M."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import typer

from longroll.errors import LongrollError

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def parse_length(text: str, *, minimum: int = 1) -> int:
    """Return the number of tokens that `text` names; k and M are 1024 and 1024 x 1024.

    Raises:
        typer.BadParameter: for anything else, a part of a token, and less than `minimum`.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([km]?)", text.strip().lower())
    tokens = Fraction(found[1]) * UNITS[found[2]] if found else Fraction(1, 2)
    if tokens.denominator != 1:
        raise typer.BadParameter(f"{text!r} is no number of tokens: write 4096, 16k or 1.5M.")
    if tokens < minimum:
        raise typer.BadParameter(f"{text!r} is less than {minimum}.")
    return int(tokens)


def parse_lengths(text: str) -> list[int]:
    """Return the lengths of --lengths, with commas between, 0 allowed, in ascending order.

    Raises:
        LongrollError: for anything else.
    """
    try:
        return sorted({parse_length(part, minimum=0) for part in text.split(",")})
    except typer.BadParameter as error:
        raise LongrollError(f"--lengths {text}: {error}") from None


def parse_depths(text: str) -> list[float]:
    """Return the numbers of --depths, from 0 to 1 with commas between, in ascending order.

    Raises:
        LongrollError: for anything else.
    """
    try:
        depths = sorted({float(part) for part in text.split(",")})
    except ValueError:
        depths = []
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise LongrollError(f"--depths {text}: depths are numbers from 0 to 1, with commas: 0.1,0.5,0.9.")
    return depths


def parse_counts(text: str, flag: str) -> list[int]:
    """Return whole numbers above 0 with commas between, each once.

    Raises:
        LongrollError: for anything else; it names the flag.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) and int(part) > 0 for part in parts):
        raise LongrollError(f"{flag} {text}: give whole numbers above 0, with commas: 4,8,16.")
    return list(dict.fromkeys(map(int, parts)))


def length_option(*names: str, help: str, minimum: int = 1, **options: Any) -> Any:
    """Return a flag that takes one length."""

    def tokens(value: object) -> int:
        return parse_length(str(value), minimum=minimum)

    return typer.Option(*names, help=help, parser=tokens, metavar="TOKENS", **options)
