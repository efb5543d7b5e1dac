"""Fitted Noise: start from Gaussian noise with the moments of the final states seen (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longroll.errors import LongrollError
from longroll.interventions._base import Batch, Intervention
from longroll.state import RecurrentState


class FittedNoise(Intervention):
    """Every number is drawn from N(mean, std^2), mean and std fitted to each layer and head.

    The fit is a running average over the final states of the batches, reduced over ranks. The right tool
    where the data are not stationary; it fails where the states of a head are far from IID.

    Args:
        momentum: weight of the past in the running moments, 0 (last batch only) to below 1.
        zero_probability, conv, seed: as for every intervention.
    """

    name = "fitted"

    def __init__(
        self, momentum: float = 0.9, *, zero_probability: float = 0.0, conv: bool = True, seed: int = 0
    ) -> None:
        super().__init__(zero_probability=zero_probability, conv=conv, seed=seed)
        if not 0 <= momentum < 1:
            raise LongrollError(f"--momentum {momentum} must be in [0, 1).")
        self.momentum = momentum
        self.moments: dict[str, RecurrentState] = {}  # "mean" and "square", one row: a number a head
        self.shapes: dict[str, list[int]] = {}

    def _choose(self, batch: Batch, rows: int) -> RecurrentState | None:
        if not self.moments:
            return None
        mean, square = self.moments["mean"], self.moments["square"]

        def draw(key, first: Tensor) -> Tensor:
            std = (square[key] - first.square()).clamp_min(0).sqrt()
            noise = first.new_empty(rows, *self.shapes[str(key)])
            return noise.normal_(generator=self._draws(first.device)).mul_(std).add_(first)

        return RecurrentState({key: draw(key, first) for key, first in mean.items()})

    def _learn(self, final_state: RecurrentState) -> None:
        self.shapes = {str(key): list(t.shape[1:]) for key, t in final_state.items()}
        for name, power in (("mean", 1), ("square", 2)):
            new = {key: _over_ranks(_head_mean(t.float() ** power)) for key, t in final_state.items()}
            if name in self.moments:
                old = self.moments[name]
                new = {key: torch.lerp(t, old[key], self.momentum) for key, t in new.items()}
            self.moments[name] = RecurrentState(new)

    def _memory(self) -> dict[str, Any]:
        return {"shapes": self.shapes} | {name: moment.named() for name, moment in self.moments.items()}

    def _recall(self, memory: Mapping[str, Any]) -> None:
        self.shapes = dict(memory["shapes"])
        self.moments = {
            name: RecurrentState.from_named(tensors) for name, tensors in memory.items() if name != "shapes"
        }


def _head_mean(tensor: Tensor) -> Tensor:
    """Mean over the batch and everything inside a head: (1, H, 1, ...)."""
    axes = [axis for axis in range(tensor.ndim) if axis != 1]
    return tensor.mean(dim=axes, keepdim=True)


def _over_ranks(moment: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(moment)
        moment /= dist.get_world_size()
    return moment
