"""What the task commands share: their flags, the result file that a run goes on from, tables and figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longroll.cli import _options as o
from longroll.cli._numbers import length_option, parse_depths, parse_lengths

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from longroll.data import Tokenizer
    from longroll.model import RecurrentLM
    from longroll.tasks import BABILong, Row
    from longroll.tasks.haystack import Haystack
    from longroll.training import PosttrainOptions

Lengths = Annotated[
    Any,
    typer.Option(
        help="Lengths in tokens, with commas; k and M are 1024 and 1024 x 1024: 256,1k,16k.",
        parser=parse_lengths,
        metavar="LENGTHS",
    ),
]
Depths = Annotated[
    Any,
    typer.Option(
        help="Where the needle stands, 0 (first) to 1 (last), with commas.",
        parser=parse_depths,
        metavar="DEPTHS",
    ),
]
Samples = Annotated[int, typer.Option(help="Samples of each length and depth.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Samples read together.", min=1)]
HaystackText = Annotated[
    str, typer.Option(help='What the needle is hidden in: "noise" (as in the source), or text as for --text.')
]
Instruction = Annotated[bool, typer.Option(help="Begin with the source's description of the task.")]
Facts = Annotated[
    str,
    typer.Option(
        help="Folder of bAbI's files (tasks_1-20_v1-2, with en-10k or en below, or one of these), or "
        "BABILong's hub id: RMT-team/babilong-1k-samples."
    ),
]
Books = Annotated[
    str, typer.Option(help='Text that the facts are hidden in, as for --text; "none": facts alone.')
]
Kinds = Annotated[str, typer.Option("--qa", help="Which of qa1 to qa5, with commas.")]
FewShot = Annotated[
    bool,
    typer.Option(help="The source's prompt with examples; --no-few-shot: for a model finetuned on the task."),
]
HowRead = Annotated[
    str,
    typer.Option(
        "--reading",
        help="plain; or a baseline: reset (only the last --window tokens), decay, clip (the state, to the "
        "range of --window tokens), chunk (answer from the best --window tokens: OPRM).",
    ),
]
Window = Annotated[int | None, length_option(help="Of --reading. Default: the training length.")]
Label = Annotated[
    str | None, typer.Option(help="Name in tables and figures. Default: the model and the reading.")
]

HAYSTACK_TOKENS = 1 << 22
"""Read of a text to hide needles in; longer prompts go through it again."""


def open_haystack(source: str, tokenizer: Tokenizer, *, split: str, seed: int) -> Haystack:
    """Noise, or text of a split: the same whatever the lengths, so that a grid can grow."""
    from longroll.tasks import NoiseHaystack, TextHaystack

    if source == "noise":
        return NoiseHaystack(tokenizer)
    corpus = o.read_corpus(source, tokenizer, split=split, column=None, max_tokens=HAYSTACK_TOKENS, seed=seed)
    return TextHaystack(corpus, source)


def open_babilong(
    facts: str, books: str, kinds: str, tokenizer: Tokenizer, *, few_shot: bool, train: bool
) -> list[BABILong]:
    """The tasks named, with facts and books of one split."""
    from longroll.data import read_documents
    from longroll.tasks import BABILong, read_stories

    split = "train" if train else "validation"
    texts = [] if books == "none" else list(read_documents(books, split=split))
    return [
        BABILong(
            tokenizer, qa, read_stories(facts, qa, "train" if train else "test"), texts, few_shot=few_shot
        )
        for qa in (kind.strip() for kind in kinds.split(","))
    ]


def run_task(
    lm: RecurrentLM,
    rows: Sequence[Row],
    lengths: Sequence[int],
    *,
    train_length: int | None,
    samples: int,
    batch_size: int,
    reading: str,
    window: int | None,
    label: str | None,
    seed: int,
    json: Path | None,
    output: Path | None,
) -> dict[str, Any]:
    """Measure a grid with a progress bar, or go on where the result file ends; print a table, draw figures.

    Raises:
        LongrollError: for a result file of another model or other settings.
    """
    from longroll.cli._console import out, progress
    from longroll.report import write_figures
    from longroll.results import write_json
    from longroll.tasks.baselines import make_reading
    from longroll.tasks.evaluate import evaluate_grid, fingerprint, task_result

    task = rows[0].task
    window = window or lm.train_length
    label = label or (lm.name if reading == "plain" else f"{lm.name}, {reading}")
    settings = {"weights": fingerprint(lm), "samples": samples, "seed": seed, "reading": reading}
    settings |= {} if reading == "plain" else {"window": window}
    settings |= task.settings()
    files = [file for file in (json, output / f"{task.name}.json" if output else None) if file]
    cells = finished_cells(files[0], settings) if files else []
    chosen = make_reading(reading, lm, window=window, rows=rows, length=max(lengths))
    began = time.perf_counter()

    def result(found: list[dict[str, Any]]) -> dict[str, Any]:
        seconds = time.perf_counter() - began
        return task_result(
            lm,
            found,
            rows,
            lengths,
            label=label,
            train_length=train_length,
            settings=settings,
            seed=seed,
            seconds=seconds,
        )

    with progress(f"measuring {task.name}", total=len(rows) * len(lengths) * samples) as advance:
        cells = evaluate_grid(
            lm,
            rows,
            lengths,
            samples=samples,
            batch_size=batch_size,
            seed=seed,
            reading=chosen,
            finished=cells,
            save=(lambda found: write_json(files[0], result(found))) if files else None,
            progress=advance,
        )
    found = result(cells)
    for file in files:
        write_json(file, found)
    for name in found["tasks"]:
        out.print(task_table([found], name))
    if output:
        write_figures([found], output, "svg")
    return found


def training_rows(
    task: str,
    tokenizer: Tokenizer,
    options: PosttrainOptions,
    *,
    intervention: str,
    haystack: str,
    instruction: bool,
    facts: str | None,
    books: str,
    kinds: str,
    windows: int,
) -> Dataset:
    """The rows of a task to train on, with a word of warning where State Passing will do harm.

    Raises:
        LongrollError: for babilong without facts, and copying by TBPTT.
    """
    import os

    from longroll.cli._console import console
    from longroll.errors import LongrollError
    from longroll.tasks import Copying, CopyRows, Niah, Passkey, Task, TaskRows

    lanes = options.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    rows = options.steps * options.accumulation * lanes
    tasks: list[Task]
    if task == "copying":
        if intervention == "tbptt":
            raise LongrollError(
                "--task copying has no text that goes on from row to row: use --intervention sp."
            )
        return CopyRows(Copying(tokenizer), rows, context=options.length, seed=options.seed)
    if task == "babilong":
        if facts is None:
            raise LongrollError("--task babilong needs --facts: the folder of bAbI's files.")
        tasks = [*open_babilong(facts, books, kinds, tokenizer, few_shot=False, train=True)]
    elif task == "niah":
        tasks = [Niah(tokenizer, new_tokens=len(tokenizer.encode(" 1234567")) + 1)]
    else:
        text = open_haystack(haystack, tokenizer, split="train", seed=options.seed)
        tasks = [Passkey(tokenizer, haystack=text, instruction=instruction)]
    if not tasks[0].stationary and intervention in ("sp", "tbptt") and windows == 1:
        console.print(
            f"Warning: --intervention {intervention} is the wrong tool for {task}: the final state of one "
            "sample holds an answer that no next text is about (the data are not stationary). Use "
            "--intervention fitted.",
            style="yellow",
        )
    return TaskRows(tasks, options.length, rows, lanes=lanes, windows=windows, seed=options.seed)


def finished_cells(file: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of an earlier run with the same settings; none if there was none.

    Raises:
        LongrollError: the file holds something else, or the first setting that differs.
    """
    from longroll.errors import LongrollError
    from longroll.results import read_json

    if not file.exists():
        return []
    found = read_json(file)
    if not isinstance(found, dict) or found.get("kind") != "task":
        raise LongrollError(f"{file} holds no results of a task: name another file, or remove it.")
    before = found["settings"]
    for name in {**before, **settings}:
        if before.get(name) != settings.get(name):
            raise LongrollError(
                f"{file} holds results with {name} = {before.get(name)!r}, not {settings.get(name)!r}: name "
                "another file, remove this one, or use the same settings to go on with it."
            )
    return found["cells"]


def task_table(runs: Sequence[dict[str, Any]], name: str):
    """Lengths down, runs and their depths (or kinds) across, with 95 % intervals."""
    from rich.table import Table

    from longroll.report.units import position

    metric = runs[0]["tasks"][name]["metric"].replace("_", " ")
    whose = f", {runs[0]['label']}" if len(runs) == 1 else ""
    table = Table(title=f"{runs[0]['task']}{whose}: {metric} (95 % interval)")
    table.add_column("length", justify="right")
    for run in runs:
        held = run["tasks"][name]
        for row in held.get("rows") or held.get("depths") or [""]:
            table.add_column(
                f"{run['label']} {row}".strip() if len(runs) > 1 else str(row or metric), justify="right"
            )
    lengths = sorted({length for run in runs for length in run["tasks"][name]["lengths"]})
    for length in lengths:
        values: list[str] = []
        for run in runs:
            held = run["tasks"][name]
            width = len(held["accuracy"][0])
            if length in held["lengths"]:
                at = held["lengths"].index(length)
                columns = zip(held["accuracy"][at], held["low"][at], held["high"][at], strict=True)
                values += [_share(*column) for column in columns]
            else:
                values += ["-"] * width
        table.add_row(position(length), *values)
    return table


def _share(mean: float, low: float | None, high: float | None) -> str:
    return f"{mean:.2f}" if low is None else f"{mean:.2f} ({low:.2f}-{high:.2f})"
