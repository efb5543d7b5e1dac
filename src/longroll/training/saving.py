"""What a run leaves: a whole Hugging Face checkpoint, in the precision of the one it came from."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from longroll.checkpoint import Checkpoint
from longroll.model import RecurrentLM, read
from longroll.training.loss import hidden_loss
from longroll.training.weights import precision


def save_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    *,
    source: Checkpoint | None = None,
    tokenizer: Any = None,
    card: str | None = None,
) -> None:
    """Write `model` to `folder` as a checkpoint that transformers (or fla) opens by itself.

    Args:
        model: without adapters.
        folder: exists, and is not read by others before the end.
        source: the checkpoint that `model` was read from. Matrices are saved in its dtype; parameters that
            scale, shift or decay stay in float32, in which 16 bits would round their training away.
            Tensors of its files that the class of `model` does not hold are copied.
        tokenizer: anything with `save_pretrained`.
        card: the text of README.md.
    """
    dtype = source.dtype if source is not None else None
    kept = source.unused_tensors() if source is not None else {}
    with precision(model, dtype) if dtype is not None else contextlib.nullcontext():
        model.save_pretrained(folder, state_dict={**model.state_dict(), **kept} if kept else None)
    if dtype is not None:  # transformers takes that of the first parameter, which may be a scale
        before, model.config.dtype = model.config.dtype, dtype
        model.config.save_pretrained(folder)
        model.config.dtype = before
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card)


@torch.no_grad()
def batch_loss(lm: RecurrentLM, batch: dict[str, torch.Tensor]) -> float:
    """Loss of `input_ids` and `shift_labels` (B, T) from the zero state, without autocast."""
    ids, targets = (batch[name].to(lm.device) for name in ("input_ids", "shift_labels"))
    was_training = lm.training
    lm.eval()
    hidden, _ = lm(ids, logits=False)
    loss = hidden_loss(lm, hidden, targets).item()
    lm.train(was_training)
    return loss


def reread(
    folder: Path, lm: RecurrentLM, source: Checkpoint, batch: dict[str, torch.Tensor], trained: float
) -> dict[str, Any]:
    """Loss of the saved files, opened in their own precision, beside that of the weights in memory.

    Returns:
        `loss_trained` (`trained`) and `loss_saved`, nats, of the first batch, and `saved_dtype`.
    """
    dtype = source.dtype or lm.model.dtype
    saved = batch_loss(read(folder, device=lm.device, dtype=dtype), batch)
    return {
        "loss_trained": trained,
        "loss_saved": saved,
        "saved_dtype": str(dtype).removeprefix("torch."),
    }
