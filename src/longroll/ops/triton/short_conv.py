"""The short causal convolution in Triton, with its activation and its tail, forward and backward.

Inputs are numbered with their tail: `s = t + W - 1`, so that `y_t = sum_w weight[:, w] input_{t + w}`. Only
the inputs are kept for backward, which convolves them again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longroll.ops._common import no_autocast

TIMES, CHANNELS, WARPS = 32, 64, 4
TILES = 4  # of TIMES that a program of backward sums weights' gradients over


@triton.jit
def _input(x_ptr, past_ptr, s, d, mask_d, T, D_SIZE, xt, xd, REACH: tl.constexpr, HAS_PAST: tl.constexpr):
    """Inputs s (TIMES,) of channels d (CHANNELS,) in float32; zero before the tail and after the end."""
    t = s - REACH
    inside = ((t >= 0) & (t < T))[:, None] & mask_d
    x = tl.load(x_ptr + t[:, None] * xt + d[None, :] * xd, mask=inside, other=0.0).to(tl.float32)
    if HAS_PAST:
        in_past = ((s >= 0) & (s < REACH))[:, None] & mask_d
        x += tl.load(past_ptr + s[:, None] * D_SIZE + d[None, :], mask=in_past, other=0.0).to(tl.float32)
    return x


@triton.jit
def _convolved(
    x_ptr, past_ptr, weight_ptr, bias_ptr, t, d, in_d, T, D_SIZE, xt, xd,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAST: tl.constexpr,
):  # fmt: skip
    """What the activation is given at times t."""
    mask_d = in_d[None, :]
    total = tl.zeros((t.shape[0], d.shape[0]), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + d, mask=in_d, other=0.0)[None, :]
    for w in tl.static_range(W):
        weight = tl.load(weight_ptr + d * W + w, mask=in_d, other=0.0)
        total += weight[None, :] * _input(
            x_ptr, past_ptr, t + w, d, mask_d, T, D_SIZE, xt, xd, W - 1, HAS_PAST
        )
    return total


@triton.jit
def _forward(
    x_ptr, past_ptr, weight_ptr, bias_ptr, y_ptr, T, D_SIZE, xb, xt, xd,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAST: tl.constexpr, SILU: tl.constexpr,
    TIMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1).to(tl.int64) * TIMES + tl.arange(0, TIMES)
    d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    in_d = d < D_SIZE
    y = _convolved(
        x_ptr + row * xb, past_ptr + row * (W - 1) * D_SIZE, weight_ptr, bias_ptr, t, d, in_d,
        T, D_SIZE, xt, xd, W, HAS_BIAS, HAS_PAST,
    )  # fmt: skip
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    at = row * T * D_SIZE + t[:, None] * D_SIZE + d[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(t < T)[:, None] & in_d[None, :])


@triton.jit
def _backward(
    x_ptr, past_ptr, weight_ptr, bias_ptr, dy_ptr, dsum_ptr, dweight_ptr, dbias_ptr,
    T, D_SIZE, xb, xt, xd, yb, yt, yd,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAST: tl.constexpr, SILU: tl.constexpr,
    LAGS: tl.constexpr, TIMES: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradient of what the activation was given (B, T, D); dweight (D, W) and dbias (D,) are added to."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    in_d = d < D_SIZE
    mask_d = in_d[None, :]
    x_ptr += row * xb
    past_ptr += row * (W - 1) * D_SIZE
    lag = tl.arange(0, LAGS)
    dweight = tl.zeros((LAGS, CHANNELS), tl.float32)
    dbias = tl.zeros((CHANNELS,), tl.float32)
    for i in range(0, TILES):
        t = (tl.program_id(1).to(tl.int64) * TILES + i) * TIMES + tl.arange(0, TIMES)
        inside = (t < T)[:, None] & mask_d
        dy_at = dy_ptr + row * yb + t[:, None] * yt + d[None, :] * yd
        dsum = tl.load(dy_at, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            y = _convolved(
                x_ptr, past_ptr, weight_ptr, bias_ptr, t, d, in_d, T, D_SIZE, xt, xd, W, HAS_BIAS, HAS_PAST
            )
            gate = 1.0 / (1.0 + tl.exp(-y))
            dsum *= gate * (1.0 + y * (1.0 - gate))
            at = row * T * D_SIZE + t[:, None] * D_SIZE + d[None, :]
            tl.store(dsum_ptr + at, dsum.to(dsum_ptr.dtype.element_ty), mask=inside)
        for w in tl.static_range(W):
            x = _input(x_ptr, past_ptr, t + w, d, mask_d, T, D_SIZE, xt, xd, W - 1, HAS_PAST)
            dweight += tl.where(lag[:, None] == w, tl.sum(dsum * x, axis=0)[None, :], 0.0)
        dbias += tl.sum(dsum, axis=0)
    at = d[None, :] * W + lag[:, None]
    tl.atomic_add(dweight_ptr + at, dweight, mask=(lag < W)[:, None] & mask_d, sem="relaxed")
    if HAS_BIAS:
        tl.atomic_add(dbias_ptr + d, dbias, mask=in_d, sem="relaxed")


@triton.jit
def _spread(
    dsum_ptr, weight_ptr, dx_ptr, dpast_ptr, T, D_SIZE, sb, st, sd,
    W: tl.constexpr, HAS_PAST: tl.constexpr, TIMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of inputs s from those of the sums that they entered: dx and dpast, contiguous."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1).to(tl.int64) * TIMES + tl.arange(0, TIMES)
    d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    in_d = d < D_SIZE
    dx = tl.zeros((TIMES, CHANNELS), tl.float32)
    for w in tl.static_range(W):
        t = s - w
        inside = ((t >= 0) & (t < T))[:, None] & in_d[None, :]
        at = dsum_ptr + row * sb + t[:, None] * st + d[None, :] * sd
        weight = tl.load(weight_ptr + d * W + w, mask=in_d, other=0.0)
        dx += weight[None, :] * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    t = s - (W - 1)
    at = row * T * D_SIZE + t[:, None] * D_SIZE + d[None, :]
    inside = ((t >= 0) & (t < T))[:, None] & in_d[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if HAS_PAST:
        at = (row * (W - 1) + s[:, None]) * D_SIZE + d[None, :]
        tl.store(dpast_ptr + at, dx, mask=(s < W - 1)[:, None] & in_d[None, :])


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, silu: bool) -> Tensor:
    """y (B, T, D) in x's dtype.

    Args:
        x: (B, T, D).
        weight: (D, W) float32.
        bias: (D,) float32.
        past: the W - 1 inputs before x, (B, W - 1, D) float32; zero when None.
        silu: apply it to the output.
    """
    return _Conv.apply(x, weight, bias, past, silu)


def _options(weight: Tensor, bias: Tensor | None, past: Tensor | None, silu: bool) -> dict:
    return {
        "W": weight.shape[1], "HAS_BIAS": bias is not None, "HAS_PAST": past is not None, "SILU": silu,
        "TIMES": TIMES, "CHANNELS": CHANNELS, "num_warps": WARPS,
    }  # fmt: skip


def _contiguous(weight: Tensor, bias: Tensor | None, past: Tensor | None) -> tuple[Tensor, ...]:
    """past, weight and bias; an absent one by any pointer, which is not read."""
    weight = weight.contiguous()
    absent = (weight if t is None else t.contiguous() for t in (past, bias))
    past, bias = absent
    return past, weight, bias


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, past, silu):
        batch, time, channels = x.shape
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _forward[(batch, triton.cdiv(time, TIMES), triton.cdiv(channels, CHANNELS))](
            x, *_contiguous(weight, bias, past), y, time, channels, *x.stride(),
            **_options(weight, bias, past, silu),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, past)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, past = ctx.saved_tensors
        batch, time, channels = x.shape
        reach = weight.shape[1] - 1
        tiles = {"TIMES": TIMES, "CHANNELS": CHANNELS, "num_warps": WARPS}
        channel_blocks = triton.cdiv(channels, CHANNELS)
        with no_autocast(x):
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            dpast = weight.new_empty(batch, reach, channels)
            dweight, dbias = torch.zeros_like(weight).contiguous(), weight.new_zeros(channels)
            dsum = torch.empty_like(dx) if ctx.silu else dy
            _backward[(batch, triton.cdiv(time, TIMES * TILES), channel_blocks)](
                x, *_contiguous(weight, bias, past), dy, dsum, dweight, dbias,
                time, channels, *x.stride(), *dy.stride(), **_options(weight, bias, past, ctx.silu),
                LAGS=triton.next_power_of_2(reach + 1), TILES=TILES,
            )  # fmt: skip
            _spread[(batch, triton.cdiv(time + reach, TIMES), channel_blocks)](
                dsum, weight.contiguous(), dx, dpast, time, channels, *dsum.stride(),
                W=reach + 1, HAS_PAST=past is not None, **tiles,
            )  # fmt: skip
        return dx, dweight, None if bias is None else dbias, None if past is None else dpast, None
