"""What the four interventions share: when a row starts from zero after all, which parts are set, the seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longroll.errors import LongrollError
from longroll.state import RecurrentState

Batch = Mapping[str, Any] | Tensor
"""`input_ids` (B, T) and, for document-contiguous data, `starts` (B,): rows that begin a document."""


class Intervention:
    """Chooses the state that each row of a training batch starts from.

    A subclass says how in `_choose`; the training loop asks `initial_state` before each (micro-)batch and
    hands the final state to `observe` after it.

    Args:
        zero_probability: how often a row starts from the zero state all the same, 0 to 1.
        conv: act on the conv part of the state too; else it starts from zero. KV is never touched.
        seed: of the draws.

    Raises:
        LongrollError: for a probability outside [0, 1].
    """

    name = "intervention"

    def __init__(self, *, zero_probability: float = 0.0, conv: bool = True, seed: int = 0) -> None:
        if not 0 <= zero_probability <= 1:
            raise LongrollError(f"`zero_probability` {zero_probability} is not a probability: 0 to 1.")
        self.zero_probability = zero_probability
        self.conv = conv
        self.seed = seed
        self._generator: torch.Generator | None = None
        self._generator_state: Tensor | None = None
        self._set: Tensor | None = None  # rows of this batch that did not start from zero by chance

    def initial_state(self, batch: Batch) -> RecurrentState | None:
        """The state the rows of `batch` start from; None is the zero state (before anything was observed)."""
        input_ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
        state = self._choose(batch, len(input_ids))
        if state is None or self.zero_probability == 0:
            return state
        device = next(iter(state.values())).device
        draws = torch.rand(len(input_ids), generator=self._draws(device), device=device)
        self._set = draws >= self.zero_probability
        return state.where(self._set)

    def observe(self, final_state: RecurrentState) -> None:
        """Take note of the final state of a batch; it is detached here."""
        self._learn(final_state.part("recurrent", *(("conv",) if self.conv else ())).detach())

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: tensors only, so that it loads with `weights_only`."""
        generator = self._generator_state if self._generator is None else self._generator.get_state()
        return {"memory": self._memory(), "generator": generator}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._recall(state["memory"])
        self._generator, self._generator_state = None, state["generator"]

    def _choose(self, batch: Batch, rows: int) -> RecurrentState | None:
        """The state for `rows` rows."""
        raise LongrollError(f"{type(self).__name__} must say how it chooses a state.")

    def _learn(self, final_state: RecurrentState) -> None:
        """Note what `_choose` needs."""

    def _memory(self) -> dict[str, Any]:
        return {}

    def _recall(self, memory: Mapping[str, Any]) -> None:
        pass

    def _draws(self, device: torch.device) -> torch.Generator:
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self.seed)
            if self._generator_state is not None:
                self._generator.set_state(self._generator_state)
        return self._generator


def fit_rows(state: RecurrentState, rows: int) -> RecurrentState:
    """As many rows as the batch has: the last batch of an epoch may be smaller than the one before."""
    if state.batch_size == rows:
        return state
    return state.rows([row % state.batch_size for row in range(rows)])
