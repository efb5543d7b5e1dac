"""Processes that work as one (torchrun, accelerate launch): which this is, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from longroll.errors import LongrollError

T = TypeVar("T")


def rank() -> int:
    """Return the number of this process among all, from 0."""
    return dist.get_rank() if _together() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if _together() else int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Let the processes that a launcher started meet, to measure together: over gloo, on any device."""
    if not _together() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")


def local_device(device: str | None) -> str | None:
    """Return the device of this process where no device, or the GPU, is asked for: one GPU a process."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone or device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def alone() -> bool:
    """Return whether no other process can be spoken to."""
    return not _together() or dist.get_world_size() == 1


def on_first(function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and return its result on every rank.

    Raises:
        LongrollError: on every rank, where `function` raised one on rank 0; `told` marks the copies.
    """
    if alone():
        return function()
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = function()
        except LongrollError as error:
            found[1] = str(error)
            dist.broadcast_object_list(found)
            raise
    dist.broadcast_object_list(found)
    if found[1] is not None:
        copy = LongrollError(found[1])
        copy.told = True
        raise copy
    answer: T = found[0]
    return answer


def gather(item: T) -> list[T]:
    """Return the items of all ranks, in their order, on every rank."""
    if alone():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def wait() -> None:
    """Wait until every rank is here."""
    if _together():
        dist.barrier()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
