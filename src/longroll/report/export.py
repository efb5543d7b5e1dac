"""Figures for a paper: column widths, 8 pt type, embedded TrueType fonts, no dates inside."""

import html
import io
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longroll.errors import LongrollError
from longroll.files import write_whole
from longroll.report.plates import Plate, plates
from longroll.report.runs import AnyRun
from longroll.report.style import PAPER_COLUMN, PAPER_PAGE, Look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What matplotlib would stamp with the time or its version is left out: the same runs give the same bytes.
_METADATA: dict[str, dict[str, Any]] = {
    "pdf": {"CreationDate": None, "ModDate": None},
    "png": {"Software": None},
    "svg": {"Date": None},
}
_COLUMN = 4.5  # inches: a wider figure is laid out for both columns
_LEAST_EMS = 24  # a narrower figure has no room for its axes beside their labels
_FULL_WIDTH = ("states", "task-")  # small multiples need both columns


def write_figures(
    runs: Sequence[AnyRun],
    folder: str | os.PathLike[str],
    format: str = "pdf",
    *,
    width: float | None = None,
    font_size: float | None = None,
    x: str = "log",
    y: str | None = None,
) -> list[Path]:
    """Write every figure the runs give into a folder, ready for a paper, and return the paths of the figures.

    The numbers that NAME.pdf shows stand beside it in NAME.csv.

    Args:
        runs: Results of `longroll diagnose` or of tasks, or their JSON.
        folder: Made if missing; files of the same name are replaced.
        format: "pdf", "png" (300 dpi) or "svg".
        width: Width of each figure in inches; by default 3.25 (a column), and 6.75
            for figures of many panels.
        font_size: Size of labels in points; ticks are an eighth smaller. By default 8.
        x: Scale of positions and lengths, "log" or "linear". Curves of remembrance begin at
            0: theirs is linear.
        y: Unit of loss by position: "perplexity", "bits_per_byte" or "nats"; by default perplexity, or bits
            per byte where the runs differ in their tokens.

    Raises:
        LongrollError: for an argument that is not allowed, a figure narrower than 24 times its font size,
            bits per byte of a run without `bytes_per_token`, and a place that cannot be written.
    """
    if format not in _METADATA:
        raise LongrollError(f"Unknown figure format {format!r}: use one of {', '.join(_METADATA)}.")
    if x not in ("log", "linear"):
        raise LongrollError(f"`x` is {x!r}: use log or linear.")
    check_size(width, font_size)
    paths: list[Path] = []
    for plate in plates(runs, y):
        look = _look(plate, width, font_size, x)
        for panel in plate.panels:
            name = f"{slug(panel.name)}.{format}"
            if Path(folder, name) in paths:  # two labels may come to the same file name
                name = f"{slug(panel.name)}-{len(paths)}.{format}"
            said = (panel.data.sentence(), plate.look_for)
            paths.append(write_whole(Path(folder, name), _bytes(panel.draw(look), look, format, *said)))
            write_whole(paths[-1].with_suffix(".csv"), panel.data.csv().encode("utf-8"))
    return paths


def check_size(width: float | None, font_size: float | None) -> None:
    """Check the width (inches) and the font size (points) of figures; None is the default.

    Raises:
        LongrollError: for a size out of range, and a figure narrower than 24 times its font size.
    """
    inches = PAPER_COLUMN.width if width is None else width
    points = PAPER_COLUMN.text if font_size is None else font_size
    for name, value, least, most in (("width", inches, 1, 40), ("font_size", points, 3, 72)):
        if not least <= value <= most:
            raise LongrollError(f"`{name}` is {value:g}: choose from {least} to {most}.")
    if 72 * inches < _LEAST_EMS * points:
        raise LongrollError(
            f"A `width` of {inches:.3g} inches has no room for a `font_size` of {points:g} points: the width "
            f"must be at least {_LEAST_EMS} times the font size, "
            f"which is {_LEAST_EMS * points / 72:.3g} inches."
        )


def _look(plate: Plate, width: float | None, font_size: float | None, x: str) -> Look:
    """Choose the medium of a plate, and change it as asked."""
    wide = plate.name.startswith(_FULL_WIDTH) if width is None else width > _COLUMN
    look = PAPER_PAGE if wide else PAPER_COLUMN
    width, text = width or look.width, font_size or look.text
    return replace(look, width=width, text=text, small=text * look.small / look.text, x=x)


def _bytes(fig: "Figure", look: Look, format: str, title: str, reading: str) -> bytes:
    """Draw a figure, with a sentence that says what it shows and another on how to read it."""
    import matplotlib

    buffer = io.BytesIO()
    metadata = _METADATA[format] | {"Title": title}
    if format != "svg":
        metadata["Subject" if format == "pdf" else "Description"] = reading
    shapes = {"svg.fonttype": "path"}  # an SVG holds no fonts; another font is wider, and labels are cut off
    with matplotlib.rc_context(look.rc | shapes):
        fig.savefig(buffer, format=format, dpi=300, metadata=metadata, facecolor="white")
    if format == "svg":
        told = f"</title>\n <desc>{html.escape(reading, quote=False)}</desc>"
        return buffer.getvalue().replace(b"</title>", told.encode("utf-8"), 1)
    return buffer.getvalue()


def slug(text: str) -> str:
    """Make a file name: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
