"""`longroll evaluate`: one measure at a time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from longroll.cli import _options as o
from longroll.cli import _tasks as t
from longroll.cli._flags import Command
from longroll.cli._numbers import length_option

app = typer.Typer(no_args_is_help=True, help="One measure at a time.")


@app.command("loss", cls=Command)
def loss(
    model: o.Model,
    text: o.Text = "stdlib",
    text_column: o.TextColumn = None,
    tokenizer: o.TokenizerName = None,
    length: o.Length = 16_384,
    sequences: o.Sequences = 4,
    concatenate: o.Concatenate = False,
    chunk_size: o.ChunkSize = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
    seed: o.Seed = 0,
    json: o.Json = None,
    output: o.Output = None,
) -> None:
    """Loss, perplexity and bits per byte at every position of long texts, in constant memory."""
    import math

    from rich.table import Table

    from longroll.cli._console import out, progress
    from longroll.measure import position_loss
    from longroll.results import provenance, write_json

    lm = o.open_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    tok = o.open_tokenizer(lm, model, tokenizer)
    tokens, bytes_per_token = o.read_sequences(
        text,
        tok,
        length=length,
        sequences=sequences,
        column=text_column,
        concatenate=concatenate,
        seed=seed,
    )
    began = time.perf_counter()
    with progress("measuring", total=length) as advance:
        found = position_loss(lm, tokens, chunk_size=chunk_size, progress=advance)
    seconds = time.perf_counter() - began
    curve = found.curve(per_octave=1)
    table = Table(title=f"{model}: {tokens.shape[0]} texts, {tokens[:, 1:].numel() / seconds:,.0f} tokens/s")
    for column in ("positions", "loss (nats)", "95 % interval", "perplexity", "bits per byte"):
        table.add_column(column, justify="right")
    for i, mean in enumerate(curve["loss"]):
        table.add_row(
            f"{curve['start'][i]}-{curve['stop'][i]}",
            f"{mean:.4f}",
            f"{curve['low'][i]:.4f} - {curve['high'][i]:.4f}",
            f"{math.exp(mean):.3f}" if mean < 700 else "inf",
            f"{mean / math.log(2) / bytes_per_token:.4f}",
        )
    out.print(table)
    result = {
        "kind": "position_loss",
        "model": lm.name,
        "sequences": tokens.shape[0],
        "max_position": length,
        "bytes_per_token": bytes_per_token,
        "curve": found.curve(),
        "loss": found.mean.tolist(),
        "provenance": provenance(lm, seed=seed, seconds=seconds),
    }
    if json:
        write_json(json, result)
    if output:
        write_json(output / "loss.json", result)


@app.command("passkey", cls=Command)
def passkey(
    model: o.Model,
    lengths: t.Lengths = "256,1k,4k,16k",
    depths: t.Depths = "0.1,0.5,0.9",
    samples: t.Samples = 20,
    batch_size: t.BatchSize = 16,
    haystack: t.HaystackText = "noise",
    instruction: t.Instruction = True,
    reading: t.HowRead = "plain",
    window: t.Window = None,
    label: t.Label = None,
    tokenizer: o.TokenizerName = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
    seed: o.Seed = 0,
    json: o.Json = None,
    output: o.Output = None,
) -> None:
    """Five digits told once in a long text, asked for at its end: right if the greedy tokens are these."""
    from longroll.tasks import Passkey, Row

    lm, tok = _open(model, tokenizer, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    text = t.open_haystack(haystack, tok, split="validation", seed=seed)
    task = Passkey(tok, haystack=text, instruction=instruction)
    rows = [Row(depth, task, depth) for depth in depths]
    t.run_task(
        lm,
        rows,
        lengths,
        train_length=lm.train_length,
        samples=samples,
        batch_size=batch_size,
        reading=reading,
        window=window,
        label=label,
        seed=seed,
        json=json,
        output=output,
    )


@app.command("niah", cls=Command)
def niah(
    model: o.Model,
    lengths: t.Lengths = "1k,4k,16k",
    depths: t.Depths = "0.1,0.5,0.9",
    samples: t.Samples = 20,
    batch_size: t.BatchSize = 16,
    reading: t.HowRead = "plain",
    window: t.Window = None,
    label: t.Label = None,
    tokenizer: o.TokenizerName = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
    seed: o.Seed = 0,
    json: o.Json = None,
    output: o.Output = None,
) -> None:
    """RULER's niah_single_1: a number between lines of noise, right if it is anywhere in 128 tokens."""
    from longroll.tasks import Niah, Row

    lm, tok = _open(model, tokenizer, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    task = Niah(tok)
    rows = [Row(depth, task, depth) for depth in depths]
    t.run_task(
        lm,
        rows,
        lengths,
        train_length=lm.train_length,
        samples=samples,
        batch_size=batch_size,
        reading=reading,
        window=window,
        label=label,
        seed=seed,
        json=json,
        output=output,
    )


@app.command("copying", cls=Command)
def copying(
    model: o.Model,
    lengths: t.Lengths = "10,20,50,100,150,200",
    train_length: Annotated[
        int | None, length_option(help="Letters of the longest string of training, for the figure.")
    ] = None,
    samples: t.Samples = 64,
    batch_size: t.BatchSize = 64,
    label: t.Label = None,
    tokenizer: o.TokenizerName = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
    seed: o.Seed = 0,
    json: o.Json = None,
    output: o.Output = None,
) -> None:
    """Copy strings of --lengths letters: teacher-forced, as in the source, and written freely."""
    from longroll.tasks import Copying, Row

    lm, tok = _open(model, tokenizer, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    t.run_task(
        lm,
        [Row(None, Copying(tok))],
        lengths,
        train_length=train_length,
        samples=samples,
        batch_size=batch_size,
        reading="plain",
        window=None,
        label=label,
        seed=seed,
        json=json,
        output=output,
    )


@app.command("babilong", cls=Command)
def babilong(
    model: o.Model,
    facts: t.Facts,
    books: t.Books = "none",
    lengths: t.Lengths = "0,4k,16k",
    qa: t.Kinds = "qa1,qa2,qa3,qa4,qa5",
    few_shot: t.FewShot = True,
    samples: t.Samples = 100,
    batch_size: t.BatchSize = 16,
    reading: t.HowRead = "plain",
    window: t.Window = None,
    label: t.Label = None,
    tokenizer: o.TokenizerName = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
    seed: o.Seed = 0,
    json: o.Json = None,
    output: o.Output = None,
) -> None:
    """Facts of bAbI scattered through books, and a question about them, by the official metric."""
    from longroll.tasks import Row

    lm, tok = _open(model, tokenizer, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    tasks = t.open_babilong(facts, books, qa, tok, few_shot=few_shot, train=False)
    t.run_task(
        lm,
        [Row(task.qa, task) for task in tasks],
        lengths,
        train_length=lm.train_length,
        samples=samples,
        batch_size=batch_size,
        reading=reading,
        window=window,
        label=label,
        seed=seed,
        json=json,
        output=output,
    )


@app.command("compare", cls=Command)
def compare(
    results: Annotated[
        list[Path], typer.Argument(help="Files that the task commands wrote, or recipes/results/*.json.")
    ],
    output: o.Output = None,
) -> None:
    """Put results of one task side by side: a table, and figures in --output."""
    from longroll.cli._console import out
    from longroll.report import write_figures

    runs = [run for path in results for run in _task_runs(path)]
    for name in dict.fromkeys(name for run in runs for name in run["tasks"]):
        shown = [run for run in runs if name in run["tasks"]]
        cells = max(len(run["tasks"][name]["accuracy"][0]) for run in shown)
        beside = max(1, (out.width - 10) // (15 * cells))  # runs that a table of this width has room for
        for first in range(0, len(shown), beside):
            out.print(t.task_table(shown[first : first + beside], name))
    if output:
        for path in write_figures(runs, output, "svg"):
            out.print(str(path))


def _task_runs(path: Path) -> list[dict]:
    """The result that a task command wrote, or all of a file of several, as in recipes/results."""
    from longroll.errors import LongrollError
    from longroll.results import read_json

    found = read_json(path)
    several = isinstance(found, dict) and found.get("kind") == "tasks"
    runs = list(found["runs"].values()) if several else [found]
    if not all(isinstance(run, dict) and run.get("kind") == "task" and "tasks" in run for run in runs):
        raise LongrollError(f"{path} holds no finished results of a task.")
    return runs


def _open(model: str, tokenizer: str | None, **how):
    """The model and its tokenizer."""
    lm = o.open_model(model, **how)
    return lm, o.open_tokenizer(lm, model, tokenizer)
