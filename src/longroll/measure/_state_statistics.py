"""How the state grows: its statistics per layer and head at chosen positions, for both parts of the state.

Nothing of a state is kept but these numbers, so a roll-out of any length takes constant memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longroll.errors import LongrollError
from longroll.heads import channels_of, heads_of
from longroll.measure.roll_out import roll_out
from longroll.model import RecurrentLM
from longroll.state import RecurrentState


class StateRecorder:
    """Takes statistics of the recurrent state at `positions` as a roll-out comes by (its `watch`)."""

    def __init__(self, lm: RecurrentLM, positions: Sequence[int]) -> None:
        self.lm = lm
        self.positions = sorted(set(positions))
        self._at: dict[int, list[dict[str, Tensor]]] = {}
        self._conv_at: dict[int, dict[int, dict[str, Tensor]]] = {}

    def __call__(self, position: int, state: RecurrentState) -> None:
        """Note the state after `position` tokens, if it is one asked for."""
        if position not in self.positions:
            return
        keys = sorted(state)
        self._at[position] = [
            _of_heads(state[key]) | {"rank": head_rank(state[key][:_RANK_ROWS])}
            for key in keys
            if key.part == "recurrent"
        ]
        tails: dict[int, list[Tensor]] = {}
        for key in keys:
            if key.part == "conv" and state[key].is_floating_point():
                tails.setdefault(key.layer, []).append(state[key].flatten(1))
        self._conv_at[position] = {
            layer: {name: t[0] for name, t in _of_heads(torch.cat(parts, dim=1).unsqueeze(1)).items()}
            for layer, parts in tails.items()
        }

    def statistics(self) -> StateStatistics:
        """What was seen so far."""
        seen = sorted(self._at)
        layers = [
            {name: torch.stack([self._at[p][i][name] for p in seen]) for name in _NAMES}
            for i in range(len(self.lm.layers))
        ]
        conv = {
            index: {name: torch.stack([self._conv_at[p][index][name] for p in seen]) for name in first}
            for index, first in (self._conv_at[seen[0]] if seen else {}).items()
        }
        indices = [layer.layer for layer in self.lm.layers]
        return StateStatistics(seen, indices, self.lm.family.kind, layers, conv)


@dataclass(frozen=True)
class StateStatistics:
    """`mean`, `std`, `norm` (Euclidean, mean over rows), `max` (absolute) and `rank` of the recurrent state.

    `rank` is the effective rank, see `head_rank`.
    """

    positions: list[int]
    layer_indices: list[int]
    kind: str
    layers: list[dict[str, Tensor]]
    """One a layer: name -> (positions, heads), float64; `rank` has one column where heads are vectors."""
    conv: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Layer -> name -> (positions,): the same, without rank, of its conv tails and token shifts."""

    def to_json(self) -> dict[str, Any]:
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
                "rank": stats["rank"].mean(dim=1).tolist(),
            }
            if heads <= 64:
                row["std_heads"] = stats["std"].T.tolist()
                row["rank_heads"] = stats["rank"].T.tolist()
            if index in self.conv:
                row["conv"] = {name: t.tolist() for name, t in self.conv[index].items()}
            rows.append(row)
        return {"position": self.positions, "layers": rows}


_NAMES = ("mean", "std", "norm", "max", "rank")
_RANK_ROWS = 4  # the rows whose effective rank is taken: decompositions are slow


def _of_heads(tensor: Tensor) -> dict[str, Tensor]:
    """Statistics over rows and everything inside a head, (H,) each, of a state (B, H, ...)."""
    rows = channels_of(tensor.double()).cpu()
    heads = rows.transpose(0, 1).flatten(1)
    return {
        "mean": heads.mean(dim=1),
        "std": heads.std(dim=1, correction=0),
        "norm": rows.norm(dim=2).mean(dim=0),
        "max": heads.abs().amax(dim=1),
    }


def head_rank(tensor: Tensor) -> Tensor:
    """Effective rank of each head of a state (B, H, ...), mean over rows, (H,) float64.

    The exponential of the entropy of the singular values as shares of their sum: n for n equal ones, 1 for a
    single one. Of each head's matrix (P, N); where heads are vectors, as in Mamba-1, of the layer's matrix of
    all heads, (1,). NaN for a state that is zero or not finite.
    Source: Roy and Vetterli, "The effective rank", 2007.
    """
    matrices = heads_of(tensor.double())
    if matrices.shape[-2] > matrices.shape[-1]:
        matrices = matrices.mT
    finite = matrices.isfinite().all(dim=(-2, -1), keepdim=True)
    matrices = torch.where(finite, matrices, 0)
    matrices = matrices / matrices.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(1e-300)
    # squares of the singular values: to about 1e-8 of the largest one, and several times faster
    values = torch.linalg.eigvalsh(matrices @ matrices.mT).clamp_min(0).sqrt()
    shares = values / values.sum(dim=-1, keepdim=True)  # zero state: NaN
    rank = torch.special.entr(shares).sum(dim=-1).exp()
    return torch.where(finite[..., 0, 0], rank, torch.nan).mean(dim=0).cpu()


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
