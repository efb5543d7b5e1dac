"""Processes that work as one (torchrun, accelerate launch): which this is, and what they tell each other."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from longroll.errors import LongrollError
from longroll.launcher import end_with_launcher, place
from longroll.meeting import attempt_of, meet

T = TypeVar("T")

_PATIENCE = timedelta(days=30)  # a rank waits for the slowest one; a dead one closes its connections
_DIED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")
_TRAINING = timedelta(seconds=1800)  # `ddp_timeout` of Trainer
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""Backend of a device in training, as accelerate chooses it."""
_apart = False  # whether this process works by itself, whatever others there are
_store: dist.Store | None = None  # of the processes that met by `join`


class Share(NamedTuple):
    """The work of one rank: some rows, and one of several parts of the work on them."""

    rows: slice
    part: int
    parts: int


def rank() -> int:
    """Return the number of this process among all, from 0."""
    if _apart:
        return 0
    return dist.get_rank() if _together() else place()[0]


def world_size() -> int:
    """Return how many processes there are."""
    if _apart:
        return 1
    return dist.get_world_size() if _together() else place()[1]


def join() -> None:
    """Let the processes that a launcher started meet, to measure together: over gloo, on any device.

    Raises:
        LongrollError: where they cannot meet.
    """
    global _store
    end_with_launcher()
    number, count = place()
    if not _together() and count > 1:
        store = meet()
        store.set_timeout(_PATIENCE)
        _store = dist.PrefixStore("longroll", store)
        dist.init_process_group("gloo", store=store, rank=number, world_size=count, timeout=_PATIENCE)


def join_training(device: torch.device) -> None:
    """Let the processes that a launcher started meet, to train together by `transformers.Trainer`.

    accelerate opens the group itself, but after a restart by torchrun, where it would meet the addresses of
    the processes before.

    Args:
        device: where this process trains.

    Raises:
        LongrollError: where they cannot meet.
    """
    number, count = place()
    if _together() or count == 1 or device.type not in _BACKENDS:
        return
    store = meet()
    if attempt_of():
        backend = _BACKENDS[device.type]
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_TRAINING)


@contextmanager
def together(dealt: bool) -> Iterator[None]:
    """Within it, the functions here speak to the other ranks only if `dealt`.

    Work that is not dealt may be done on one rank alone, where waiting for the others would never end.
    """
    global _apart
    before = _apart
    _apart = before or not dealt
    try:
        yield
    finally:
        _apart = before


def share(count: int) -> slice:
    """Return which of `count` rows are dealt to this rank: neighbours; none where there are fewer rows."""
    return _slice(count, rank(), world_size())


def deal(count: int) -> Share:
    """Return which of `count` rows are dealt to this rank, and which part of the work on these.

    Where there are more ranks than rows, several ranks have the same rows.
    """
    size = world_size()
    groups = max(n for n in range(1, min(count, size) + 1) if size % n == 0)
    group, part = divmod(rank(), size // groups)
    return Share(_slice(count, group, groups), part, size // groups)


def _slice(count: int, index: int, of: int) -> slice:
    least, more = divmod(count, of)
    start = index * least + min(index, more)
    return slice(start, start + least + (index < more))


def local_device(device: str | None) -> str | None:
    """Return the device of this process where no device, or the GPU, is asked for: one GPU a process."""
    if place()[1] == 1 or device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def alone() -> bool:
    """Return whether this process works alone."""
    return _apart or not _together() or dist.get_world_size() == 1


def on_first(function: Callable[[], T]) -> T:
    """Run `function` on rank 0, where it speaks to no other rank, and return its result on every rank.

    Raises:
        LongrollError: on every rank, where `function` raised one on rank 0; `told` marks these copies.
    """
    if alone():
        return function()
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            with together(False):
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
    """Return the items of all ranks, in their order, on every rank; tensors in them come on the CPU."""
    if alone():
        return [item]
    packed = io.BytesIO()
    torch.save(item, packed)  # unlike pickle, it can bring another rank's GPU tensors here
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, packed.getvalue())
    return [torch.load(io.BytesIO(one), map_location="cpu", weights_only=False) for one in items]


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows (B, ...) of all ranks one after another, on the CPU of every rank."""
    return rows.cpu() if alone() else torch.cat(gather(rows.cpu()))


def wait() -> None:
    """Wait until every rank is here."""
    if not alone():
        dist.barrier()


def tell(message: str) -> None:
    """Leave word of the error that ends this process, for those that lose it."""
    if _store is not None:
        with suppress(RuntimeError):
            _store.compare_set("error", "", f"rank {rank()}: {message}")


def loss_of_another(error: BaseException) -> str | None:
    """Say in one line that another process died, if that is what `error` is about."""
    if world_size() == 1 or not any(sign in str(error) for sign in _DIED):
        return None
    with suppress(RuntimeError):
        if _store is not None and _store.check(["error"]):
            return f"Rank {rank()} ends because of {_store.get('error').decode()}"
    return f"Rank {rank()} lost another process of the run, which the launcher names."


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
