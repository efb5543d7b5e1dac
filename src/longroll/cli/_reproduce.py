"""`longroll reproduce`: the paper's experiment on the official checkpoints, from one command."""

from __future__ import annotations

import gc
import shutil
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longroll.cli import _options as o
from longroll.cli._diagnose import run_diagnosis
from longroll.cli._numbers import length_option
from longroll.cli._posttrain import run_posttrain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table
    from torch import Tensor

    from longroll.model import RecurrentLM
    from longroll.reproduce import Checkpoint, Need
    from longroll.results import DiagnosisResult

_SETTINGS = "settings.json"
_REMEMBERED_ROWS = 8  # texts of the remembrance, which reads each of them 16 times


class FamilyName(StrEnum):
    """Which of the official checkpoints."""

    mamba2 = "mamba2"
    mamba = "mamba"
    both = "both"


def reproduce(
    text: Annotated[
        str,
        typer.Option(help="Text to train and to measure on: a folder or file of long documents, a hub id."),
    ],
    models: Annotated[
        str, typer.Option(help="Sizes, with commas: 130m, 370m, 780m, 1.3b, 2.7b.")
    ] = "130m,370m,780m,1.3b,2.7b",
    family: Annotated[FamilyName, typer.Option(help="Mamba-1, Mamba-2 or both.")] = FamilyName.mamba2,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Folder that holds the checkpoints as mamba2-130m and the like. Default: the hub."),
    ] = None,
    interventions: Annotated[
        str, typer.Option(help="Arms, with commas; longroll: the default recipe of posttrain.")
    ] = "none,random,fitted,sp,tbptt,longroll",
    output: Annotated[
        Path,
        typer.Option(help="Folder for the results; the same folder goes on.", callback=o.folder_to_write),
    ] = Path("longroll-reproduce"),
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the memory and time that the run takes, and stop.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Training steps of each arm.", min=1)] = 500,
    batch_size: Annotated[int, typer.Option(help="Rows of T tokens in a step.", min=1)] = 16,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate of AdamW. Default: as in posttrain.")
    ] = None,
    noise_std: Annotated[float, typer.Option(help="Standard deviation of Random Noise.", min=0)] = 0.1,
    length: Annotated[int, length_option(help="Positions to measure, in tokens.", minimum=8192)] = 131_072,
    sequences: Annotated[int, typer.Option(help="Number of texts to measure.", min=4)] = 16,
    concatenate: o.Concatenate = False,
    text_column: o.TextColumn = None,
    tokenizer: o.TokenizerName = None,
    save_steps: Annotated[
        int, typer.Option(help="Steps between two checkpoints to resume an arm from; 0 writes none.", min=0)
    ] = 0,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep the repaired models.")] = False,
    device: o.Device = None,
    dtype: o.Dtype = None,
    seed: o.Seed = 0,
) -> None:
    """Measure the official checkpoints of Mamba, post-train them by every intervention, and measure again."""
    from longroll.cli._console import console, out
    from longroll.data import load_tokenizer
    from longroll.errors import LongrollError
    from longroll.interventions.recipes import DEFAULT
    from longroll.ranks import world_size
    from longroll.reproduce import ARMS, Machine, Work, check_present, find_checkpoints, needs
    from longroll.reproduce.checkpoints import TOKENIZER, TRAIN_LENGTH
    from longroll.results import write_json

    began = time.perf_counter()
    if world_size() > 1:
        raise LongrollError("reproduce runs in one process: start it without a launcher.")
    chosen = find_checkpoints(models.split(","), family.value)
    arms = [arm.strip() for arm in interventions.split(",") if arm.strip()]
    unknown = next((arm for arm in arms if arm not in ARMS), None)
    if unknown is not None:
        raise LongrollError(f"`interventions`: {unknown} is not one of {', '.join(ARMS)}.")
    device = _device(device)
    settings = {
        "text": text, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate,
        "noise_std": noise_std, "length": length, "sequences": sequences, "concatenate": concatenate,
        "text_column": text_column, "tokenizer": tokenizer or TOKENIZER, "dtype": dtype, "seed": seed,
        "checkpoints": None if checkpoints is None else str(checkpoints.resolve()),
    }  # fmt: skip
    _same_settings(output, settings)
    _check_inputs(text, text_column, tokenizer, device, dtype)
    if checkpoints is not None:
        check_present(chosen, checkpoints)
    machine, taken = Machine.of(device), []
    for one in chosen:
        left, measured = _left(output / one.name, arms)
        work = Work(steps, batch_size, length, sequences, len(left), len(left) + (not measured))
        taken += needs([one], work, machine, keep=keep_models, saves=2 * (0 < save_steps < steps))
    out.print(_plan_table(chosen, taken))
    if plan:
        return
    for one, need in zip(chosen, taken, strict=True):
        if not need.fits:
            console.print(f"{one.name} may not fit the memory of {device}.", style="yellow", soft_wrap=True)
    tok = load_tokenizer(tokenizer or TOKENIZER)
    tokens, bytes_per_token = o.read_sequences(
        text, tok, length=length, sequences=sequences, column=text_column, concatenate=concatenate, seed=seed
    )
    corpus = o.read_training_text(
        text, tok, column=text_column, max_tokens=steps * batch_size * TRAIN_LENGTH + 1, seed=seed
    )
    documents = None
    if DEFAULT in arms:
        documents = o.count_documents(text, tok, column=text_column, length=TRAIN_LENGTH, rows=batch_size)
    write_json(output / _SETTINGS, settings)
    for one, need in zip(chosen, taken, strict=True):
        model = _Model(one, checkpoints, output / one.name, tokens, bytes_per_token, device, dtype, seed)
        base = model.measured("base")
        options: dict[str, Any] = {
            "length": TRAIN_LENGTH,
            "steps": steps,
            "seed": seed,
            "save_steps": save_steps or steps,
        }
        options |= {"learning_rate": learning_rate, "bf16": model.autocasts or None}
        options |= model.micro_batch(need, batch_size)
        for arm in arms:
            if not model.done(arm):
                model.repair(arm, corpus, documents, tok, options, noise_std)
                control = model.measured("none") if model.done("none") else None
                model.measured(arm, against=base, control=control)
            if not keep_models:
                shutil.rmtree(model.folder / arm, ignore_errors=True)
            _write_pages(output, settings, device, time.perf_counter() - began)
        model.draw()
        _write_pages(output, settings, device, time.perf_counter() - began)
    for table in _summary_tables(output):
        out.print(table)
    out.print(f"{output / 'index.html'}", soft_wrap=True)


class _Model:
    """One checkpoint and its results, which lie in `folder` and are not made twice."""

    def __init__(
        self, one: Checkpoint, place: Path | None, folder: Path, tokens: Tensor, bytes_per_token: float,
        device: str, dtype: str | None, seed: int,
    ) -> None:  # fmt: skip
        self.one, self.folder, self.tokens = one, folder, tokens
        self.source = one.repository if place is None else str(place / one.name)
        self.bytes_per_token, self.device, self.dtype, self.seed = bytes_per_token, device, dtype, seed
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def autocasts(self) -> bool:
        """Whether matrices are multiplied in bfloat16: on a GPU that has it, unless --dtype names another."""
        import torch

        from longroll.training.weights import has_bf16

        return self.dtype is None and has_bf16(torch.device(self.device))

    def done(self, arm: str) -> bool:
        """Return whether an arm, or the base, was measured."""
        return (self.folder / f"{arm}.json").is_file()

    def micro_batch(self, need: Need, batch_size: int) -> dict[str, Any]:
        """Rows of a micro-batch, as planned when the model was begun: a resumed run must have the same."""
        from longroll.results import read_json, write_json

        path = self.folder / "micro_batch.json"
        if not path.is_file():
            planned = {"batch_size": need.rows, "accumulation": batch_size // need.rows}
            write_json(path, planned | {"gradient_checkpointing": need.checkpointing})
        found: dict[str, Any] = read_json(path)
        return found

    def open(self, arm: str) -> RecurrentLM:
        """Return the checkpoint, or what an arm made of it."""
        source = self.source if arm == "base" else str(self.folder / arm)
        return o.open_model(source, device=self.device, dtype=self.dtype)

    def measured(self, arm: str, **others: DiagnosisResult | None) -> DiagnosisResult:
        """Diagnose the base or an arm, with the effective remembrance to 4 T; read it where it was done."""
        import torch

        from longroll.measure.remembrance import remembrance_map, spread_starts
        from longroll.reproduce import ARMS
        from longroll.reproduce.checkpoints import TRAIN_LENGTH
        from longroll.results import DiagnosisResult, read_results
        from longroll.results.diagnosis import Remembrance

        path = self.folder / f"{arm}.json"
        if path.is_file():
            return read_results(path, DiagnosisResult, otherwise="is no diagnosis: remove it.")[0]
        lm = self.open(arm)
        end = 4 * TRAIN_LENGTH
        texts = self.tokens[:_REMEMBERED_ROWS, :end]
        with torch.autocast(lm.device.type, torch.bfloat16, enabled=self.autocasts):
            found = run_diagnosis(
                lm, self.tokens, label=ARMS.get(arm, arm), train_length=TRAIN_LENGTH, explain=False,
                bytes_per_token=self.bytes_per_token, seed=self.seed, **others,
            )  # fmt: skip
            kept = remembrance_map(lm, texts, spread_starts(end), [TRAIN_LENGTH, 2 * TRAIN_LENGTH, end])
        found = found.changed(remembrance=Remembrance(**kept.to_json()))
        found.write(path)
        return found

    def repair(
        self, arm: str, corpus: Any, documents: Any, tokenizer: Any, options: dict[str, Any], noise_std: float
    ) -> None:
        """Post-train the checkpoint by an arm, unless its folder holds the model already."""
        from longroll.cli._console import console
        from longroll.interventions import RandomNoise
        from longroll.interventions.recipes import DEFAULT
        from longroll.training import PosttrainOptions, by_recipe

        if (self.folder / arm / "config.json").is_file():
            return
        lm = self.open("base")
        chosen: Any = RandomNoise(noise_std, seed=self.seed) if arm == "random" else arm
        asked = PosttrainOptions(**options)
        if arm == DEFAULT:
            prepared = by_recipe(lm, corpus, asked, documents=documents)
            chosen, asked = prepared.intervention, prepared.options
            console.print(prepared.sentence, highlight=False, soft_wrap=True)
        run_posttrain(lm, corpus, chosen, asked, self.folder / arm, tokenizer=tokenizer, resume=True)
        del lm
        gc.collect()  # the trainer's cycles hold weights and moments, and the next model needs their memory

    def draw(self) -> None:
        """Draw the page and the PDFs of what was measured."""
        from longroll.report import write_figures, write_report

        runs = list(_results(self.folder).values())
        write_report(runs, self.folder / "report.html", title=f"{self.one.name} past 2k tokens")
        write_figures(runs, self.folder / "figures")


def _check_inputs(
    text: str, column: str | None, tokenizer: str | None, device: str, dtype: str | None
) -> None:
    """Refuse before the plan what the run would refuse; a tokenizer is opened only if one was named."""
    from longroll.data import load_tokenizer, read_documents
    from longroll.locate import device_of, dtype_of

    device_of(device)
    if dtype is not None:
        dtype_of(dtype)
    if tokenizer is not None:
        load_tokenizer(tokenizer)
    for split in ("train", "validation"):
        next(read_documents(text, split=split, text_column=column))


def _left(folder: Path, arms: list[str]) -> tuple[list[str], bool]:
    """Return the arms of a model that are not measured yet, and whether its base is."""
    return [arm for arm in arms if not (folder / f"{arm}.json").is_file()], (folder / "base.json").is_file()


def _device(device: str | None) -> str:
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _same_settings(output: Path, settings: dict[str, Any]) -> None:
    """Refuse other settings than those that the results of the folder were measured by."""
    from longroll.errors import LongrollError
    from longroll.results import read_json

    path = output / _SETTINGS
    if not path.is_file() or not _all_results(output):
        return
    before = read_json(path)
    for name, value in settings.items():
        if before.get(name) != value:
            raise LongrollError(
                f"`{name}` was {before.get(name)!r} when {output} was begun and is {value!r} now: give "
                "the same, or another --output."
            )


def _results(folder: Path) -> dict[str, DiagnosisResult]:
    """Return the results of a model by arm, the base first."""
    from longroll.reproduce import ARMS
    from longroll.results import DiagnosisResult, read_results

    paths = {arm: folder / f"{arm}.json" for arm in ("base", *ARMS)}
    otherwise = "is no diagnosis: remove it."
    return {
        arm: read_results(path, DiagnosisResult, otherwise=otherwise)[0]
        for arm, path in paths.items()
        if path.is_file()
    }


def _all_results(output: Path) -> dict[str, dict[str, DiagnosisResult]]:
    from longroll.reproduce import CHECKPOINTS

    found = {name: _results(output / name) for name in CHECKPOINTS if (output / name).is_dir()}
    return {name: arms for name, arms in found.items() if arms}


def _write_pages(output: Path, settings: dict[str, Any], device: str, seconds: float) -> None:
    """Write `index.html` and `summary.json` over all models measured so far."""
    from longroll.reproduce import rows_of, write_index
    from longroll.results import provenance, write_json

    results = _all_results(output)
    rows = rows_of(results)
    made = provenance(seed=settings["seed"], seconds=seconds, device=device)
    write_json(
        output / "summary.json",
        {
            "kind": "reproduction",
            "settings": settings,
            "rows": [r.to_json() for r in rows],
            "provenance": made,
        },
    )
    pages = {
        name: [output / name / "report.html", *sorted((output / name / "figures").glob("*.pdf"))]
        for name in results
        if (output / name / "report.html").is_file()
    }
    facts = [
        f"{settings['steps']} steps of {settings['batch_size']} x 2,048 tokens",
        f"text: {settings['text']}",
    ]
    write_index(rows, pages, output, facts=facts)


def _plan_table(chosen: Sequence[Checkpoint], taken: Sequence[Need]) -> Table:
    from rich.table import Table

    from longroll.cli._progress import clock

    table = Table(title="Plan: estimates of what is left to do")
    for head in ("model", "rows at a time", "memory, GiB", "time", "disk, GiB"):
        table.add_column(head, justify="left" if head == "model" else "right")
    for one, need in zip(chosen, taken, strict=True):
        rows = f"{need.rows}{', recomputed' if need.checkpointing else ''}"
        memory = f"{need.memory / 2**30:.0f}{'' if need.fits else ' (does not fit)'}"
        table.add_row(one.name, rows, memory, clock(need.seconds), f"{need.disk / 2**30:.1f}")
    total, most = sum(need.seconds for need in taken), max(need.disk for need in taken)
    table.add_row("all", "", "", clock(total), f"{most / 2**30:.1f} at a time")
    return table


def _summary_tables(output: Path) -> list[Table]:
    """Return a table of each model."""
    from rich.table import Table

    from longroll.reproduce import rows_of
    from longroll.reproduce.summary import cells

    tables: dict[str, Table] = {}
    for row in rows_of(_all_results(output)):
        model, _, *numbers, at_range, at_far = cells(row)
        if model not in tables:
            tables[model] = Table(title=f"{model}: perplexity a token (the paper's: of another text)")
            for head in ("arm", "in range", "32k", "last", "EffRem", "std x", "verdict", "paper"):
                tables[model].add_column(head)
        paper = f"{at_range or '-'}, {at_far or '-'}" if at_range + at_far else ""
        tables[model].add_row(row.arm, *numbers, paper)
    return list(tables.values())
