"""What a Mamba-2 block does between its projections, as one step of autograd.

Convolution, recurrence and gated norm by the kernels beside this file, as in mamba-ssm's
`mamba_split_conv1d_scan_combined`, but with states. The gradients of gate, x, B, C and dt are written where
the projection's backward wants them, side by side, instead of being joined by copies. The convolution and the
states of the chunks are computed again in backward unless there is room to keep them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longroll.ops._common import no_autocast
from longroll.ops.gpu import rms_norm, short_conv, ssd


class Shape(NamedTuple):
    """Sizes and settings of a block.

    Args:
        heads: H.
        headdim: P.
        groups: groups of heads that share B and C, G.
        d_state: N.
        dt_limit: smallest and largest step size.
        eps: epsilon of the norm.
        group_size: channels that share a mean in the norm.
        dtype: the dtype of the result.
        keep: whether forward keeps `kept_bytes` for backward, which computes them again otherwise.
    """

    heads: int
    headdim: int
    groups: int
    d_state: int
    dt_limit: tuple[float, float]
    eps: float
    group_size: int
    dtype: torch.dtype
    keep: bool = False

    def kept_bytes(self, projected: Tensor) -> int:
        """Return the bytes of the convolution's outputs and of the states that the chunks of time meet."""
        batch, time, _ = projected.shape
        channels = self.heads * self.headdim
        states = -(-time // ssd.CHUNK) * channels * self.d_state
        convolved = time * (channels + 2 * self.groups * self.d_state)
        return batch * (states + convolved) * projected.element_size()

    def split(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Return gate (B, T, H P), what is convolved (B, T, H P + 2 G N), and dt (B, T, H)."""
        channels, shared = self.heads * self.headdim, self.groups * self.d_state
        parts: tuple[Tensor, ...] = projected.split((channels, channels + 2 * shared, self.heads), dim=-1)
        return parts

    def split_convolved(self, convolved: Tensor) -> tuple[Tensor, ...]:
        """Return x (B, T, H, P), B and C (B, T, G, N)."""
        shared = self.groups * self.d_state
        x, B, C = convolved.split((self.heads * self.headdim, shared, shared), dim=-1)
        B, C = (t.unflatten(-1, (self.groups, self.d_state)) for t in (B, C))
        return x.unflatten(-1, (self.heads, self.headdim)), B, C


def mamba2(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    past: Tensor | None,
    state: Tensor | None,
    shape: Shape,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a block's inside.

    Args:
        projected: gate, x, B, C and dt, (B, T, 2 H P + 2 G N + H).
        conv_weight: (H P + 2 G N, W) float32.
        conv_bias: (H P + 2 G N,) float32.
        dt_bias: (H,) float32, added to dt before softplus.
        A_log: (H,) float32; a state decays at the rate -exp(A_log).
        D: (H,) float32.
        norm_weight: (H P,).
        past: the W - 1 inputs of the convolution before the first, (B, W - 1, H P + 2 G N) float32.
        state: initial state, (B, H, P, N) float32; zero when None, as `past`.
        shape: sizes and settings.
        out: (B, T, 1), true at padding, which makes no step; None: there is none.

    Returns:
        The normed output (B, T, H P) and the final state.
    """
    found: tuple[Tensor, Tensor] = _Mamba2.apply(
        projected, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, past, state, shape, out
    )
    return found


class _Mamba2(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        dt_bias: Tensor,
        A_log: Tensor,
        D: Tensor,
        norm_weight: Tensor,
        past: Tensor | None,
        state: Tensor | None,
        shape: Shape,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        with no_autocast(projected):
            gate, convolves, dt = shape.split(projected)
            convolved = short_conv.forward(convolves, conv_weight, conv_bias, past, True)
            x, B, C = shape.split_convolved(convolved)
            steps = ssd.Steps(dt, dt_bias, True, shape.dt_limit, out)
            sizes, A = steps.sizes(A_log, logs=True)
            y, final, starts = ssd.forward(x, sizes, A, B, C, D, state, keep=shape.keep)
            normed, rstd, _ = rms_norm.forward(
                y.flatten(-2), norm_weight, gate, shape.eps, shape.group_size, shape.dtype
            )
        ctx.save_for_backward(
            projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, past, state, y, rstd, out,
            convolved if shape.keep else None, sizes, starts,
        )  # fmt: skip
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        return normed, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnormed: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        (
            projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, past, state, y, rstd, out,
            convolved, sizes, starts,
        ) = ctx.saved_tensors  # fmt: skip
        shape: Shape = ctx.shape
        if dnormed is None:
            dnormed = torch.zeros(y.flatten(-2).shape, dtype=shape.dtype, device=y.device)
        with no_autocast(projected):
            gate, convolves, dt = shape.split(projected)
            dprojected = torch.empty_like(projected, memory_format=torch.contiguous_format)
            dgate, dconvolves, ddt = shape.split(dprojected)
            dy, dnorm_weight = rms_norm.backward(dnormed, y.flatten(-2), norm_weight, gate, rstd, dgate)
            if convolved is None:
                convolved = short_conv.forward(convolves, conv_weight, conv_bias, past, True)
            x, B, C = shape.split_convolved(convolved)
            dconvolved = torch.empty_like(convolved)
            dx, dB, dC = shape.split_convolved(dconvolved)
            steps = ssd.Steps(dt, dt_bias, True, shape.dt_limit, out)
            ddt_bias, dA_log, dD, dstate = ssd.backward(
                dy.view_as(y), dfinal, (x, A, B, C, D), steps, sizes, state, starts, (dx, ddt, dB, dC),
                of_state=ctx.needs_input_grad[8], logs=True,
            )  # fmt: skip
            dweight, dbias, dpast = short_conv.backward(
                dconvolved, convolves, conv_weight, conv_bias, past, True, dconvolves
            )
        return (
            dprojected, dweight, dbias, ddt_bias, dA_log, dD, dnorm_weight, dpast, dstate, None, None,
        )  # fmt: skip
