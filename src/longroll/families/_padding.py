"""Padding on the right of rows: how recurrences leave their states alone there, and the inputs before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longroll.ops._common import NO_LIMIT, state_dtype

_NO_STEP = -1e4  # softplus of it is 0, whatever the bias, in every dtype

_STILL = {  # op -> which of its arguments are 0: log decays, and what is written
    "gla": (1, 3),
    "delta_rule": (3,),
    "gated_delta_rule": (3, 4),
    "kda": (3, 4),
    "rwkv6": (1, 3),
    "rwkv7": (1, 2, 5),
}


class Padding:
    """Where the rows of a forward end; what all layers ask of it is made once.

    Args:
        lengths: (B,) real tokens of each row, on the CPU, at least 1.
        time: T, tokens of a row with its padding.
        device: where the forward runs.
    """

    def __init__(self, lengths: Tensor, time: int, device: torch.device) -> None:
        self.lengths = lengths.to(device)
        self._shortest = int(lengths.min())
        self._rows = torch.arange(len(lengths), device=device)
        self._out = [torch.arange(time, device=device) >= self.lengths[:, None]]
        for _ in range(2):
            self._out.append(self._out[-1].unsqueeze(-1))
        self._places: dict[int, Tensor] = {}

    def out(self, axes: int) -> Tensor:
        """Return (B, T, 1, ...) with `axes` axes, true at padding."""
        return self._out[axes - 2]

    def last(self, x: Tensor) -> Tensor:
        """Return the last real input (B, D) of each row of x (B, T, D)."""
        return x[self._rows, self.lengths - 1]

    def last_inputs(self, x: Tensor, width: int, before: Tensor | None = None) -> Tensor:
        """Return the last `width` real inputs of each row of x (B, T, D), (B, D, width), in memory of their
        own.

        `before` (B, D, W >= width) are the inputs before x; None: zeros.
        """
        if self._shortest < width:
            before = x.new_zeros(len(x), x.shape[2], width) if before is None else before[..., -width:]
            x = torch.cat([before.to(x.dtype).mT, x], dim=1)
            place = self.lengths[:, None] + torch.arange(width, device=x.device)
        else:
            if width not in self._places:
                self._places[width] = (self.lengths[:, None] - width) + torch.arange(width, device=x.device)
            place = self._places[width]
        return x[self._rows[:, None], place].mT.contiguous()


def still(op: str, inputs: tuple[Tensor, ...], padding: Padding | None) -> tuple[Tensor, ...]:
    """Return the inputs (B, T, ...) of an op, such that padding leaves its state as it is."""
    if padding is None:
        return inputs
    return tuple(
        t.masked_fill(padding.out(t.ndim), 0) if i in _STILL[op] else t for i, t in enumerate(inputs)
    )


def no_step(dt: Tensor, padding: Padding | None, *, softplus: bool) -> Tensor:
    """Return Mamba's step sizes (B, T, ...) before softplus, such that padding makes none."""
    if padding is None:
        return dt
    return dt.masked_fill(padding.out(dt.ndim), _NO_STEP if softplus else 0.0)


def limited_steps(
    dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float], padding: Padding | None
) -> tuple[Tensor, Tensor | None, bool, tuple[float, float]]:
    """Mamba-2's step sizes (B, T, H), bias (H,), softplus and limits, such that padding makes no step."""
    if padding is None or limit[0] <= 0:
        return no_step(dt, padding, softplus=softplus), bias, softplus, limit
    dt = dt.to(state_dtype(dt, bias))  # the limit would make a step of none
    dt = dt if bias is None else dt + bias
    dt = (F.softplus(dt) if softplus else dt).clamp(*limit)
    return dt.masked_fill(padding.out(dt.ndim), 0), None, False, NO_LIMIT
