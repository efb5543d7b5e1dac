"""Base class of the interventions: zero probability, the parts of the state that are set, the seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longroll import ranks
from longroll.errors import LongrollError
from longroll.state import RecurrentState

Batch = Mapping[str, Any] | Tensor
"""`input_ids` (B, T) and, for document-contiguous data, `starts` (B,): rows that begin a document."""


class Intervention:
    """Chooses the state that each row of a training batch starts from.

    A subclass says how in `_choose`; the training loop asks `initial_state` before each (micro-)batch and
    hands the final state to `observe` after it. Draws are keyed by the seed, the number of the batch and the
    number of the row among the rows of all ranks, so that N ranks draw what one process with all rows draws.

    Args:
        zero_probability: probability that a row starts from the zero state, 0 to 1.
        conv: act on the conv part of the state too; otherwise the conv part starts from zero. KV is never
            set.
        seed: random seed of the draws, 0 or above.

    Raises:
        LongrollError: for a probability outside [0, 1] and a negative seed.
    """

    name = "intervention"

    def __init__(self, *, zero_probability: float = 0.0, conv: bool = True, seed: int = 0) -> None:
        if not 0 <= zero_probability <= 1:
            raise LongrollError(f"`zero_probability` {zero_probability} is not a probability: 0 to 1.")
        if seed < 0:
            raise LongrollError(f"`seed` {seed} must be 0 or above.")
        self.zero_probability = zero_probability
        self.conv = conv
        self.seed = seed
        self._batches = 0  # that started from a state so far
        self._drawn = 0  # chances so far, those of all ranks
        self._stream: torch.Generator | None = None  # of the chances, where `_drawn` of them were drawn
        self._set: Tensor | None = None  # rows of this batch that did not start from zero by chance

    def initial_state(self, batch: Batch) -> RecurrentState | None:
        """Return the state the rows of `batch` start from; None is the zero state (before anything was
        observed).
        """
        rows = len(batch if isinstance(batch, Tensor) else batch["input_ids"])
        state = self._choose(batch, rows)
        if state is None:
            return None
        if self.zero_probability > 0:
            self._set = self._chances(rows) >= self.zero_probability
            state = state.where(self._set)
        self._batches += 1
        return state

    def observe(self, final_state: RecurrentState) -> None:
        """Take note of the final state of a batch; it is detached here."""
        self._learn(final_state.part("recurrent", *(("conv",) if self.conv else ())).detach())

    def forget(self, skipped: Tensor, unknown: Tensor) -> Tensor:
        """Forget states that are not finite after a step; a step that was skipped leaves nothing behind.

        Both arguments and the result stay on their device, so that nothing waits for a GPU.

        Args:
            skipped: (), whether the step was not finite on some rank.
            unknown: (), whether no state of this rank shows what is at fault: forget all.

        Returns:
            How many rows have lost their state, ().
        """
        return torch.zeros((), device=skipped.device)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs: tensors only, so that it loads with `weights_only`."""
        return {"memory": self._memory(), "seed": self.seed, "batches": self._batches, "drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._recall(state["memory"])
        self.seed, self._batches, self._drawn = state["seed"], state["batches"], state["drawn"]
        self._stream = None

    def load_ranks(self, states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> None:
        """Go on from the `state_dict` of every rank of a run as one rank of another number of ranks."""
        memory = self._deal([state["memory"] for state in states], rank, world_size)
        self.load_state_dict({**states[0], "memory": memory})

    def _choose(self, batch: Batch, rows: int) -> RecurrentState | None:
        """Return the state for `rows` rows."""
        raise LongrollError(f"{type(self).__name__} must say how it chooses a state.")

    def _learn(self, final_state: RecurrentState) -> None:
        """Note what `_choose` needs."""

    def _memory(self) -> dict[str, Any]:
        return {}

    def _recall(self, memory: Mapping[str, Any]) -> None:
        pass

    def _deal(self, memories: list[Mapping[str, Any]], rank: int, world_size: int) -> Mapping[str, Any]:
        """Return the memory of a rank, from those of the ranks before: equal for all ranks unless a subclass
        says how.
        """
        return memories[0]

    def _chances(self, rows: int) -> Tensor:
        """Return a number in [0, 1) a row (B,), the rows of all ranks drawn one after another."""
        if self._stream is None:
            self._stream = torch.Generator().manual_seed(self.seed)
            torch.rand(self._drawn, generator=self._stream)
        first, total = ranks.rank() * rows, ranks.world_size() * rows
        self._drawn += total
        return torch.rand(total, generator=self._stream)[first : first + rows]

    def _keys(self, rows: int) -> list[np.random.SeedSequence]:
        """Return what the draws of each row are seeded by, whichever rank has the row."""
        first = ranks.rank() * rows
        return [np.random.SeedSequence([self.seed, self._batches, row]) for row in range(first, first + rows)]

    def _generators(self, rows: int, device: torch.device) -> list[torch.Generator]:
        """Return one generator for each row."""
        seeds = [int(key.generate_state(1, np.uint64)[0]) for key in self._keys(rows)]
        return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def normal(like: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Draw standard normal numbers (K, B, ...), each row b by its generator; `like` is (K, 1, ...)."""
    noise = like.new_empty(len(generators), like.shape[0], *like.shape[2:])
    for row, generator in zip(noise, generators, strict=True):
        row.normal_(generator=generator)
    return noise.transpose(0, 1).contiguous()


def fit_rows(state: RecurrentState, rows: int) -> RecurrentState:
    """Return as many rows as the batch has: the last batch of an epoch may be smaller than the one before."""
    if state.batch_size == rows:
        return state
    return state.rows([row % state.batch_size for row in range(rows)])
