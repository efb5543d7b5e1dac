"""Inputs by which a recurrence leaves its state as it is, for the padding on the right of a document."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longroll.ops._common import state_dtype
from longroll.ops._ssd import NO_LIMIT

_NO_STEP = -1e4  # softplus of it is 0, whatever the bias, in every dtype

_STILL = {  # op -> which of its arguments are 0: log decays, and what is written
    "gla": (1, 3),
    "delta_rule": (3,),
    "gated_delta_rule": (3, 4),
    "kda": (3, 4),
    "rwkv6": (1, 3),
    "rwkv7": (1, 2, 5),
}


def still(op: str, inputs: tuple[Tensor, ...], real: Tensor | None) -> tuple[Tensor, ...]:
    """The inputs (B, T, ...) of an op, such that its state stays as it is where `real` (B, T) is false."""
    if real is None:
        return inputs
    return tuple(_zeroed(t, real) if i in _STILL[op] else t for i, t in enumerate(inputs))


def no_step(dt: Tensor, real: Tensor | None, *, softplus: bool) -> Tensor:
    """Mamba's step sizes (B, T, ...) before softplus, such that none is made where `real` is false."""
    if real is None:
        return dt
    return dt.masked_fill(~_widen(real, dt), _NO_STEP if softplus else 0.0)


def limited_steps(
    dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float], real: Tensor | None
) -> tuple[Tensor, Tensor | None, bool, tuple[float, float]]:
    """Mamba-2's step sizes (B, T, H), bias (H,), softplus and limits, such that padding makes no step."""
    if real is None or limit[0] <= 0:
        return no_step(dt, real, softplus=softplus), bias, softplus, limit
    dt = dt.to(state_dtype(dt, bias))  # the limit would make a step of none
    dt = dt if bias is None else dt + bias
    dt = (F.softplus(dt) if softplus else dt).clamp(*limit)
    return _zeroed(dt, real), None, False, NO_LIMIT


def last_real(x: Tensor, real: Tensor | None) -> Tensor:
    """The last real input (B, D) of each row of x (B, T, D), in memory of its own."""
    if real is None:
        return x[:, -1].clone()  # a view would keep all of x
    return x[torch.arange(len(x), device=x.device), real.sum(1) - 1]


def _zeroed(tensor: Tensor, real: Tensor) -> Tensor:
    return tensor.masked_fill(~_widen(real, tensor), 0)


def _widen(real: Tensor, tensor: Tensor) -> Tensor:
    """`real` (B, T) against (B, T, ...)."""
    return real.view(*real.shape, *[1] * (tensor.ndim - 2))
