"""A linear layer whose weight's gradient is summed and written in float32, without a copy in 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_WIDE = torch.version.cuda is not None and "dtype" in torch.ops.aten.mm.overloads()
"""Whether this PyTorch writes products of 16 bits in float32."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `x @ weight.T + bias` as autocast to `dtype` (16 bits) computes it.

    Args:
        x: (..., D).
        weight: (E, D) float32.
        bias: (E,).
        dtype: precision of the products and of the result.
    """
    y: Tensor = _Linear.apply(x, weight, dtype)
    return y if bias is None else y + bias.to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            low, narrow = x.to(dtype), weight.to(dtype)
            ctx.save_for_backward(low, narrow)
            ctx.dtype = x.dtype
            return torch.nn.functional.linear(low, narrow)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dweight = None
        with torch.autocast(x.device.type, enabled=False):
            dy = dy.to(weight.dtype)
            if ctx.needs_input_grad[0]:
                dx = (dy @ weight).to(ctx.dtype)
            if ctx.needs_input_grad[1]:
                rows, drows = x.flatten(0, -2), dy.flatten(0, -2)
                if _WIDE:
                    dweight = torch.mm(drows.T, rows, out_dtype=torch.float32)
                else:
                    dweight = (drows.T @ rows).float()
        return dx, dweight, None
