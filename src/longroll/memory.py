"""Bytes of weights and states, and of the device that is to hold them."""

from __future__ import annotations

import torch
from torch import nn

from longroll.model import RecurrentLM
from longroll.sizes import GIB as GIB
from longroll.sizes import check_bytes, machine_bytes

MOMENTS = 2
"""Numbers that AdamW keeps for each trained one, in the precision in which it is held."""


def gathered_bytes(model: nn.Module) -> int:
    """Return the bytes of whole layers that exist at a time under FSDP2: two, the embedding and the head."""
    return 2 * max(layer_bytes(model), default=0) + sum(map(parameter_bytes, ends_of(model)))


def parameter_bytes(model: nn.Module, *, trained: bool = False) -> int:
    """Return the bytes of all parameters, or of those that are trained; tied ones count once."""
    found = (p for p in model.parameters() if p.requires_grad or not trained)
    return sum(p.numel() * p.element_size() for p in found)


def memory_of(device: torch.device) -> int:
    """Return the bytes of a GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine_bytes()


def check_micro_batch(lm: RecurrentLM, rows: int, length: int, device: torch.device | None = None) -> None:
    """Refuse a micro-batch whose tokens, hidden states and states alone exceed the memory of the device.

    Raises:
        LongrollError: with the bytes of both.
    """
    least = rows * (length * (8 + lm.width * 2) + sum(t.nbytes for t in lm.zero_state(1).values()))
    mend = "take fewer rows (`batch_size`), and more `accumulation`"
    check_bytes(f"`batch_size` {rows} x `length` {length}", least, mend, held=memory_of(device or lm.device))


def layer_bytes(model: nn.Module) -> list[int]:
    """Return the bytes of each module that FSDP2 shards by itself: the layers, by transformers' names of
    them.
    """
    names = getattr(model, "_no_split_modules", None) or ()
    return [parameter_bytes(m) for m in model.modules() if type(m).__name__ in names]


def ends_of(model: nn.Module) -> list[nn.Module]:
    """Return the embedding and the head; one where they are tied."""
    found = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    if found[0] is not None and found[1] is not None and found[0].weight is found[1].weight:
        return found[:1]
    return [module for module in found if module is not None]
