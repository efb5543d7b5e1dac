"""`longroll report`: one page from saved results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longroll.cli import _figures as f
from longroll.cli import _options as o


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Result files of `longroll diagnose --json`, and of `longroll evaluate passkey --json` and "
            "other tasks, which belong to the diagnosis with the same --label."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for report.html.", callback=o.folder_to_write)] = Path(
        "longroll-out"
    ),
    figures: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the figures as files, each with its numbers as CSV.",
            callback=o.folder_to_write,
        ),
    ] = None,
    format: Annotated[
        f.Format | None,
        typer.Option(help="File format of the figures in --figures. Default: pdf.", show_default=False),
    ] = None,
    width: f.Width = None,
    font_size: f.FontSize = None,
    x: f.X = None,
    y: f.Y = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
) -> None:
    """Draw one self-contained HTML page comparing any number of diagnoses."""
    from longroll.cli._console import out
    from longroll.errors import LongrollError
    from longroll.report import write_figures, write_report
    from longroll.results import DiagnosisResult, TaskResult, read_results

    drawing = f.drawing(figures, "--figures", format=format, width=width, font_size=font_size, x=x, y=y)
    read = [
        (path, result)
        for path in runs
        for result in read_results(
            path,
            DiagnosisResult,
            TaskResult,
            otherwise=f"is no diagnosis: make one with `longroll diagnose MODEL --json {path}`.",
        )
    ]
    loaded = [result for _, result in read if isinstance(result, DiagnosisResult)]
    for path, task in read:
        if isinstance(task, TaskResult):
            place = next((i for i, run in enumerate(loaded) if run.label == task.label), None)
            if place is None or task.tasks is None:
                raise LongrollError(
                    f"{path} is no finished task of a diagnosis labelled {task.label!r}: use the same "
                    "--label for both, or `longroll evaluate compare`."
                )
            loaded[place] = loaded[place].changed(tasks={**(loaded[place].tasks or {}), **task.tasks})
    drawn = write_figures(loaded, figures, **drawing) if figures else []
    out.print(str(write_report(loaded, output / "report.html", title=title)))
    f.print_figures(drawn)
