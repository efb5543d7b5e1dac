"""Cross-entropy in Triton: logits are read where they are, and their gradient takes their place.

In 16 bits PyTorch's own makes copies in float32 of what is the largest tensor of most models.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
BLOCK, WARPS = 4096, 8


@triton.jit
def _entropy_forward(
    logits_ptr, target_ptr, loss_ptr, level_ptr, V, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):
    """Loss of each row, and the logarithm of its sum of exponentials."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits_ptr += row * V
    highest, total = tl.full((), -3.4e38, tl.float32), tl.zeros((), tl.float32)  # finite: exp(-inf + inf)
    for first in range(0, V, BLOCK):
        x = tl.load(logits_ptr + first + i, mask=first + i < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), axis=0)
        highest = higher
    level = highest + tl.log(total)
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < V)
    chosen = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(target == IGNORED, 0.0, level - chosen))
    tl.store(level_ptr + row, level)


@triton.jit
def _entropy_backward(
    logits_ptr, target_ptr, level_ptr, dloss_ptr, V, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):
    """Overwrite the logits by the gradient of the loss's sum, times `dloss`."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits_ptr += row * V
    target, level = tl.load(target_ptr + row), tl.load(level_ptr + row)
    scale = tl.where(target == IGNORED, 0.0, tl.load(dloss_ptr))
    for first in range(0, V, BLOCK):
        at = logits_ptr + first + i
        x = tl.load(at, mask=first + i < V, other=0.0).to(tl.float32)
        gradient = scale * (tl.exp(x - level) - tl.where(first + i == target, 1.0, 0.0))
        tl.store(at, gradient.to(at.dtype.element_ty), mask=first + i < V)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of the cross-entropy, float32; backward overwrites the logits.

    Args:
        logits: (M, V), contiguous.
        targets: (M,), contiguous; -100 is ignored; other ids outside the vocabulary make the loss NaN.
    """
    loss: Tensor = _CrossEntropy.apply(logits, targets)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses, levels = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        _entropy_forward[(len(logits),)](
            logits, targets, losses, levels, logits.shape[1], IGNORED, BLOCK, num_warps=WARPS
        )
        ctx.save_for_backward(logits, targets, levels)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        logits, targets, levels = ctx.saved_tensors
        _entropy_backward[(len(logits),)](
            logits, targets, levels, dloss, logits.shape[1], IGNORED, BLOCK, num_warps=WARPS
        )
        torch.autograd.graph.increment_version(logits)
        return logits, None
