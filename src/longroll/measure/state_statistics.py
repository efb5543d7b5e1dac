"""How the state grows: its statistics per layer and head at chosen positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longroll.errors import LongrollError
from longroll.measure.roll_out import roll_out
from longroll.model import RecurrentLM
from longroll.state import RecurrentState


class StateRecorder:
    """Takes statistics of the recurrent state at `positions` as a roll-out comes by (its `watch`)."""

    def __init__(self, lm: RecurrentLM, positions: Sequence[int]) -> None:
        self.lm = lm
        self.positions = sorted(set(positions))
        self._at: dict[int, list[dict[str, Tensor]]] = {}

    def __call__(self, position: int, state: RecurrentState) -> None:
        """Note the state after `position` tokens, if it is one asked for."""
        if position in self.positions:
            self._at[position] = [_of_heads(state[key]) for key in sorted(state) if key.part == "recurrent"]

    def statistics(self) -> StateStatistics:
        """What was seen so far."""
        seen = sorted(self._at)
        layers = [
            {name: torch.stack([self._at[p][i][name] for p in seen]) for name in _NAMES}
            for i in range(len(self.lm.layers))
        ]
        return StateStatistics(seen, [layer.layer for layer in self.lm.layers], self.lm.family.kind, layers)


@dataclass(frozen=True)
class StateStatistics:
    """`mean`, `std`, `norm` (Euclidean, mean over rows) and `max` (absolute) of the recurrent state."""

    positions: list[int]
    layer_indices: list[int]
    kind: str
    layers: list[dict[str, Tensor]]
    """One a layer: name -> (positions, heads), float64."""

    def to_json(self) -> dict:
        """For results: a layer's own numbers, and its heads' std where there are at most 64 heads."""
        rows = []
        for index, stats in zip(self.layer_indices, self.layers, strict=True):
            heads = stats["std"].shape[1]
            mean_square = stats["std"].square() + stats["mean"].square()
            std = (mean_square.mean(dim=1) - stats["mean"].mean(dim=1).square()).clamp_min(0).sqrt()
            row = {
                "layer": index,
                "kind": self.kind,
                "heads": heads,
                "std": std.tolist(),
                "norm": stats["norm"].square().sum(dim=1).sqrt().tolist(),
                "max": stats["max"].amax(dim=1).tolist(),
            }
            if heads <= 64:
                row["std_heads"] = stats["std"].T.tolist()
            rows.append(row)
        return {"position": self.positions, "layers": rows}


_NAMES = ("mean", "std", "norm", "max")


def _of_heads(tensor: Tensor) -> dict[str, Tensor]:
    """Statistics over rows and everything inside a head, (H,) each, of a state (B, H, ...)."""
    rows = tensor.double().cpu().flatten(2)
    heads = rows.transpose(0, 1).flatten(1)
    return {
        "mean": heads.mean(dim=1),
        "std": heads.std(dim=1, correction=0),
        "norm": rows.norm(dim=2).mean(dim=0),
        "max": heads.abs().amax(dim=1),
    }


def state_statistics(lm: RecurrentLM, tokens: Tensor, positions: Sequence[int]) -> StateStatistics:
    """Statistics of the recurrent state after `positions` tokens of `tokens` (B, L), 1 <= position <= L.

    Raises:
        LongrollError: for a model without recurrent state, and positions outside the text.
    """
    if not lm.family.recurrent:
        raise LongrollError(f"{lm.name} has no recurrent state to take statistics of.")
    if not positions or min(positions) < 1 or max(positions) > tokens.shape[1]:
        raise LongrollError(f"positions must lie in 1..{tokens.shape[1]}, the tokens given.")
    recorder = StateRecorder(lm, positions)
    for chunk in roll_out(lm, tokens[:, : max(positions)], stops=positions):
        recorder(chunk.start + chunk.hidden.shape[1], chunk.state)
    return recorder.statistics()
