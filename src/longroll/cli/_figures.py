"""Flags of the figures that `report` and `evaluate` draw."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from longroll.errors import LongrollError


class Format(StrEnum):
    """File formats of figures."""

    pdf = "pdf"
    png = "png"
    svg = "svg"


class Scale(StrEnum):
    """Scales of an axis of positions or lengths."""

    log = "log"
    linear = "linear"


class Unit(StrEnum):
    """Units of loss."""

    nats = "nats"
    perplexity = "perplexity"
    bits_per_byte = "bits-per-byte"


def parse_width(text: str) -> float:
    """Return the inches that `text` names: 3.25, 3.25in or 85mm.

    Raises:
        typer.BadParameter: for anything else.
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+) ?(in|mm)?", text.strip().lower())
    if not found:
        raise typer.BadParameter(f"{text!r} is no width: write 3.25 or 3.25in (inches), or 85mm.")
    return float(found[1]) / (25.4 if found[2] == "mm" else 1.0)


Width = Annotated[
    Any,
    typer.Option(
        help="Width of each figure in inches (3.25, 3.25in) or millimetres (85mm). Default: 3.25 inches, and "
        "6.75 for figures of many panels.",
        parser=parse_width,
        metavar="WIDTH",
        show_default=False,
    ),
]
FontSize = Annotated[
    float | None, typer.Option(help="Size of the labels in points. Default: 8.", min=3, max=72)
]
X = Annotated[
    Scale | None,
    typer.Option(
        "--x", help="Scale of positions and lengths, where they are drawn as curves. Default: log.",
        show_default=False,
    ),
]  # fmt: skip
Y = Annotated[
    Unit | None,
    typer.Option(
        "--y",
        help="Unit of loss by position. Default: perplexity, or bits-per-byte where runs differ in tokens.",
        show_default=False,
    ),
]

TaskFormat = Annotated[
    Format | None,
    typer.Option(
        "--format", help="File format of the figures in --output. Default: svg.", show_default=False
    ),
]


def drawing(folder: Path | None, flag: str, **chosen: Any) -> dict[str, Any]:
    """Return the keyword arguments of `write_figures` for the flags given.

    Args:
        folder: the folder of the figures; without one nothing is drawn.
        flag: the flag that names the folder.
        **chosen: values of the flags by the names of `write_figures`; None is a flag not given.

    Raises:
        LongrollError: for a flag of the figures where no figures are drawn, and a size that is not allowed.
    """
    from longroll.report.export import check_size

    given = {name: value for name, value in chosen.items() if value is not None}
    if folder is None and given:
        raise LongrollError(
            f"`{next(iter(given))}` is for figures, and none are drawn: name a folder by {flag}."
        )
    check_size(given.get("width"), given.get("font_size"))
    return {
        name: value.value.replace("-", "_") if isinstance(value, StrEnum) else value
        for name, value in given.items()
    }


def task_drawing(output: Path | None, *, format: Format | None, **chosen: Any) -> dict[str, Any]:
    """Return what `drawing` returns for a task, whose figures stand in --output and are SVG by default."""
    return {"format": "svg"} | drawing(output, "--output", format=format, **chosen)


def print_figures(paths: list[Path]) -> None:
    """Print the path of each figure and of its numbers."""
    from longroll.cli._console import out

    for path in paths:
        out.print(str(path))
        out.print(str(path.with_suffix(".csv")))
