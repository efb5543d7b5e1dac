"""Random Noise: start from IID Gaussian noise of one size (paper, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from longroll.errors import LongrollError
from longroll.interventions._base import Batch, Intervention, normal
from longroll.state import RecurrentState


class RandomNoise(Intervention):
    """Every number of the state is drawn from N(0, std^2), the same std for all layers and heads.

    The shapes are those of the first final state observed, so the very first batch starts from zero.

    Args:
        std: standard deviation of the noise.
        zero_probability: probability that a row starts from the zero state, 0 to 1.
        conv: draw the conv part too. By default it starts from zero, since conv tails are inputs rather than
            states.
        seed: random seed of the draws.
    """

    name = "random"

    def __init__(
        self, std: float = 1.0, *, zero_probability: float = 0.0, conv: bool = False, seed: int = 0
    ) -> None:
        super().__init__(zero_probability=zero_probability, conv=conv, seed=seed)
        if not 0 <= std < math.inf:
            raise LongrollError(f"`std` {std} is not a size: 0 or above.")
        self.std = std
        self.shapes: RecurrentState | None = None  # one row, for its shapes

    def _choose(self, batch: Batch, rows: int) -> RecurrentState | None:
        if self.shapes is None:
            return None

        generators = self._generators(rows, next(iter(self.shapes.values())).device)
        return self.shapes.map_stacked(lambda like: normal(like, generators).mul_(self.std))

    def _learn(self, final_state: RecurrentState) -> None:
        if self.shapes is None:
            self.shapes = final_state.rows(slice(0, 1)).map(torch.zeros_like)

    def _memory(self) -> dict[str, Any]:
        return {} if self.shapes is None else self.shapes.named()

    def _recall(self, memory: Mapping[str, Any]) -> None:
        self.shapes = RecurrentState.from_named(memory) if memory else None
