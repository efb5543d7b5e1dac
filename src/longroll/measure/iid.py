"""Are the states IID? Noise that has their moments stands for them only if they are.

Random and Fitted Noise draw every number of a head's state from one Gaussian. Where real states have
structure, such noise trains a model on states that it never visits, and the repair fails as models grow
(Buitrago Ruiz & Gu 2025, section 4). Structure shows in the effective rank: a matrix of IID numbers has
nearly full rank whatever their moments, a state written by a few tokens has not. The noise it is compared
with is that of `FittedNoise` itself, fitted to the same states.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longroll.interventions import FittedNoise
from longroll.measure._state_statistics import head_rank
from longroll.state import RecurrentState, StateKey

LEAST_RATIO = 0.8
"""A head whose effective rank is a smaller share of its noise's is not IID."""
ROWS = 8
"""Texts whose states are compared."""


@dataclass(frozen=True)
class IIDTest:
    """Effective rank of states and of Fitted Noise, a tensor (H,) a layer; NaN for states that are zero."""

    states: dict[StateKey, Tensor]
    noise: dict[StateKey, Tensor]

    @property
    def share(self) -> float:
        """Share of the heads that are not IID; NaN when no head can tell."""
        real, drawn = torch.cat(list(self.states.values())), torch.cat(list(self.noise.values()))
        told = real.isfinite() & drawn.isfinite()
        return (real[told] < LEAST_RATIO * drawn[told]).double().mean().item()

    @property
    def ranks(self) -> tuple[float, float]:
        """Median effective rank over heads, of the states and of the noise."""
        real, drawn = (torch.cat(list(ranks.values())) for ranks in (self.states, self.noise))
        return real.nanmedian().item(), drawn.nanmedian().item()

    def to_json(self) -> dict[str, Any]:
        """Return plain data for results."""
        state_rank, noise_rank = self.ranks
        return {"share_not_iid": self.share, "state_rank": state_rank, "noise_rank": noise_rank}


def iid_test(state: RecurrentState, *, seed: int = 0) -> IIDTest:
    """Compare the effective rank of every head of `state` with that of Fitted Noise of its moments.

    The noise of one layer exists at a time.

    Args:
        state: the state of B >= 2 texts, where training ends.
        seed: random seed of the noise.
    """
    state = state.part("recurrent").rows(slice(0, ROWS)).detach()
    generators: dict[torch.device, torch.Generator] = {}
    real, drawn = {}, {}
    for key, tensor in state.items():
        device = tensor.device
        draw = partial(
            _normal,
            rows=len(tensor),
            generator=generators.setdefault(device, torch.Generator(device).manual_seed(seed)),
        )
        fitted = FittedNoise(conv=False, momentum=0.0)
        fitted.observe(RecurrentState({key: tensor}))
        real[key], drawn[key] = head_rank(tensor), head_rank(fitted.noise(draw)[key])
    return IIDTest(*({key: t.cpu() for key, t in ranks.items()} for ranks in (real, drawn)))


def _normal(like: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Return standard normal numbers (K, rows, ...) for a stack (K, 1, ...)."""
    return like.new_empty(len(like), rows, *like.shape[2:]).normal_(generator=generator)
