"""How much of a GPU's memory a forward may fill to make its backward faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from longroll.sizes import ROOM

_assumed: ContextVar[float | None] = ContextVar("longroll_free_bytes", default=None)
_elsewhere: dict[int, tuple[int, int]] = {}  # GPU -> bytes reserved here when last looked, bytes of the rest


def free_bytes(device: torch.device) -> float:
    """Return the bytes that this process can still fill on a GPU; within `assume_free`, what it says.

    What other processes hold is asked for again when the memory that PyTorch reserves has changed, and not
    while a CUDA graph is captured.
    """
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    index = torch.cuda.current_device() if device.index is None else device.index
    counts = torch.cuda.memory_stats_as_nested_dict(index)
    allocated, reserved = (counts[name]["all"]["current"] for name in ("allocated_bytes", "reserved_bytes"))
    before, held = _elsewhere.get(index, (-1, 0))
    if before != reserved and not torch.cuda.is_current_stream_capturing():
        free, total = torch.cuda.mem_get_info(index)
        _elsewhere[index] = reserved, held = reserved, total - free - reserved
    total = torch.cuda.get_device_properties(index).total_memory
    return ROOM * total - max(0, held) - allocated


@contextmanager
def assume_free(size: float) -> Iterator[None]:
    """Let `free_bytes` return `size` on every device, as a dry run does."""
    token = _assumed.set(size)
    try:
        yield
    finally:
        _assumed.reset(token)
