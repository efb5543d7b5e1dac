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
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Files made by `longroll diagnose --json`; and by `longroll evaluate passkey --json` "
            "and the like, which go to the diagnosis of the same --label."
        ),
    ],
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

    read = {path: read_json(path) for path in runs}
    loaded = []
    for path, run in read.items():
        kind = run.get("kind") if isinstance(run, dict) else None
        if kind == "diagnosis":
            loaded.append(run)
        elif kind != "task":
            raise LongrollError(
                f"{path} is no diagnosis: make one with `longroll diagnose MODEL --json {path}`."
            )
    for path, run in read.items():
        if run["kind"] == "task":
            of_it = [other for other in loaded if other["label"] == run["label"]]
            if not of_it or "tasks" not in run:
                raise LongrollError(
                    f"{path} is no finished task of a diagnosis labelled {run['label']!r}: use the same "
                    "--label for both, or `longroll evaluate compare`."
                )
            of_it[0]["tasks"] = {**(of_it[0].get("tasks") or {}), **run["tasks"]}
    out.print(str(write_report(loaded, output / "report.html", title=title)))
    if figures:
        for path in write_figures(loaded, figures, format.value):
            out.print(str(path))
