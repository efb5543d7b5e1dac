"""Figures for a paper: column widths, 8 pt type, embedded TrueType fonts, no dates inside."""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longroll.errors import LongrollError
from longroll.files import write_whole
from longroll.report.plates import plates
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
_FULL_WIDTH = ("states", "task-")  # small multiples need both columns


def write_figures(runs: Sequence[AnyRun], folder: str | os.PathLike[str], format: str = "pdf") -> list[Path]:
    """Write every figure the runs give into a folder, ready for a paper, and return the paths.

    Args:
        runs: Results of `longroll diagnose` or of tasks, or their JSON.
        folder: Made if missing; files of the same name are replaced.
        format: "pdf", "png" (300 dpi) or "svg".
    """
    if format not in _METADATA:
        raise LongrollError(f"Unknown figure format {format!r}: use one of {', '.join(_METADATA)}.")
    paths: list[Path] = []
    for plate in plates(runs):
        look = PAPER_PAGE if plate.name.startswith(_FULL_WIDTH) else PAPER_COLUMN
        for panel in plate.panels:
            name = f"{slug(panel.name)}.{format}"
            if Path(folder, name) in paths:  # two labels may come to the same file name
                name = f"{slug(panel.name)}-{len(paths)}.{format}"
            paths.append(write_whole(Path(folder, name), _bytes(panel.draw(look), look, format)))
    return paths


def _bytes(fig: "Figure", look: Look, format: str) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    shapes = {"svg.fonttype": "path"}  # an SVG holds no fonts; another font is wider, and labels are cut off
    with matplotlib.rc_context(look.rc | shapes):
        fig.savefig(buffer, format=format, dpi=300, metadata=_METADATA[format], facecolor="white")
    return buffer.getvalue()


def slug(text: str) -> str:
    """Make a file name: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
