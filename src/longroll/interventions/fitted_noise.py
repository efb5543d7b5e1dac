"""Fitted Noise: start from Gaussian noise with the moments of the final states seen (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longroll import ranks
from longroll.errors import LongrollError
from longroll.interventions._base import Batch, Intervention, normal
from longroll.state import RecurrentState


class FittedNoise(Intervention):
    """Every number is drawn from N(mean, std^2), mean and std fitted to each layer and head.

    The fit is a running average over the final states of the batches, reduced over ranks. The right tool
    where the data are not stationary; it fails where the states of a head are far from IID.

    Args:
        momentum: weight of the past in the running moments, 0 (last batch only) to below 1.
        zero_probability: probability that a row starts from the zero state, 0 to 1.
        conv: draw the conv part of the state too.
        seed: random seed of the draws.
    """

    name = "fitted"

    def __init__(
        self, momentum: float = 0.9, *, zero_probability: float = 0.0, conv: bool = True, seed: int = 0
    ) -> None:
        super().__init__(zero_probability=zero_probability, conv=conv, seed=seed)
        if not 0 <= momentum < 1:
            raise LongrollError(f"`momentum` {momentum} must be in [0, 1).")
        self.momentum = momentum
        self.moments = RecurrentState({})  # two rows, mean and mean square, with one number for each head
        self.like = RecurrentState({})  # one row, for its shapes: it takes no memory
        self._before: RecurrentState | None = None  # the moments before this step

    def _choose(self, batch: Batch, rows: int) -> RecurrentState | None:
        if not self.moments:
            return None

        generators = self._generators(rows, next(iter(self.moments.values())).device)
        return self.noise(lambda like: normal(like, generators))

    def noise(self, draw: Callable[[Tensor], Tensor]) -> RecurrentState:
        """Return noise of the fitted moments from standard normal numbers.

        Args:
            draw: gives the numbers (K, rows, ...) for a stack (K, 1, ...) of K tensors that are alike.
        """

        def scale(like: Tensor, moments: Tensor) -> Tensor:
            mean, square = moments.split(1, dim=1)
            std = (square - mean.square()).clamp_min(0).sqrt()
            return torch.addcmul(mean, draw(mean.expand_as(like)), std)

        return self.like.map_stacked(scale, self.moments)

    def _learn(self, final_state: RecurrentState) -> None:
        if not self.like:
            self.like = final_state.map(lambda t: t.new_zeros(()).expand(1, *t.shape[1:]))

        new = _over_ranks(final_state.map_stacked(_moments), final_state.batch_size)
        if self.moments:
            new = new.map_stacked(lambda now, old: torch.lerp(now, old, self.momentum), self.moments)
        self.moments = new

    def forget(self, skipped: Tensor, unknown: Tensor) -> Tensor:
        """Keep the moments of before a step that was skipped, and of heads whose squares overflow.

        They are the same on all ranks.
        """
        before = self.moments.map(torch.zeros_like) if self._before is None else self._before

        def keep(now: Tensor, old: Tensor) -> Tensor:
            return torch.where(skipped | ~now.isfinite().all(dim=1, keepdim=True), old, now)

        self.moments = self.moments.map_stacked(keep, before)
        self._before = self.moments
        return super().forget(skipped, unknown)

    def _memory(self) -> dict[str, Any]:
        shapes = {name: list(t.shape) for name, t in self.like.named().items()}
        return {"shapes": shapes, "moments": self.moments.named()}

    def _recall(self, memory: Mapping[str, Any]) -> None:
        self.moments = RecurrentState.from_named(memory["moments"])
        self._before = self.moments if self.moments else None
        self.like = RecurrentState.from_named(
            {n: t.new_zeros(()).expand(memory["shapes"][n]) for n, t in self.moments.named().items()}
        )


def _moments(tensor: Tensor) -> Tensor:
    """Return mean and mean square of a stack (K, B, H, ...) over the batch and inside a head: (K, 2, H, 1,
    ...).
    """
    tensor = tensor.float()
    axes = [axis for axis in range(1, tensor.ndim) if axis != 2]
    return torch.cat([t.mean(dim=axes, keepdim=True) for t in (tensor, tensor.square())], dim=1)


def _over_ranks(moments: RecurrentState, rows: int) -> RecurrentState:
    """Return the moments of the rows of all ranks; each has as many `rows` as it has."""
    if ranks.alone():
        return moments
    flat = torch.cat([t.flatten() for t in moments.values()])
    flat = torch.cat([flat * rows, flat.new_tensor([rows])])
    dist.all_reduce(flat)
    parts = (flat[:-1] / flat[-1]).split([t.numel() for t in moments.values()])
    return RecurrentState(
        {key: part.view_as(t) for (key, t), part in zip(moments.items(), parts, strict=True)}
    )
