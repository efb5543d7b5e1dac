"""The short causal convolution in Triton, with its activation and its tail, forward and backward.

A program walks over STEPS steps of one row for CHANNELS channels side by side, with the last W - 1 inputs
in registers, so that each input is read once: `y_t = sum_w weight[:, w] x_{t - (W - 1) + w}`. Only the inputs
are kept for backward, which convolves them again and hands each gradient on W - 1 steps later.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longroll.ops._common import strides
from longroll.ops.gpu._math import sigmoid
from longroll.ops.gpu._sums import column_sums

TILE, CHANNELS = 8, 256
FORWARD = {"STEPS": 16, "TILE": TILE, "CHANNELS": CHANNELS, "num_warps": 4}
BACKWARD = {"STEPS": 128, "TILE": TILE, "CHANNELS": CHANNELS, "num_warps": 4}
"""Sizes of a program: TILE steps are unrolled, so that their inputs are read together; nothing is tuned."""


@triton.jit
def _conv_tail(x_ptr, past_ptr, weight_ptr, bias_ptr, first, d, in_d, xt, xd, pt, pd,
          W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAST: tl.constexpr):  # fmt: skip
    """The W - 1 inputs before x_ptr's (step `first`), oldest first, the weights in order, and the bias."""
    inputs, weights = (), ()
    for w in tl.static_range(W - 1):
        t = first - (W - 1) + w
        x_at = x_ptr + (w - (W - 1)) * xt + d * xd
        x = tl.load(x_at, mask=in_d & (t + 0 * d >= 0), other=0.0).to(tl.float32)
        if HAS_PAST:
            x += tl.load(past_ptr + (t + W - 1) * pt + d * pd, mask=in_d & (t + 0 * d < 0), other=0.0)
        inputs = inputs + (x,)  # type: ignore  # noqa: RUF005 (Triton knows no unpacking)
    for w in tl.static_range(W):
        weights = weights + (tl.load(weight_ptr + d * W + w, mask=in_d, other=0.0),)  # type: ignore  # noqa: RUF005
    bias = tl.zeros(d.shape, tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=in_d, other=0.0)
    return inputs, weights, bias


@triton.jit
def _read(ptr, first, step, T, stride_t, stride_d, d, in_d, TILE: tl.constexpr):
    """TILE steps, read together: a load that follows a store waits for it."""
    found = ()
    for j in tl.static_range(TILE):
        at = ptr + (step + j) * stride_t + d * stride_d
        found = found + (tl.load(at, mask=in_d & (first + step + j + 0 * d < T), other=0.0),)  # type: ignore  # noqa: RUF005
    return found


@triton.jit
def _conv_forward(
    x_ptr, past_ptr, weight_ptr, bias_ptr, y_ptr, T, D_SIZE, xb, xt, xd, pb, pt, pd,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAST: tl.constexpr, SILU: tl.constexpr,
    STEPS: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * STEPS
    far = first.to(tl.int64)  # a row may hold more than 2^31 numbers
    d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    in_d = d < D_SIZE
    x_ptr += row * xb + far * xt
    y_ptr += (row * T + far) * D_SIZE
    past_ptr += row * pb
    x, weight, bias = _conv_tail(
        x_ptr, past_ptr, weight_ptr, bias_ptr, first, d, in_d, xt, xd, pt, pd, W, HAS_BIAS, HAS_PAST
    )
    for i in range(0, STEPS // TILE):
        read = _read(x_ptr, first, i * TILE, T, xt, xd, d, in_d, TILE)
        for j in tl.static_range(TILE):
            step = i * TILE + j
            t = first + step
            inside = in_d & (t + 0 * d < T)
            x = x + (read[j].to(tl.float32),)  # noqa: RUF005
            y = bias
            for w in tl.static_range(W):
                y += weight[w] * x[w]
            x = x[1:]
            if SILU:
                y *= sigmoid(y)
            tl.store(y_ptr + step * D_SIZE + d, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _conv_backward(
    x_ptr, past_ptr, weight_ptr, bias_ptr, dy_ptr, dx_ptr, dpast_ptr, sums_ptr,
    T, D_SIZE, xb, xt, xd, pb, pt, pd, yb, yt, yd, dxb, dxt,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAST: tl.constexpr, SILU: tl.constexpr,
    STEPS: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx, dpast (B, W - 1, D) float32; of each program dweight (D, W) and dbias (D), one after the other.

    An input's gradient is known W - 1 steps after it: of its steps a program owns all but the last W - 1.
    """
    own: tl.constexpr = STEPS - (W - 1)
    row, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * own
    far = first.to(tl.int64)
    d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    in_d = d < D_SIZE
    x_ptr += row * xb + far * xt
    dy_ptr += row * yb + far * yt
    dx_ptr += row * dxb + far * dxt
    past_ptr += row * pb
    dpast_ptr += row * (W - 1) * D_SIZE
    x, weight, bias = _conv_tail(
        x_ptr, past_ptr, weight_ptr, bias_ptr, first, d, in_d, xt, xd, pt, pd, W, HAS_BIAS, HAS_PAST
    )
    zero = tl.zeros((CHANNELS,), tl.float32)
    dsum, dweight, dbias = (), (), zero  # of the last W - 1 sums; of the weights
    for w in tl.static_range(W):
        dweight = dweight + (zero,)  # type: ignore  # noqa: RUF005
        if w > 0:
            dsum = dsum + (zero,)  # type: ignore  # noqa: RUF005
    for i in range(0, STEPS // TILE):
        read = _read(x_ptr, first, i * TILE, T, xt, xd, d, in_d, TILE)
        asked = _read(dy_ptr, first, i * TILE, T, yt, yd, d, in_d, TILE)
        for j in tl.static_range(TILE):
            step = i * TILE + j
            t = first + step
            x = x + (read[j].to(tl.float32),)  # noqa: RUF005
            ds = asked[j].to(tl.float32)
            if SILU:
                y = bias
                for w in tl.static_range(W):
                    y += weight[w] * x[w]
                gate = sigmoid(y)
                ds *= gate * (1.0 + y * (1.0 - gate))
            dsum = dsum + (ds,)  # type: ignore  # noqa: RUF005
            owned = tl.where(t < first + own, ds, 0.0)
            dbias += owned
            dx, sums = zero, ()
            for w in tl.static_range(W):
                dx += weight[w] * dsum[W - 1 - w]
                sums = sums + (dweight[w] + owned * x[w],)  # type: ignore  # noqa: RUF005
            x, dsum, dweight = x[1:], dsum[1:], sums
            mask = in_d & (step + 0 * d >= W - 1) & (t + 0 * d < T + W - 1)
            tl.store(dx_ptr + (step - (W - 1)) * dxt + d, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if HAS_PAST and j < W - 1:
                tl.store(dpast_ptr + t * D_SIZE + d, dx, mask=in_d & (t + 0 * d < W - 1))
    sums_ptr += (row * tl.num_programs(0) + tl.program_id(0)) * D_SIZE * (W + 1)
    for w in tl.static_range(W):
        tl.store(sums_ptr + d * W + w, dweight[w], mask=in_d)
    tl.store(sums_ptr + D_SIZE * W + d, dbias, mask=in_d)


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, silu: bool) -> Tensor:
    """Return y (B, T, D) in x's dtype.

    Args:
        x: (B, T, D).
        weight: (D, W) float32.
        bias: (D,) float32.
        past: the W - 1 inputs before x, (B, W - 1, D) float32; zero when None.
        silu: apply it to the output.
    """
    y: Tensor = _Conv.apply(x, weight, bias, past, silu)
    return y


def _arguments(weight: Tensor, bias: Tensor | None, past: Tensor | None) -> tuple[Tensor, ...]:
    """Return past, weight and bias; an absent one by any pointer, which is not read."""
    weight = weight.contiguous()
    return weight if past is None else past, weight, weight if bias is None else bias.contiguous()


def _grid(batch: int, time: int, channels: int, steps: int) -> tuple[int, int, int]:
    return triton.cdiv(time, steps), batch, triton.cdiv(channels, CHANNELS)  # only the first may be large


def _options(weight: Tensor, bias: Tensor | None, past: Tensor | None, silu: bool) -> dict[str, Any]:
    return {
        "W": weight.shape[1], "HAS_BIAS": bias is not None, "HAS_PAST": past is not None, "SILU": silu,
    }  # fmt: skip


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, silu: bool) -> Tensor:
    """As `short_conv`, without a gradient."""
    batch, time, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _conv_forward[_grid(batch, time, channels, FORWARD["STEPS"])](
        x, *_arguments(weight, bias, past), y, time, channels, *strides(x, past),
        **_options(weight, bias, past, silu), **FORWARD,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, silu: bool, dx: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return gradients of weight, bias and past; that of x is written into `dx`, whose last axis is
    contiguous.
    """
    batch, time, channels = x.shape
    tail = weight.shape[1] - 1
    grid = _grid(batch, time, channels, BACKWARD["STEPS"] - tail)
    # programs write sums of their own: added in any order, they would differ
    sums = weight.new_empty(1, grid[0] * batch, channels * (tail + 2))
    dpast = None if past is None else weight.new_empty(batch, tail, channels)
    _conv_backward[grid](
        x, *_arguments(weight, bias, past), dy, dx, weight if dpast is None else dpast, sums,
        time, channels, *strides(x, past), *dy.stride(), *dx.stride()[:2],
        **_options(weight, bias, past, silu), **BACKWARD,
    )  # fmt: skip
    dweight, dbias = column_sums(sums)[0].split((weight.numel(), channels))
    return dweight.view_as(weight), None if bias is None else dbias, dpast


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, silu: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, past)
        ctx.silu = silu
        return forward(x, weight, bias, past, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, past = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return dx, *backward(dy, x, weight, bias, past, ctx.silu, dx), None
