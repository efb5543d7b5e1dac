"""How the state grows: its statistics per layer and head at chosen positions, for both parts of the state.

Nothing of a state is kept but these numbers, which are taken where the state is, so a roll-out of any length
takes constant memory, and a model of thousands of heads hardly more time than its loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from longroll import ranks
from longroll.errors import LongrollError
from longroll.heads import channels_of, has_heads, heads_of
from longroll.measure.roll_out import roll_out
from longroll.model import RecurrentLM
from longroll.state import RecurrentState

RANK_ROWS = 4
"""Rows whose effective rank is taken."""


class StateRecorder:
    """Takes statistics of the recurrent state at `positions` as a roll-out comes by (its `watch`).

    Args:
        lm: the model.
        positions: where.
        rank_rows: how many rows, the first ones, effective ranks are taken of.
    """

    def __init__(self, lm: RecurrentLM, positions: Sequence[int], *, rank_rows: int = RANK_ROWS) -> None:
        self.lm = lm
        self.positions = sorted(set(positions))
        self.rank_rows = rank_rows
        self.rows = 0
        """Rows of the states seen."""
        self._at: dict[int, list[dict[str, Tensor]]] = {}
        self._conv_at: dict[int, dict[int, dict[str, Tensor]]] = {}

    def __call__(self, position: int, state: RecurrentState) -> None:
        """Note the state after `position` tokens, if it is one asked for."""
        if position not in self.positions:
            return
        keys = sorted(state)
        self.rows = state.batch_size
        states = [state[key] for key in keys if key.part == "recurrent"]
        recurrent = [found for group in _alike(states) for found in _of_layers(group, self.rank_rows)]
        tails: dict[int, list[Tensor]] = {}
        for key in keys:
            if key.part == "conv" and state[key].is_floating_point():
                tails.setdefault(key.layer, []).append(state[key].flatten(1))
        conv = {
            layer: {name: t[0] for name, t in _of_heads(torch.cat(parts, dim=1).unsqueeze(1)).items()}
            for layer, parts in tails.items()
        }
        self._at[position], self._conv_at[position] = recurrent, conv

    def _to_cpu(self) -> None:
        """Bring what was seen to the CPU, in one transfer a device; nothing waits while texts are read."""
        places: dict[torch.device, list[tuple[dict[str, Tensor], str]]] = {}
        for named in chain(*self._at.values(), *(layers.values() for layers in self._conv_at.values())):
            for name, tensor in named.items():
                if tensor.device.type != "cpu":
                    places.setdefault(tensor.device, []).append((named, name))
        for entries in places.values():
            tensors = [named[name] for named, name in entries]
            numbers = torch.cat([t.flatten() for t in tensors]).cpu().split([t.numel() for t in tensors])
            for (named, name), tensor, part in zip(entries, tensors, numbers, strict=True):
                named[name] = part.view(tensor.shape)

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen so far."""
        self._to_cpu()
        return {"rows": self.rows, "at": self._at, "conv_at": self._conv_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was seen before."""
        self.rows, self._at, self._conv_at = state["rows"], state["at"], state["conv_at"]

    def over_ranks(self) -> None:
        """Take what the recorders of all ranks saw for seen here; every rank must call this."""
        if ranks.alone():
            return
        self._to_cpu()
        mine = self.rows, min(self.rows, self.rank_rows), self._at, self._conv_at
        parts = [part for part in ranks.gather(mine) if part[0]]  # the last ranks may have no rows
        rows, ranked, at, conv_at = zip(*parts, strict=True)
        self.rows, self.rank_rows = sum(rows), sum(ranked)
        self._at = {
            position: [_of_all(layer, rows, ranked) for layer in zip(*(p[position] for p in at), strict=True)]
            for position in at[0]
        }
        self._conv_at = {
            position: {layer: _of_all([p[position][layer] for p in conv_at], rows, ranked) for layer in tails}
            for position, tails in conv_at[0].items()
        }

    def statistics(self) -> StateStatistics:
        """Return what was seen so far."""
        self._to_cpu()
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
        """Return plain data for results: the numbers of each layer, and its heads' std where there are at
        most 64 heads.
        """
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


def _of_all(
    parts: Sequence[dict[str, Tensor]], rows: Sequence[int], ranked: Sequence[int]
) -> dict[str, Tensor]:
    """Return statistics of all rows from those of parts of so many rows, of which so many have a rank."""

    def mean(tensors: Iterable[Tensor], counts: Sequence[int]) -> Tensor:
        shares = [t * (n / sum(counts)) for t, n in zip(tensors, counts, strict=True) if n]
        return torch.stack(shares).sum(dim=0)

    middle = mean((part["mean"] for part in parts), rows)
    squares = (part["std"].square() + (part["mean"] - middle).square() for part in parts)
    found = {
        "mean": middle,
        "std": mean(squares, rows).sqrt(),
        "norm": mean((part["norm"] for part in parts), rows),
        "max": torch.stack([part["max"] for part in parts]).amax(dim=0),
    }
    if "rank" in parts[0]:
        found["rank"] = mean((part["rank"] for part in parts), ranked)
    return found


AT_ONCE = {"cpu": 0, "cuda": 1 << 28}
"""Bytes of the states of several layers whose statistics are taken together, by device: a GPU would wait for
Python."""


def _alike(states: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield runs of layers whose heads can be put side by side."""
    group: list[Tensor] = []
    for tensor in states:
        room = AT_ONCE.get(tensor.device.type, 0) - sum(t.nbytes for t in group)
        like = group and (tensor.shape, tensor.dtype, tensor.device) == (
            group[0].shape, group[0].dtype, group[0].device,
        )  # fmt: skip
        if group and not (like and has_heads(tensor) and tensor.nbytes <= room):
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def _of_layers(states: Sequence[Tensor], rank_rows: int) -> list[dict[str, Tensor]]:
    """Return statistics of the heads of each layer, of states (B, H, ...) that are alike."""
    joined = states[0] if len(states) == 1 else torch.cat(list(states), dim=1)
    found = _of_heads(joined) | {"rank": head_rank(joined[:rank_rows])}
    if len(states) == 1:
        return [found]
    parts = {name: t.split(states[0].shape[1]) for name, t in found.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(states))]


def _of_heads(tensor: Tensor) -> dict[str, Tensor]:
    """Return statistics over rows and everything inside a head, (H,) float64 each, of a state (B, H, ...)."""
    rows = channels_of(tensor)
    mean = rows.mean(dim=(0, 2), dtype=torch.float64)
    norms = torch.linalg.vector_norm(rows, dim=2, dtype=torch.float64)
    variance = norms.square().mean(dim=0) / rows.shape[2] - mean.square()
    return {
        "mean": mean,
        "std": variance.clamp_min(0).sqrt(),
        "norm": norms.mean(dim=0),
        "max": torch.linalg.vector_norm(rows, ord=math.inf, dim=(0, 2)).double(),
    }


def head_rank(tensor: Tensor) -> Tensor:
    """Return effective rank of each head of a state (B, H, ...), mean over rows, (H,) float64.

    The participation ratio (tr C)^2 / tr(C^2) of the Gram matrix C of a head's matrix (P, N): with singular
    values s, (sum s^2)^2 / sum s^4. It is n for n equal singular values and 1 for a single one. It takes two
    Frobenius norms and no decomposition. Where heads are vectors, as in Mamba-1, the layer's matrix of all
    channels counts as one head, (1,). NaN for a state that is zero or not finite.
    Sources: Bartlett et al. 2020, "Benign overfitting in linear regression" (effective rank R_0); Gao et al.
    2017, "A theory of multineuronal dimensionality, dynamics and measurement" (participation ratio).
    """
    matrices = heads_of(tensor.to(torch.promote_types(tensor.dtype, torch.float32)))
    if matrices.shape[-2] > matrices.shape[-1]:
        matrices = matrices.mT
    largest = torch.linalg.vector_norm(matrices, ord=math.inf, dim=(-2, -1), keepdim=True)
    matrices = matrices / largest  # zero state: NaN; fourth powers stay within float32
    energy = torch.linalg.vector_norm(matrices, dim=(-2, -1), dtype=torch.float64).square()
    gram = torch.linalg.vector_norm(matrices @ matrices.mT, dim=(-2, -1), dtype=torch.float64)
    rank = (energy / gram).square()
    return torch.where(largest[..., 0, 0].isfinite(), rank, torch.nan).mean(dim=0)


def state_statistics(lm: RecurrentLM, tokens: Tensor, positions: Sequence[int]) -> StateStatistics:
    """Return statistics of the recurrent state after `positions` tokens of `tokens` (B, L), 1 <= position <=
    L.

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
