"""Shared code of the task commands: their flags, the run of a grid, tables, and rows to train on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

import typer

from longroll.cli import _figures as f
from longroll.cli import _options as o
from longroll.cli._flags import Command
from longroll.cli._numbers import parse_depths, parse_lengths

if TYPE_CHECKING:
    from rich.table import Table

    from longroll.data import Tokenizer
    from longroll.model import RecurrentLM
    from longroll.results import Grid, TaskResult
    from longroll.tasks import CopyRows, Row, TaskRows, TrackingRows
    from longroll.tasks.haystack import Haystack
    from longroll.tasks.held_out import HeldOutSamples
    from longroll.training import PosttrainOptions

Lengths = Annotated[
    Any,
    typer.Option(
        help="Lengths of prompt and answer in tokens, with commas; 16k is 16 x 1024.",
        parser=parse_lengths,
        metavar="LENGTHS",
    ),
]
Depths = Annotated[
    Any,
    typer.Option(
        help="Depths of the needle from 0 (first) to 1 (last), with commas.",
        parser=parse_depths,
        metavar="DEPTHS",
    ),
]
Samples = Annotated[int, typer.Option(help="Number of samples for each length and depth.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Number of samples that are read together.", min=1)]
HaystackText = Annotated[
    str, typer.Option(help='Text around the needle: "noise", or a source of text as in diagnose --text.')
]
Instruction = Annotated[bool, typer.Option(help="Begin the prompt with a description of the task.")]
Facts = Annotated[
    str,
    typer.Option(
        help="Folder of the files of bAbI (tasks_1-20_v1-2, or en-10k or en in it), or the hub id of "
        "BABILong: RMT-team/babilong-1k-samples."
    ),
]
Books = Annotated[
    str, typer.Option(help='Text around the facts, as in diagnose --text; "none" leaves the facts alone.')
]
Kinds = Annotated[str, typer.Option("--qa", help="Question types from qa1 to qa5, with commas.")]
FewShot = Annotated[
    bool,
    typer.Option(
        help="Begin with a description and examples; --no-few-shot suits a model that was finetuned on "
        "the task."
    ),
]
Prompts = Annotated[
    str, typer.Option(help='Words of the prompts: "own", or "official" from the package lm-eval (an extra).')
]
ChatTemplate = Annotated[
    bool,
    typer.Option("--chat-template", help="Put the prompt into the chat template of the tokenizer."),
]
HowRead = Annotated[
    str,
    typer.Option(
        "--reading",
        help="plain; or a baseline: reset (only the last --window tokens), decay, clip (the state, to the "
        "range of --window tokens), chunk (answer from the best --window tokens: OPRM), rescan (recurrent "
        "states of the last --window tokens), window (attention of the last --window tokens), window+first "
        "(of the first four too).",
    ),
]
Window = Annotated[
    int | None, typer.Option(help="Tokens that --reading uses. Default: the training length.", min=1)
]
Groups = Annotated[
    str,
    typer.Option(
        help="Groups, with commas: parity, z2 to z120 (cyclic), s3 to s5, s3-swaps to s5-swaps (words of "
        "transpositions), a3 to a5."
    ),
]
Label = Annotated[
    str | None, typer.Option(help="Name in tables and figures. Default: the model and the reading.")
]


@dataclass(frozen=True, kw_only=True)
class TaskFlags:
    """The flags of every task command."""

    model: o.Model
    lengths: Lengths
    samples: Samples = 20
    batch_size: BatchSize = 16
    reading: HowRead = "plain"
    window: Window = None
    label: Label = None
    tokenizer: o.TokenizerName = None
    bos: o.Bos = None
    device: o.Device = None
    dtype: o.Dtype = None
    trust_remote_code: o.TrustRemoteCode = False
    plugin: o.PluginName = None
    seed: o.Seed = 0
    json: o.Json = None
    output: o.Output = None
    format: f.TaskFormat = None
    width: f.Width = None
    font_size: f.FontSize = None
    x: f.X = None


class Opened(NamedTuple):
    """What a task command works on."""

    lm: RecurrentLM
    tokenizer: Tokenizer
    seed: int


class TaskGrid(NamedTuple):
    """The rows of a grid, and the length of training in the unit of its lengths."""

    rows: list[Row]
    train_length: int | None


def task_command(
    app: typer.Typer, *, without: Sequence[str] = (), **defaults: Any
) -> Callable[[Callable[..., TaskGrid]], Callable[..., TaskGrid]]:
    """Make a command of a function that gives a grid.

    The command takes `TaskFlags` and the keyword arguments of the function. It opens the model, measures the
    grid, prints its tables, and writes results and figures.

    Args:
        app: gets the command, by the function's name.
        without: shared flags that the command does not take; they keep their defaults.
        defaults: defaults of shared flags.
    """

    def register(grid_of: Callable[..., TaskGrid]) -> Callable[..., TaskGrid]:
        own = list(inspect.signature(grid_of, eval_str=True).parameters.values())[1:]
        first, *more = [flag for flag in _flags(defaults) if flag.name not in without]

        def command(**arguments: Any) -> None:
            told = {flag.name: arguments.pop(flag.name) for flag in own}
            measure(grid_of, TaskFlags(**arguments), **told)

        command.__signature__ = inspect.Signature([first, *own, *more])  # type: ignore[attr-defined]
        app.command(grid_of.__name__, cls=Command, help=grid_of.__doc__)(command)
        return grid_of

    return register


def _flags(defaults: dict[str, Any]) -> list[inspect.Parameter]:
    """Return the flags of `TaskFlags` as parameters of a command."""
    hints = get_type_hints(TaskFlags, include_extras=True)
    empty = inspect.Parameter.empty
    return [
        inspect.Parameter(
            flag.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(flag.name, empty if flag.default is MISSING else flag.default),
            annotation=hints[flag.name],
        )
        for flag in fields(TaskFlags)
    ]


def measure(grid_of: Callable[..., TaskGrid], flags: TaskFlags, **told: Any) -> None:
    """Measure a grid with a progress bar, print its tables, and write results and figures."""
    from longroll.cli._console import out
    from longroll.cli._progress import progress
    from longroll.files import is_stream
    from longroll.ranks import join, rank
    from longroll.report import write_figures
    from longroll.tasks import run_task

    drawing = f.task_drawing(
        flags.output, format=flags.format, width=flags.width, font_size=flags.font_size, x=flags.x
    )
    lm = o.open_model(
        flags.model,
        device=flags.device,
        dtype=flags.dtype,
        trust_remote_code=flags.trust_remote_code,
        plugin=flags.plugin,
    )
    tokenizer = o.open_tokenizer(
        lm, flags.model, flags.tokenizer, bos=flags.bos, trust_remote_code=flags.trust_remote_code
    )
    join()
    opened = Opened(lm, tokenizer, flags.seed)
    rows, train_length = grid_of(opened, **told)
    if train_length == lm.train_length:  # in tokens; a task may have a unit of its own
        o.stated_train_length(lm)
    name = rows[0].task.name
    files = [file for file in (flags.json, flags.output and flags.output / f"{name}.json") if file]
    resumed = next((file for file in files if not is_stream(file)), None)
    with progress(f"measuring {name}", total=len(rows) * len(flags.lengths) * flags.samples) as advance:
        found = run_task(
            lm,
            rows,
            flags.lengths,
            train_length=train_length,
            samples=flags.samples,
            batch_size=flags.batch_size,
            reading=flags.reading,
            window=flags.window,
            label=flags.label,
            seed=flags.seed,
            file=resumed,
            progress=advance,
        )
    if rank() > 0:
        return
    for file in files:
        if file != resumed:
            found.write(file)
    for table in found.tasks or {}:
        out.print(task_table([found], table))
    if flags.output:
        write_figures([found], flags.output, **drawing)


def parse_kinds(text: str) -> list[str]:
    """Return names with commas, each once."""
    return list(dict.fromkeys(kind.strip() for kind in text.split(",")))


def open_haystack(source: str, tokenizer: Tokenizer, *, split: str, seed: int) -> Haystack:
    """Return noise, or text of a split, read with a progress bar."""
    from longroll.cli._progress import progress
    from longroll.tasks import open_haystack
    from longroll.tasks.haystack import HAYSTACK_TOKENS

    if source == "noise":
        return open_haystack(source, tokenizer, split=split)
    with progress(f"reading {source}", total=HAYSTACK_TOKENS) as advance:
        return open_haystack(
            source, tokenizer, split=split, seed=seed, progress=lambda done, _: advance(done)
        )


def training_rows(
    task: str,
    tokenizer: Tokenizer,
    options: PosttrainOptions,
    *,
    haystack: str,
    instruction: bool,
    facts: str | None,
    books: str,
    kinds: str,
    windows: int,
    groups: str,
    pairs: int,
) -> TaskRows | CopyRows | TrackingRows:
    """Return the rows of a task to train on.

    Raises:
        LongrollError: for babilong without facts.
    """
    from longroll.ranks import world_size
    from longroll.tasks import training_rows

    lanes = options.batch_size * world_size()
    return training_rows(
        task,
        tokenizer,
        length=options.length,
        rows=options.steps * options.accumulation * lanes,
        lanes=lanes,
        windows=windows,
        seed=options.seed,
        haystack=open_haystack(haystack, tokenizer, split="train", seed=options.seed)
        if task == "passkey"
        else None,
        instruction=instruction,
        facts=facts,
        books=books,
        kinds=parse_kinds(kinds),
        groups=parse_kinds(groups),
        pairs=pairs,
    )


def held_out_rows(
    task: str,
    tokenizer: Tokenizer,
    options: PosttrainOptions,
    *,
    haystack: str,
    instruction: bool,
    facts: str | None,
    books: str,
    kinds: str,
    pairs: int,
) -> HeldOutSamples:
    """Return samples that training does not read, as `training_rows` makes those that it does.

    Raises:
        LongrollError: for copying and tracking, which are not made longer than a row, and as
            `training_rows`.
    """
    from longroll.errors import LongrollError
    from longroll.tasks import open_tasks
    from longroll.tasks.held_out import HeldOutSamples

    if task in ("copying", "tracking"):
        raise LongrollError(f"`until_healthy`: --task {task} has no sample longer than a row: leave it out.")
    text = None
    if task == "passkey":
        text = open_haystack(haystack, tokenizer, split="validation", seed=options.seed)
    tasks = open_tasks(
        task,
        tokenizer,
        train=False,
        haystack=text,
        instruction=instruction,
        facts=facts,
        books=books,
        kinds=parse_kinds(kinds),
        pairs=pairs,
    )
    return HeldOutSamples.of_tasks(tasks, options.length, seed=options.seed)


def warn_of(task: str, rows: TaskRows | CopyRows | TrackingRows, intervention: str, *, hybrid: bool) -> None:
    """Warn where State Passing will do harm to a task, and where attention does not see a whole sample."""
    from longroll.cli._console import console
    from longroll.tasks import CopyRows, TaskRows

    tasks = [] if isinstance(rows, CopyRows) else rows.tasks
    several = isinstance(rows, TaskRows) and rows.windows > 1
    stationary = several or all(task.stationary for task in tasks)
    if not stationary and intervention in ("sp", "tbptt"):
        console.print(
            f"Warning: --intervention {intervention} is the wrong tool for {task}: the final state of one "
            "sample holds an answer that no next text is about (the data are not stationary). Use "
            "--intervention fitted.",
            style="yellow",
        )
    if hybrid and isinstance(rows, TaskRows) and several:
        console.print(
            f"Warning: --windows {rows.windows}: the attention of a hybrid starts each row without keys, so "
            "only the recurrent states carry what a sample tells in an earlier row. Leave --windows out.",
            style="yellow",
        )


def task_table(runs: Sequence[TaskResult], name: str) -> Table:
    """Return lengths down, runs and their depths (or kinds) across, with 95 % intervals and chance."""
    from rich.table import Table

    from longroll.report.units import position

    held = [(run, run.tasks[name]) for run in runs if run.tasks and name in run.tasks]
    metric = (held[0][1].metric or "accuracy").replace("_", " ")
    whose = f", {runs[0].label}" if len(runs) == 1 else ""
    table = Table(title=f"{runs[0].task}{whose}: {metric} (95 % interval)")
    table.add_column("length", justify="right")
    for run, grid in held:
        names = grid.rows or [str(depth) for depth in grid.depths or []] or [""]
        for row in names:
            heading = f"{run.label or ''} {row}".strip() if len(runs) > 1 else row or metric
            table.add_column(heading, justify="right")
    for length in sorted({length for _, grid in held for length in grid.lengths}):
        values = [value for _, grid in held for value in _values(grid, length)]
        table.add_row(position(length), *values)
    if any(grid.chance for _, grid in held):
        table.add_section()
        guesses = [guess for _, grid in held for guess in grid.chance or [None] * len(grid.names)]
        table.add_row("chance", *(_share(guess, None, None) for guess in guesses))
    return table


def _values(grid: Grid, length: int) -> list[str]:
    """Return the cells of one length; dashes where it was not measured."""
    if length not in grid.lengths:
        return ["-"] * len(grid.names)
    at = grid.lengths.index(length)
    nothing = [None] * len(grid.names)
    low, high = (end[at] if end else nothing for end in (grid.low, grid.high))
    return [_share(*values) for values in zip(grid.accuracy[at], low, high, strict=True)]


def _share(mean: float | None, low: float | None, high: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.2f}" if low is None or high is None else f"{mean:.2f} ({low:.2f}-{high:.2f})"
