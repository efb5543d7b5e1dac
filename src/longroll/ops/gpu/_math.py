"""What Triton spends more instructions on than these kernels need."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

if torch.version.cuda is not None and not triton.knobs.runtime.interpret:

    @triton.jit
    def reciprocal(x):
        """1 / x of float32 in one instruction, to 2 units in the last place; 0 beyond 2^126."""
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

else:

    @triton.jit
    def reciprocal(x):
        """1 / x of float32."""
        return 1.0 / x


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) of float32."""
    return reciprocal(1.0 + tl.exp2(x * -1.4426950408889634))
