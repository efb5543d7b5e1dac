"""A linear layer in float32 on a CPU, by oneDNN's product.

On a Zen 4 core oneDNN reaches 95 to 107 GFLOP/s in the shapes of Mamba's projections, where PyTorch's usual
product reaches 68 to 97.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longroll.ops._common import no_autocast

LEAST, ROWS = 1 << 19, 32
"""Numbers of a weight, and rows of an input, from which oneDNN's start is worth it."""


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Return whether `linear` takes these tensors and is expected to gain: float32, and a large weight."""
    if type(x) is not Tensor or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    exact = x.dtype == weight.dtype == torch.float32
    return exact and weight.numel() >= LEAST and x.shape[:-1].numel() >= ROWS and _onednn()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T`, with gradients; double backward is not supported.

    Args:
        x: (..., D) float32.
        weight: (E, D) float32.
    """
    y: Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with no_autocast(x):
            return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dweight = None
        with no_autocast(x):
            if ctx.needs_input_grad[0]:
                dx = _product(dy, weight.t())
            if ctx.needs_input_grad[1]:
                dweight = _product(dy.flatten(0, -2).t(), x.flatten(0, -2).t())
        return dx, dweight


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply (..., D) by the transpose of (E, D)."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return found


def _onednn() -> bool:
    """Return whether PyTorch has oneDNN's product, and vectors of 512 bits, for which it was measured."""
    switch: Any = torch.backends.mkldnn
    wide = switch.is_available() and switch.enabled and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and hasattr(torch.ops.mkldnn, "_linear_pointwise")
