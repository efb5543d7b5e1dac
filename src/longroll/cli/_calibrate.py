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
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
    plugin: o.PluginName = None,
    seed: o.Seed = 0,
    json: o.Json = None,
) -> None:
    """Find scales of a model's decays on long training texts, without training, and save the model."""
    import time

    from longroll.checkpoint import Checkpoint
    from longroll.cli._console import out
    from longroll.cli._progress import progress
    from longroll.measure.calibration import calibrate, readings_of
    from longroll.ranks import rank
    from longroll.results import CalibrationResult, provenance
    from longroll.training.checkpoints import aside
    from longroll.training.faults import full_disk_is_said
    from longroll.training.output import refuse_model
    from longroll.training.saving import save_checkpoint

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
    with progress("calibrating", total=most) as advance:
        found = calibrate(
            lm, tokens, train_length=train_length, what=what.value, unit=unit.value, sweeps=sweeps,
            chunk_size=chunk_size, progress=advance,
        )  # fmt: skip
    lm.model.config.train_length = train_length
    with full_disk_is_said(output), aside(output) as partial:
        save_checkpoint(lm.model, partial, lm.checkpoint or Checkpoint(Path(), lm.model.dtype))
        tok.save(partial)
    if json:
        CalibrationResult.from_json(
            found.to_json()
            | {
                "model": lm.name,
                "output": str(output),
                "train_length": train_length,
                "provenance": provenance(lm, seed=seed, seconds=time.perf_counter() - began),
            }
        ).write(json)
    out.print(found.sentence, soft_wrap=True)
    if found.scaled:
        out.print(
            "Test it by `longroll evaluate`: scales that lower the far loss can lose what a task asks for."
        )
    out.print(str(output))
