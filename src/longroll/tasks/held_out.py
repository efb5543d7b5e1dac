"""Samples of a task that training does not read: what answers cost in range and far past it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from longroll import ranks
from longroll.measure import position_loss
from longroll.measure.held_out import BEGINNINGS, Reading
from longroll.measure.judge import TOLERANCE
from longroll.model import RecurrentLM
from longroll.results import fingerprint_of_arrays
from longroll.tasks._task import EVALUATION, Task, random_of
from longroll.tasks.training import row_of

FAR, FAR_SAMPLES = 16, 16
"""Training lengths of a far sample, and how many are read."""


@dataclass(frozen=True)
class HeldOutSamples:
    """Samples of T tokens and of 16 T tokens; the loss is that of their answers."""

    near: tuple[Tensor, Tensor]
    """Ids (N, T + 1), and which of the targets (N, T) are answers."""
    far: tuple[Tensor, Tensor]
    """The same of far samples."""
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        found = fingerprint_of_arrays(t.numpy() for t in (*self.near, *self.far))
        object.__setattr__(self, "fingerprint", found)

    @classmethod
    def of_tasks(cls, tasks: Sequence[Task], train_length: int, *, seed: int = 0) -> HeldOutSamples:
        """Draw samples from the tasks in turn, from streams of random numbers that training never draws from.

        Args:
            tasks: whose text training does not read.
            train_length: T.
            seed: random seed of the samples.

        Raises:
            LongrollError: for a task that cannot be made as long.
        """

        def draw(length: int, count: int) -> tuple[Tensor, Tensor]:
            rows = []
            for number in range(count):
                rng = random_of(EVALUATION, seed, length, number)
                rows.append(row_of(tasks[number % len(tasks)].sample(length + 1, rng=rng), length + 1))
            ids, answers = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
            return ids, answers

        return cls(draw(train_length, BEGINNINGS), draw(FAR * train_length, FAR_SAMPLES))

    @torch.no_grad()
    def read(self, lm: RecurrentLM) -> Reading:
        """Measure a model in evaluation mode; samples are dealt to the ranks, each of which must call this.

        Args:
            lm: the model.
        """
        began = time.perf_counter()
        in_range, far = (
            position_loss(lm, ids, dealt=True).losses[answers].double().mean().item()
            for ids, answers in (self.near, self.far)
        )
        short, long = (ids.shape[1] - 1 for ids, _ in (self.near, self.far))
        return ranks.on_first(
            lambda: Reading(
                in_range,
                far,
                far - in_range <= TOLERANCE,
                f"Answers cost {far:.3f} nats a token at {long:,} tokens and {in_range:.3f} at {short:,}.",
                f"{len(self.far[0])} held-out samples of {long:,} tokens",
                time.perf_counter() - began,
            )
        )
