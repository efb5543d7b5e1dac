"""`longroll calibrate`: scale the decays of a model by a few readings of long texts."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from longroll.cli import _options as o


class What(StrEnum):
    """Parameters that are scaled."""

    A = "A"
    dt = "dt"


LEFT = "It holds: there is nothing to calibrate. Nothing is scaled or written without `force`."
RECORDED = ("what", "unit", "scales", "gain", "train_length")
"""Entries of a calibration in the config of the model."""


class Unit(StrEnum):
    """Units that share one scale."""

    layer = "layer"
    head = "head"


def calibrate(
    model: o.Model,
    output: Annotated[
        Path, typer.Option(help="Folder for the calibrated model.", callback=o.folder_to_write)
    ],
    what: Annotated[What, typer.Option(help="Scale the decay rates A, or the steps dt.")] = What.A,
    unit: Annotated[Unit, typer.Option(help="One scale for each layer, or one for each head.")] = Unit.layer,
    sweeps: Annotated[int, typer.Option(help="Number of sweeps over the scales after the first.", min=0)] = 1,
    text: o.Text = "stdlib",
    text_column: o.TextColumn = None,
    tokenizer: o.TokenizerName = None,
    bos: o.Bos = None,
    train_length: o.TrainLength = None,
    length: o.Length = 16_384,
    sequences: o.Sequences = 8,
    concatenate: o.Concatenate = False,
    chunk_size: o.ChunkSize = None,
    force: Annotated[
        bool, typer.Option("--force", help="Calibrate a model even if it holds past its training length.")
    ] = False,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
    plugin: o.PluginName = None,
    seed: o.Seed = 0,
    json: o.Json = None,
) -> None:
    """Find scales of a model's decays on long training texts, without training, and save the model.

    A model that reads held-out text far out no worse than from a fresh start is declined. Scales that gain
    nothing beyond the interval of held-out texts are not saved: status 3.
    """
    import time
    from typing import Any

    from longroll.checkpoint import Checkpoint
    from longroll.cli._console import console, out
    from longroll.cli._flags import in_flags, running
    from longroll.cli._posttrain import NO_GAIN
    from longroll.cli._progress import progress
    from longroll.history import record
    from longroll.measure.calibration import calibrate, readings_of
    from longroll.ranks import rank, together
    from longroll.results import CalibrationResult, provenance
    from longroll.training import Declined
    from longroll.training.card import calibration_card
    from longroll.training.checkpoints import aside
    from longroll.training.faults import full_disk_is_said
    from longroll.training.output import refuse_model
    from longroll.training.saving import save_checkpoint
    from longroll.training.until_healthy import look

    if rank() > 0:
        return  # not dealt: rank 0 reads
    refuse_model(output)
    lm = o.open_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, plugin=plugin)
    train_length = o.find_train_length(lm, train_length)
    most = readings_of(lm, what.value, unit.value, sweeps)
    tok = o.open_tokenizer(lm, model, tokenizer, bos=bos, trust_remote_code=trust_remote_code)
    tokens, _ = o.read_sequences(
        text, tok, length=length, sequences=sequences, column=text_column, concatenate=concatenate, seed=seed,
        split="train",
    )  # fmt: skip
    began = time.perf_counter()
    told: dict[str, Any] = {"model": lm.name, "train_length": train_length} | {
        "what": what.value,
        "unit": unit.value,
    }

    def write(**more: Any) -> None:
        if json:
            made = provenance(lm, seed=seed, seconds=time.perf_counter() - began)
            CalibrationResult.from_json(told | {"provenance": made, **more}).write(json)

    def say(sentence: str) -> None:
        console.print(in_flags(sentence, running), markup=False, highlight=False, soft_wrap=True)

    held_out, missing = o.read_held_out(text, tok, column=text_column, length=train_length, seed=seed)
    if held_out is None:
        say(f"Not looked whether the model breaks, nor measured on held-out text: {missing}.")
    elif not force:
        try:
            with together(False):
                told["look"] = look(lm, held_out, say, left=LEFT).to_json()
        except Declined as declined:
            said = in_flags(str(declined), running)
            out.print(said, markup=False, highlight=False, soft_wrap=True)
            told["look"] = declined.reading and declined.reading.to_json()
            write(output=None, scales={}, octaves=[], before=None, after=None, passes=0, tokens=0,
                  scaled=False, declined=said, sentence=said)  # fmt: skip
            return
    other = None if held_out is None else held_out.texts
    with progress("calibrating", total=most) as advance:
        found = calibrate(
            lm, tokens, train_length=train_length, what=what.value, unit=unit.value, sweeps=sweeps,
            chunk_size=chunk_size, progress=advance, held_out=other, seed=seed,
        )  # fmt: skip
    out.print(found.sentence, markup=False, highlight=False, soft_wrap=True)
    if not found.scaled:
        write(output=None, declined=found.sentence, **found.to_json())
        raise typer.Exit(NO_GAIN)
    lm.model.config.train_length = train_length
    told |= found.to_json()
    record(lm.model.config, {name: told[name] for name in RECORDED}, "calibrate")
    with full_disk_is_said(output), aside(output) as partial:
        save_checkpoint(lm.model, partial, lm.checkpoint or Checkpoint(Path(), lm.model.dtype))
        (partial / "README.md").write_text(calibration_card(lm, found, text=text), encoding="utf-8")
        tok.save(partial)
    write(output=str(output))
    task = "Test it by `longroll evaluate`: scales that lower the far loss can lose what a task asks for."
    out.print(task, soft_wrap=True)
    out.print(str(output))
