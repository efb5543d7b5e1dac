"""`longroll evaluate`: one measure at a time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from longroll.cli import _figures as f
from longroll.cli import _options as o
from longroll.cli import _tasks as t
from longroll.cli._flags import Command
from longroll.cli._numbers import length_option, parse_counts

app = typer.Typer(no_args_is_help=True, help="One measure at a time.")


@app.command("loss", cls=Command)
def loss(
    model: o.Model,
    text: o.Text = "stdlib",
    text_column: o.TextColumn = None,
    tokenizer: o.TokenizerName = None,
    bos: o.Bos = None,
    length: o.Length = 16_384,
    sequences: o.Sequences = 4,
    concatenate: o.Concatenate = False,
    chunk_size: o.ChunkSize = None,
    reading: Annotated[
        str,
        typer.Option(
            help="plain; or held in the range of --window tokens: reset (all of the state), rescan, decay, "
            "clip (the recurrent states), window, window+first (attention)."
        ),
    ] = "plain",
    window: t.Window = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
    plugin: o.PluginName = None,
    seed: o.Seed = 0,
    json: o.Json = None,
    output: o.Output = None,
    format: f.TaskFormat = None,
    width: f.Width = None,
    font_size: f.FontSize = None,
    x: f.X = None,
    y: f.Y = None,
) -> None:
    """Measure loss, perplexity and bits per byte at every position of long texts, in constant memory."""
    import math

    from rich.table import Table

    from longroll.cli._console import out
    from longroll.cli._progress import progress
    from longroll.errors import LongrollError
    from longroll.measure import position_loss
    from longroll.measure.holds import check_hold, loss_under
    from longroll.ranks import join, rank, wait
    from longroll.report import write_figures
    from longroll.results import LossResult, provenance

    drawing = f.task_drawing(output, format=format, width=width, font_size=font_size, x=x, y=y)
    lm = o.open_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, plugin=plugin)
    train_length = o.stated_train_length(lm)
    span = None
    if reading == "plain" and window is not None:
        raise LongrollError(f"`window` {window}: `reading` plain has none: leave it out, or name a reading.")
    if reading != "plain":
        if chunk_size is not None:
            raise LongrollError(f"`chunk_size` {chunk_size}: `reading` {reading} has its own: leave it out.")
        check_hold(reading, lm)
        if window is None and train_length is None:
            raise LongrollError(
                f"`reading` {reading} needs a `window`: the model does not say how long it was trained."
            )
        span, _ = lm.find_train_length(window)
    tok = o.open_tokenizer(lm, model, tokenizer, bos=bos, trust_remote_code=trust_remote_code)
    tokens, bytes_per_token = o.read_sequences(
        text,
        tok,
        length=length,
        sequences=sequences,
        column=text_column,
        concatenate=concatenate,
        seed=seed,
    )
    join()
    kept = o.kept_beside(json, output and output / "loss.json")
    kept.begin(lm, tokens, chunk_size=chunk_size, reading=reading, window=span)
    began = time.perf_counter()
    with progress("measuring", total=length) as advance:
        if span is None:
            found = position_loss(lm, tokens, chunk_size=chunk_size, progress=advance, dealt=True, kept=kept)
        else:
            found = loss_under(reading, lm, tokens, span, progress=advance, dealt=True, kept=kept)
    seconds = time.perf_counter() - began + kept.spent
    result = LossResult.from_json(
        {
            "model": lm.name,
            "train_length": train_length,
            "sequences": tokens.shape[0],
            "max_position": length,
            "reading": reading,
            "window": span,
            "bytes_per_token": bytes_per_token,
            "tokenizer": tok.name,
            "prefix_ids": list(tok.prefix_ids),
            "curve": found.curve(),
            "loss": found.mean.tolist(),
            "provenance": provenance(lm, seed=seed, seconds=seconds),
        }
    )
    for file in (json, output and output / "loss.json"):
        if file and rank() == 0:
            result.write(file)
    curve = found.curve(per_octave=1)
    table = Table(title=f"{model}: {tokens.shape[0]} texts, {tokens[:, 1:].numel() / seconds:,.0f} tokens/s")
    for column in ("positions", "loss (nats)", "95 % interval", "perplexity", "bits per byte"):
        table.add_column(column, justify="right")
    for i, mean in enumerate(curve["loss"]):
        table.add_row(
            f"{curve['start'][i]}-{curve['stop'][i]}",
            f"{mean:.4f}",
            f"{curve['low'][i]:.4f} - {curve['high'][i]:.4f}",
            "inf" if mean > 700 else f"{math.exp(mean):.3f}",
            f"{mean / math.log(2) / bytes_per_token:.4f}",
        )
    out.print(table)
    if output and rank() == 0:
        f.print_figures(write_figures([result], output, **drawing))
    wait()
    kept.remove()


@t.task_command(app, lengths="256,1k,4k,16k")
def passkey(
    opened: t.Opened,
    *,
    depths: t.Depths = "0.1,0.5,0.9",
    haystack: t.HaystackText = "noise",
    instruction: t.Instruction = True,
    chat_template: t.ChatTemplate = False,
) -> t.TaskGrid:
    """Return five digits told once in a long text, asked for at its end: right if the greedy tokens are
    these.
    """
    from longroll.tasks import Passkey, Row

    text = t.open_haystack(haystack, opened.tokenizer, split="validation", seed=opened.seed)
    task = Passkey(opened.tokenizer, haystack=text, instruction=instruction, chat_template=chat_template)
    return t.TaskGrid([Row(depth, task, depth) for depth in depths], opened.lm.train_length)


@t.task_command(app, lengths="1k,4k,16k")
def niah(
    opened: t.Opened,
    *,
    depths: t.Depths = "0.1,0.5,0.9",
    needles: Annotated[
        str, typer.Option(help="single, multikey (three other keys), multivalue (four numbers of one key).")
    ] = "single",
    prompts: t.Prompts = "own",
    chat_template: t.ChatTemplate = False,
) -> t.TaskGrid:
    """Return RULER's needles: numbers between lines of noise, right if they are anywhere in 128 tokens."""
    from longroll.tasks import Niah, Row

    task = Niah(opened.tokenizer, needles=needles, prompts=prompts, chat_template=chat_template)
    return t.TaskGrid([Row(depth, task, depth) for depth in depths], opened.lm.train_length)


@t.task_command(app, without=("reading", "window"), lengths="10,20,50,100,150,200", samples=64, batch_size=64)
def copying(
    opened: t.Opened,
    *,
    train_length: Annotated[
        int | None, length_option(help="Letters of the longest string of training, for the figure.")
    ] = None,
) -> t.TaskGrid:
    """Copy strings of --lengths letters: teacher-forced, as in the source, and written freely."""
    from longroll.tasks import Copying, Row

    return t.TaskGrid([Row(None, Copying(opened.tokenizer))], train_length)


@t.task_command(app, lengths="0,4k,16k", samples=100)
def babilong(
    opened: t.Opened,
    *,
    facts: t.Facts,
    books: t.Books = "none",
    qa: t.Kinds = "qa1,qa2,qa3,qa4,qa5",
    few_shot: t.FewShot = True,
    prompts: t.Prompts = "own",
    chat_template: t.ChatTemplate = False,
) -> t.TaskGrid:
    """Return facts of bAbI scattered through books, and a question about them, by the official metric."""
    from longroll.tasks import Row, open_babilong

    kinds = t.parse_kinds(qa)
    form = {"few_shot": few_shot, "prompts": prompts, "chat_template": chat_template}
    tasks = open_babilong(opened.tokenizer, facts, books, kinds, train=False, **form)
    return t.TaskGrid([Row(task.qa, task) for task in tasks], opened.lm.train_length)


@t.task_command(app, lengths="1k,4k,16k")
def variables(
    opened: t.Opened,
    *,
    hops: Annotated[int, typer.Option(help="Times that the value is passed on.", min=1)] = 4,
    chat_template: t.ChatTemplate = False,
) -> t.TaskGrid:
    """Return RULER's variable tracking: a value passed from variable to variable between lines of noise."""
    from longroll.tasks import Row, Variables

    task = Variables(opened.tokenizer, hops=hops, chat_template=chat_template)
    return t.TaskGrid([Row(None, task)], opened.lm.train_length)


@t.task_command(app, without=("reading", "window"), lengths="64,256,1k,4k", samples=64, batch_size=64)
def tracking(
    opened: t.Opened,
    *,
    groups: t.Groups = "parity,z5,s3,s5",
) -> t.TaskGrid:
    """Return products of group elements read one by one: told after each of the last, and asked for at the
    end.
    """
    from longroll.tasks import Row, StateTracking

    rows = [Row(group, StateTracking(opened.tokenizer, group)) for group in t.parse_kinds(groups)]
    return t.TaskGrid(rows, opened.lm.train_length)


@t.task_command(app, lengths="256,1k,4k", samples=64, batch_size=64)
def recall(
    opened: t.Opened,
    *,
    pairs: Annotated[str, typer.Option(help="Keys that are told and asked for, with commas.")] = "4,8,16",
) -> t.TaskGrid:
    """Return multi-query associative recall: values told once after their keys, asked for at the end."""
    from longroll.tasks import Recall, Row

    counts = parse_counts(pairs, "--pairs")
    rows = [Row(f"{count} pairs", Recall(opened.tokenizer, count)) for count in counts]
    return t.TaskGrid(rows, opened.lm.train_length)


@app.command("compare", cls=Command)
def compare(
    results: Annotated[
        list[Path],
        typer.Argument(help="Files of one run, as the task commands write them, or of several."),
    ],
    output: o.Output = None,
    format: f.TaskFormat = None,
    width: f.Width = None,
    font_size: f.FontSize = None,
    x: f.X = None,
) -> None:
    """Put results of one task side by side: a table, and figures in --output."""
    from longroll.cli._console import out
    from longroll.errors import LongrollError
    from longroll.report import write_figures
    from longroll.results import TaskResult, read_results

    drawing = f.task_drawing(output, format=format, width=width, font_size=font_size, x=x)
    unfinished = "holds no finished results of a task."
    runs = []
    for path in results:
        found = read_results(path, TaskResult, otherwise=unfinished)
        if not all(run.tasks for run in found):
            raise LongrollError(f"{path} {unfinished}")
        runs += found
    for name in dict.fromkeys(name for run in runs for name in run.tasks or {}):
        shown = [run for run in runs if run.tasks and name in run.tasks]
        cells = max(len(run.tasks[name].names) for run in shown if run.tasks)
        beside = max(1, (out.width - 10) // (15 * cells))  # runs that a table of this width has room for
        for first in range(0, len(shown), beside):
            out.print(t.task_table(shown[first : first + beside], name))
    if output:
        f.print_figures(write_figures(runs, output, **drawing))
