"""What a reproduction takes: memory, time and disk of every model, before anything is read or trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longroll.measure.roll_out import free_bytes
from longroll.reproduce.checkpoints import TRAIN_LENGTH, Checkpoint
from longroll.sizes import check_tokens
from longroll.training.plan import matrix_rate

_STATIC = 16  # bytes a parameter: float32 weights, gradients and AdamW's two moments
_KEPT = 30  # bytes of activations a token, layer and number of d_model, that backward reads
_RECOMPUTED = 6  # the same under gradient checkpointing, where a layer's are recomputed
_LOGITS = 6  # bytes a token and word, in pieces of at most 2^29 numbers
_ROOM = 0.8  # share of the free memory that is planned with
_SHARE = {"mamba": 0.16, "mamba2": 0.25}
"""Share of a matrix product's speed that training reaches (benchmarks/results/train-*_h100_*.json)."""


@dataclass(frozen=True)
class Work:
    """How much is done with each model."""

    steps: int
    batch_size: int
    """Rows of T tokens a step."""
    length: int
    """Positions measured."""
    sequences: int
    arms: int
    """How often a model is post-trained."""
    readings: int
    """How often a model is measured."""

    def __post_init__(self) -> None:
        trained, read = self.steps * self.batch_size * TRAIN_LENGTH, self.sequences * self.length
        run = f"`steps` {self.steps} x `batch_size` {self.batch_size} x {TRAIN_LENGTH}"
        check_tokens(run, trained, "ask for fewer")
        check_tokens(f"`sequences` {self.sequences} x `length` {self.length}", read, "ask for fewer")


@dataclass(frozen=True)
class Machine:
    """Memory and speed of a device."""

    memory: float
    """Bytes that are free."""
    flops: float
    """Floating-point operations a second of a matrix product."""
    name: str = "cpu"

    @classmethod
    def of(cls, device: str | torch.device) -> Machine:
        """Measure a device by a few matrix products."""
        device = torch.device(device)
        gpu = device.type == "cuda"
        flops = matrix_rate(device, torch.bfloat16 if gpu else torch.float32)
        name = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
        return cls(free_bytes(device), flops, name)


@dataclass(frozen=True)
class Need:
    """What one model takes."""

    rows: int
    """Rows of a micro-batch."""
    checkpointing: bool
    """Whether activations are recomputed."""
    memory: float
    """Bytes while it is trained."""
    seconds: float
    disk: float
    """Bytes of its files, the download among them."""
    fits: bool


def fit(checkpoint: Checkpoint, batch_size: int, memory: float) -> tuple[int, bool, float]:
    """Return rows of a micro-batch, whether to recompute activations, and the bytes that training takes then.

    The rows divide `batch_size`. Where nothing fits `memory`, one row with recomputed activations is planned.
    """
    for checkpointing in (False, True):
        for rows in _divisors(batch_size):
            taken = training_bytes(checkpoint, rows, checkpointing=checkpointing)
            if taken <= _ROOM * memory:
                return rows, checkpointing, taken
    return 1, True, training_bytes(checkpoint, 1, checkpointing=True)


def _divisors(number: int) -> list[int]:
    """Return the divisors of a number, the largest first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)}, reverse=True)


def training_bytes(checkpoint: Checkpoint, rows: int, *, checkpointing: bool) -> float:
    """Bytes that a step of `rows` x T tokens takes."""
    tokens = rows * TRAIN_LENGTH
    kept = _RECOMPUTED * checkpoint.layers + _KEPT if checkpointing else _KEPT * checkpoint.layers
    logits = _LOGITS * min(tokens * checkpoint.vocabulary, 2**29)
    return _STATIC * checkpoint.parameters + tokens * checkpoint.width * kept + logits


def needs(
    checkpoints: Sequence[Checkpoint], work: Work, machine: Machine, *, keep: bool, saves: int = 0
) -> list[Need]:
    """Return what each model takes.

    Args:
        checkpoints: the models.
        work: what is done with each.
        machine: the device.
        keep: whether the repaired models stay on the disk.
        saves: checkpoints of a run that lie on the disk at a time.
    """
    found = []
    for one in checkpoints:
        rows, checkpointing, memory = fit(one, work.batch_size, machine.memory)
        speed = machine.flops * _SHARE[one.family]
        trained = work.steps * work.batch_size * TRAIN_LENGTH
        read = work.sequences * work.length + 8 * 16 * 2 * TRAIN_LENGTH  # remembrance to 4 T, 16 starts
        a_step, a_read = (8 if checkpointing else 6) * one.parameters, 2 * one.parameters
        seconds = work.arms * trained * a_step / speed + work.readings * read * a_read / speed
        copies = (work.arms if keep else 1) + 1  # of 32 bits, the download one of them
        disk = 4 * one.parameters * copies + 12 * one.parameters * saves
        found.append(Need(rows, checkpointing, memory, seconds, disk, memory <= _ROOM * machine.memory))
    return found
