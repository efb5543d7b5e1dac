"""`longroll report`: one page from saved results."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """Of the figures for a paper."""

    pdf = "pdf"
    png = "png"
    svg = "svg"


def report(
    runs: Annotated[list[Path], typer.Argument(help="Files made by `longroll diagnose --json`.")],
    output: Annotated[Path, typer.Option(help="Folder for report.html.")] = Path("longroll-out"),
    figures: Annotated[Path | None, typer.Option(help="Folder for paper-ready figures too.")] = None,
    format: Annotated[Format, typer.Option(help="Of these figures.")] = Format.pdf,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
) -> None:
    """Draw one self-contained HTML page comparing any number of diagnoses."""
    from longroll.cli._console import out
    from longroll.errors import LongrollError
    from longroll.report import write_figures, write_report
    from longroll.results import read_json

    loaded = [read_json(path) for path in runs]
    for path, run in zip(runs, loaded, strict=True):
        if not isinstance(run, dict) or run.get("kind") != "diagnosis":
            raise LongrollError(
                f"{path} is no diagnosis: make one with `longroll diagnose MODEL --json {path}`."
            )
    out.print(str(write_report(loaded, output / "report.html", title=title)))
    if figures:
        for path in write_figures(loaded, figures, format.value):
            out.print(str(path))
