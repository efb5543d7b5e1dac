"""A step of AdamW of one tensor in Triton, in one pass that keeps the GPU's memory busy.

PyTorch's fused AdamW launches 320 programs at a time, fewer than two rounds of a large GPU, and reaches three
quarters of the bandwidth.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4


@triton.jit
def _adamw(
    p_ptr, g_ptr, m_ptr, v_ptr, corrections_ptr, skip_ptr, SIZE, lr, beta1, beta2, eps, decay,
    HAS_SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Corrections are 1 - beta1^step and the root of 1 - beta2^step; nothing moves where `skip` is not 0."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if HAS_SKIP:
        SIZE = tl.where(tl.load(skip_ptr) == 0.0, SIZE, 0)
    inside = i < SIZE
    p, g = tl.load(p_ptr + i, mask=inside, other=0.0), tl.load(g_ptr + i, mask=inside, other=0.0)
    m, v = tl.load(m_ptr + i, mask=inside, other=0.0), tl.load(v_ptr + i, mask=inside, other=0.0)
    m += (g - m) * (1.0 - beta1)
    v = v * beta2 + g * g * (1.0 - beta2)
    denominator = tl.sqrt(v) / tl.load(corrections_ptr + 1) + eps
    p = p * (1.0 - lr * decay) - lr / tl.load(corrections_ptr) * (m / denominator)
    tl.store(p_ptr + i, p, mask=inside)
    tl.store(m_ptr + i, m, mask=inside)
    tl.store(v_ptr + i, v, mask=inside)


def adamw(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], corrections: Tensor, skip: Tensor | None, **options: Any
) -> None:
    """Move a parameter and its moments.

    Args:
        tensors: the parameter, its gradient, the first and the second moment; float32, contiguous, alike.
        corrections: (2,) float32, as above.
        skip: a float32 scalar; nothing moves unless it is 0.
        options: `lr`, `beta1`, `beta2`, `eps` and `decay`.
    """
    size = tensors[0].numel()
    _adamw[(triton.cdiv(size, BLOCK),)](
        *tensors, corrections, corrections if skip is None else skip, size, **options,
        HAS_SKIP=skip is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def takes(tensors: tuple[Tensor, ...]) -> bool:
    """Return whether `adamw` takes these."""
    return all(t.is_cuda and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
