"""`longroll quickstart`: break a model, repair it, prove the repair; minutes on a CPU, no network."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longroll.cli import _options as o
from longroll.cli._diagnose import documents_to_train_on, findings, run_diagnosis
from longroll.cli._numbers import length_option
from longroll.cli._posttrain import run_posttrain

if TYPE_CHECKING:
    from longroll.results import DiagnosisResult, QuickstartResult

STEPS = 200
"""Fewer than `longroll posttrain` takes, so that all is done in 2 minutes on two cores."""


def quickstart(
    output: Annotated[
        Path, typer.Option(help="Folder for the report and the model.", callback=o.folder_to_write)
    ] = Path("longroll-out"),
    length: Annotated[int, length_option(help="Positions to measure, in bytes.", minimum=1024)] = 16_384,
    sequences: Annotated[int, typer.Option(help="Number of texts to measure.", min=4)] = 16,
    steps: Annotated[int, typer.Option(help="Training steps of the repair.", min=1)] = STEPS,
    device: o.Device = None,
    seed: o.Seed = 0,
    json: o.Json = None,
) -> None:
    """Diagnose the specimen, repair it by the default recipe, diagnose again, and write a report."""
    from longroll.cli._console import console, levels_table, out
    from longroll.interventions.recipes import NAMES
    from longroll.report import write_report
    from longroll.training import PosttrainOptions, by_recipe

    began = time.perf_counter()
    lm = o.open_model("specimen", device=device, dtype=None)
    tok = o.open_tokenizer(lm, "specimen", None)
    assert lm.train_length is not None
    options = PosttrainOptions(length=lm.train_length, steps=steps, seed=seed)
    tokens, bytes_per_token = o.read_sequences("stdlib", tok, length=length, sequences=sequences, seed=seed)
    documents = documents_to_train_on("stdlib", tok, None, lm.train_length)
    measured = {"bytes_per_token": bytes_per_token, "seed": seed, "documents": documents}
    before = run_diagnosis(lm, tokens, label="base", **measured)
    before.write(output / "base.json")

    corpus = o.read_corpus(
        "stdlib", tok, split="train", column=None, max_tokens=options.tokens + 1, seed=seed
    )
    prepared = by_recipe(lm, corpus, options, documents=documents)
    console.print(prepared.sentence, highlight=False, soft_wrap=True)
    repaired = _free(output / "repaired")
    run_posttrain(lm, corpus, prepared.intervention, prepared.options, repaired)

    again = o.open_model(str(repaired), device=device, dtype=None)
    after = run_diagnosis(again, tokens, label=NAMES[prepared.name], **measured)
    after.write(output / "repaired.json")
    report = write_report([before, after], output / "report.html")
    seconds = time.perf_counter() - began
    out.print(levels_table([before, after]))
    out.print(f"Before: {' '.join(findings(before)[:2])}")
    out.print(f"After:  {after.sentence}")
    out.print(f"{seconds:.0f} s. Report: {report}   Repaired model: {repaired}")
    if json:
        _summary(before, after, seconds, report, repaired).write(json)


def _free(folder: Path) -> Path:
    """Return `folder`, or with a number behind if an earlier run's model is there: nothing is overwritten."""
    names = (folder.with_name(f"{folder.name}{'' if i == 1 else f'-{i}'}") for i in range(1, 10_000))
    return next(name for name in names if not os.path.lexists(name))


def _summary(
    before: DiagnosisResult, after: DiagnosisResult, seconds: float, report: Path, repaired: Path
) -> QuickstartResult:
    from longroll.results import QuickstartResult

    return QuickstartResult.from_json(
        {
            "verdict_before": before.verdict,
            "verdict_after": after.verdict,
            "sentence_before": before.sentence,
            "sentence_after": after.sentence,
            "train_length": before.train_length,
            "edge_before": before.edge,
            "loss_in_range_before": before.level("in_range"),
            "loss_in_range_after": after.level("in_range"),
            "loss_far_before": before.level("far"),
            "loss_far_after": after.level("far"),
            "max_position": before.max_position,
            "seconds": seconds,
            "report": str(report),
            "model": str(repaired),
            "provenance": after.provenance,
        }
    )
