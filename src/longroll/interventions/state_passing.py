"""State Passing: start from the final state of the previous batch, other texts (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longroll.interventions._base import Batch, Intervention, fit_rows
from longroll.state import RecurrentState


class StatePassing(Intervention):
    """Row b of batch i starts from the final state of row b of batch i - 1, which is of an unrelated text.

    Nothing is fitted: the states are real ones, so this works where states are not IID. A row that starts
    from zero by chance (`zero_probability`) leaves its passed state waiting rather than replace it: else
    no state would get older than a few sequences, and states far past the training length would stay
    unexplored (measured: dev/LOG.md). It is the wrong tool where the data are not stationary (a
    passkey that is stated once): see FittedNoise.
    """

    name = "sp"
    passed: RecurrentState | None = None

    def _choose(self, batch: Batch, rows: int) -> RecurrentState | None:
        return None if self.passed is None else fit_rows(self.passed, rows)

    def _learn(self, final_state: RecurrentState) -> None:
        waiting, taken = self.passed, self._set
        self._set = None
        if waiting is not None and taken is not None and waiting.batch_size == len(taken):
            final_state = final_state.where(taken, waiting)
        self.passed = final_state

    def forget(self, skipped: Tensor, unknown: Tensor) -> Tensor:
        """Forget the states of rows that are not finite, or of all rows: they start from zero."""
        if self.passed is None:
            return super().forget(skipped, unknown)
        finite = [t.isfinite().flatten(1).all(dim=1) for t in self.passed.values() if t.is_floating_point()]
        kept = torch.stack(finite).all(dim=0) & ~unknown
        self.passed = self.passed.where(kept)
        return (~kept).sum().float()

    def _memory(self) -> dict[str, Any]:
        return {} if self.passed is None else self.passed.named()

    def _recall(self, memory: Mapping[str, Any]) -> None:
        self.passed = RecurrentState.from_named(memory) if memory else None

    def _deal(self, memories: list[Mapping[str, Any]], rank: int, world_size: int) -> Mapping[str, Any]:
        rows = {name: torch.cat([memory[name] for memory in memories]) for name in memories[0]}
        return {name: t.tensor_split(world_size)[rank].clone() for name, t in rows.items()}
