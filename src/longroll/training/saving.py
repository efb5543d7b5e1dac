"""What a run leaves: a whole Hugging Face checkpoint, in the precision of the one it came from."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from longroll.checkpoint import Checkpoint
from longroll.errors import LongrollError
from longroll.families import to_rwkv, to_state_spaces
from longroll.history import save_beside
from longroll.memory import memory_of
from longroll.model import RecurrentLM, read
from longroll.training.loss import hidden_loss
from longroll.training.weights import precision

_HELD = 0.75
"""Share of a device's memory that weights may take beside the activations of a batch."""

FORMATS = ("transformers", "original")
"""Whose names and files a run writes: transformers', or those of the checkpoint that it began from."""


def check_original(source: Checkpoint) -> None:
    """Refuse to write a checkpoint of transformers in another layout."""
    if source.layout == "transformers":
        raise LongrollError(
            "`format` original: the model came in the layout of transformers, not in that of state-spaces or "
            "BlinkDL: leave it out."
        )


def opened_as(output: Path, source: Checkpoint, format: str) -> Path:
    """Return what opens the model that a run wrote to `output`: the folder, or BlinkDL's file in it."""
    return output / source.folder.name if format == "original" and source.layout == "rwkv" else output


def save_original(model: PreTrainedModel, folder: Path, source: Checkpoint) -> None:
    """Write `model` to `folder` in the layout of `source`: its names, shapes and dtypes.

    A file beside it keeps what the layout has no place for: the training length, and what longroll did.

    Args:
        model: what was read from `source`, trained since.
        folder: exists, and is not read by others before the end.
        source: a checkpoint of state-spaces or BlinkDL.
    """
    place = opened_as(folder, source, "original")
    if source.layout == "rwkv":
        torch.save(to_rwkv(model, source.folder), place)
    else:
        torch.save(to_state_spaces(model, source.folder), place / "pytorch_model.bin")
        shutil.copyfile(source.folder / "config.json", place / "config.json")
    save_beside(model.config, place)


def save_checkpoint(model: PreTrainedModel, folder: Path, source: Checkpoint | None = None) -> None:
    """Write `model` to `folder` as a checkpoint that transformers (or fla) opens by itself.

    Args:
        model: without adapters.
        folder: exists, and is not read by others before the end.
        source: the checkpoint that `model` was read from. Matrices are saved in its dtype; parameters that
            scale, shift or decay stay in float32, in which 16 bits would round their training away.
            Tensors of its files that the class of `model` does not hold are copied.
    """
    dtype = source.dtype if source is not None else None
    kept = source.unused_tensors() if source is not None else {}
    with precision(model, dtype) if dtype is not None else contextlib.nullcontext():
        model.save_pretrained(folder, state_dict={**model.state_dict(), **kept} if kept else None)
    if dtype is not None:  # transformers takes that of the first parameter, which may be a scale
        before, model.config.dtype = model.config.dtype, dtype
        model.config.save_pretrained(folder)
        model.config.dtype = before


@torch.no_grad()
def batch_loss(lm: RecurrentLM, batch: dict[str, torch.Tensor]) -> float:
    """Return loss of `input_ids` and `shift_labels` (B, T) from the zero state, without autocast."""
    ids, targets = (batch[name].to(lm.device) for name in ("input_ids", "shift_labels"))
    was_training = lm.training
    lm.eval()
    hidden, _ = lm(ids, logits=False)
    loss = hidden_loss(lm, hidden, targets).item()
    lm.train(was_training)
    return loss


def reread(
    place: Path,
    device: torch.device,
    dtype: torch.dtype,
    batch: dict[str, torch.Tensor],
    trained: float,
    *,
    in_int8: bool = False,
) -> dict[str, Any]:
    """Return loss of the saved files, opened in `dtype`, beside that of the weights in memory.

    Args:
        place: the files.
        device: where they are read.
        dtype: the dtype of the weights.
        batch: `input_ids` and `shift_labels` (B, T).
        trained: loss of the weights in memory.
        in_int8: whether they were in 8 bits: files that the device does not hold in `dtype` are read so too.

    Returns:
        `loss_trained` (`trained`) and `loss_saved`, nats, of the first batch, and `saved_dtype`.
    """
    name = str(dtype).removeprefix("torch.")
    if in_int8 and sum(f.stat().st_size for f in place.rglob("*.safetensors")) > _HELD * memory_of(device):
        name = "int8"
    saved = batch_loss(read(place, device=device, dtype=name), batch)
    return {"loss_trained": trained, "loss_saved": saved, "saved_dtype": name}
