"""Mamba-2's recurrence (state space duality) in Triton, forward and backward, with initial and final state.

Time is cut into chunks of `CHUNK` steps. `_ssd_walk` carries a state over the chunks, for each head and block
of the state by itself, and writes down the one that each chunk meets; then all chunks run side by side.
Nothing but the inputs is kept for backward, which walks again. Products are made in the precision of x, which
is also that of the states written down, since they are only read by products; sums, decays and the carried
states are float32. A program runs `HEADS` heads that share B and C, whose gradients it sums.
The chunked form is that of Mamba-2's paper (Dao and Gu 2024, section 6).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longroll.ops._backend import WIDEST_AT_ONCE, shared_memory
from longroll.ops._common import LOG2_E as _LOG2_E
from longroll.ops._common import NO_LIMIT, no_autocast
from longroll.ops.gpu._sums import column_sums
from longroll.ops.gpu.selective_scan import _step_size

CHUNK = 64
WALK = {"P": 64, "N": 128, "AT_ONCE": 1, "num_warps": 8, "num_stages": 3}
"""Largest block of a state that a program of `_ssd_walk` carries, and how it runs: pinned, not tuned."""
WALK_64 = {"N": 64, "AT_ONCE": 2, "num_warps": 4}
OF_X_64 = {"EARLY": False, "maxnreg": 168}
"""What differs for heads of 64 in 16 bits. Three programs of `OF_X` share a multiprocessor then."""
STEPS = {"HEADS": 32, "num_warps": 4}
OUTPUTS = {"HEADS": 16, "num_warps": 4, "num_stages": 3}
OF_X = {"HEADS": 1, "EARLY": True, "num_warps": 4, "num_stages": 1}
OF_B_AND_C = {"HEADS": 32, "N": 64, "num_warps": 4, "num_stages": 3}
NARROW = 64
"""Triton 3.6 and 3.7 miscompile products of narrower tiles by four warps: triton issue 11366."""
FEWEST = 256  # programs that keep a GPU busy
LOG2_E = tl.constexpr(_LOG2_E)


@triton.jit
def _step_sizes(
    dt_ptr, bias_ptr, out_ptr, row, t, h, T, H, db, dt_stride, dh, low, high,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, HAS_OUT: tl.constexpr,
):  # fmt: skip
    """Step sizes (t, h), and their derivatives by what is stored; both are 0 at padding and past the end."""
    within = (t < T)[:, None] & (h < H)[None, :]
    raw = tl.load(dt_ptr + row * db + t[:, None] * dt_stride + h[None, :] * dh, mask=within, other=0.0)
    raw = raw.to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + h, mask=h < H, other=0.0)[None, :]
    size, slope = _step_size(raw, SOFTPLUS)
    if LIMITED:
        slope = tl.where((size >= low) & (size <= high), slope, 0.0)
        size = tl.minimum(tl.maximum(size, low), high)
    if HAS_OUT:
        within = within & (tl.load(out_ptr + row * T + t, mask=t < T, other=1) == 0)[:, None]
    return tl.where(within, size, 0.0), tl.where(within, slope, 0.0)


@triton.jit
def _ssd_steps(
    dt_ptr, bias_ptr, out_ptr, A_ptr, sizes_ptr, levels_ptr, rates_ptr,
    T, H, CHUNKS, db, dt_stride, dh, low, high,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, HAS_OUT: tl.constexpr,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, LOGS: tl.constexpr,
):  # fmt: skip
    """Step sizes (B, H, CHUNKS CHUNK) of dt (B, T, H), and sums of dt A within chunks, in powers of 2.

    With LOGS the A that is given is log(-A), and A is written into `rates`.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    t, h = chunk * CHUNK + tl.arange(0, CHUNK), tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    sizes, _slopes = _step_sizes(
        dt_ptr, bias_ptr, out_ptr, row, t, h, T, H, db, dt_stride, dh, low, high,
        HAS_BIAS, SOFTPLUS, LIMITED, HAS_OUT,
    )  # fmt: skip
    to = (row * H + h[None, :]) * CHUNKS * CHUNK + t[:, None]
    mask = (h < H)[None, :] & (t >= 0)[:, None]
    tl.store(sizes_ptr + to, sizes, mask=mask)
    A = tl.load(A_ptr + h, mask=h < H, other=0.0)
    if LOGS:
        A = -tl.exp(A)
        if row + chunk == 0:
            tl.store(rates_ptr + h, A, mask=h < H)
    tl.store(levels_ptr + to, tl.cumsum(sizes * A[None, :] * LOG2_E, axis=0), mask=mask)


@triton.jit
def _ssd_steps_backward(
    dt_ptr, bias_ptr, out_ptr, dsizes_ptr, ddt_ptr, dbias_ptr, T, H, CHUNKS, db, dt_stride, dh, low, high,
    ddb, ddt, ddh,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, HAS_OUT: tl.constexpr,
    CHUNK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """ddt, of any strides, and the sum of each chunk's (B, CHUNKS, H)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    t, h = chunk * CHUNK + tl.arange(0, CHUNK), tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    _sizes, slopes = _step_sizes(
        dt_ptr, bias_ptr, out_ptr, row, t, h, T, H, db, dt_stride, dh, low, high,
        HAS_BIAS, SOFTPLUS, LIMITED, HAS_OUT,
    )  # fmt: skip
    within = (t < T)[:, None] & (h < H)[None, :]
    at = (row * H + h[None, :]) * CHUNKS * CHUNK + t[:, None]
    raw = tl.load(dsizes_ptr + at, mask=within, other=0.0) * slopes
    to = ddt_ptr + row * ddb + t[:, None] * ddt + h[None, :] * ddh
    tl.store(to, raw.to(ddt_ptr.dtype.element_ty), mask=within)
    if HAS_BIAS:
        tl.store(dbias_ptr + (row * CHUNKS + chunk) * H + h, tl.sum(raw, axis=0), mask=h < H)


@triton.jit
def _decays(sizes_ptr, levels_ptr, at, step, CHUNK: tl.constexpr):
    """Load the chunk at `at`: step sizes (CHUNK,), the running sum of dt A / ln 2, and its last."""
    return (
        tl.load(sizes_ptr + at + step),
        tl.load(levels_ptr + at + step),
        tl.load(levels_ptr + at + CHUNK - 1),
    )


@triton.jit
def _decays_between(a, causal):
    """(CHUNK, CHUNK): what is left at each step of each one before it."""
    return tl.exp2(tl.where(causal, a[:, None] - a[None, :], float("-inf")))


@triton.jit
def _trace(products, i):
    """Sum of the diagonal of a product."""
    return tl.sum(tl.sum(tl.where(i[:, None] == i[None, :], products, 0.0), axis=1), axis=0)


@triton.jit
def _inside(i, SIZE, WHOLE: tl.constexpr):
    """i < SIZE; WHOLE says that it is so for all i, which spares the masks."""
    if WHOLE:
        inside = tl.full(i.shape, True, tl.int1)
    else:
        inside = i < SIZE
    return inside


@triton.jit
def _B_and_C(B_ptr, C_ptr, step, n, in_t, Bt, Bn, Ct, Cn, N_SIZE, WHOLE: tl.constexpr):
    """Load columns n of a chunk's B and C."""
    within = in_t[:, None] & _inside(n, N_SIZE, WHOLE)[None, :]
    B = tl.load(B_ptr + step[:, None] * Bt + n[None, :] * Bn, mask=within, other=0.0)
    C = tl.load(C_ptr + step[:, None] * Ct + n[None, :] * Cn, mask=within, other=0.0)
    return B, C


@triton.jit
def _columns(at, step, n, in_t, by_t, by_n, N_SIZE, WHOLE: tl.constexpr):
    """Load columns n of a chunk of B or C."""
    within = in_t[:, None] & _inside(n, N_SIZE, WHOLE)[None, :]
    return tl.load(at + step[:, None] * by_t + n[None, :] * by_n, mask=within, other=0.0)


@triton.jit
def _state(at, p, n, P_SIZE, N_SIZE, WHOLE: tl.constexpr):
    """Load columns n of the state (P, N) at `at`."""
    within = _inside(p, P_SIZE, WHOLE)[:, None] & _inside(n, N_SIZE, WHOLE)[None, :]
    return tl.load(at + p[:, None] * N_SIZE + n[None, :], mask=within, other=0.0)


@triton.jit
def _ssd_walk(
    x_ptr, sizes_ptr, levels_ptr, B_ptr, first_ptr, met_ptr, last_ptr,
    T, H, CHUNKS, RATIO, fb, fh, xb, xt, xh, xp, Bb, Bt, Bg, Bn, P_SIZE, N_SIZE,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr, WHOLE_T: tl.constexpr,
    REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Carry a state (P, N) over the chunks: `met` (B, CHUNKS, H, P, N) is what each meets.

    In reverse it carries the gradient of the state, to which dy and C are what x and B are to the state.
    """
    row, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    p, n = tl.program_id(1) * P + tl.arange(0, P), tl.program_id(2) * N + tl.arange(0, N)
    in_p, in_n = _inside(p, P_SIZE, WHOLE), _inside(n, N_SIZE, WHOLE)
    in_pn = in_p[:, None] & in_n[None, :]
    pn = p[:, None] * N_SIZE + n[None, :]
    step = tl.arange(0, CHUNK)
    x_ptr += row * xb + head * xh
    B_ptr += row * Bb + (head // RATIO) * Bg
    sizes_ptr += (row * H + head) * CHUNKS * CHUNK
    levels_ptr += (row * H + head) * CHUNKS * CHUNK
    state = tl.zeros((P, N), tl.float32)
    if HAS_FIRST:
        state = tl.load(first_ptr + row * fb + head * fh + pn, mask=in_pn, other=0.0)
    for i in range(0, CHUNKS // AT_ONCE):
        found = ()
        for j in tl.static_range(AT_ONCE):  # what does not wait for the state
            chunk = row * 0 + i * AT_ONCE + j  # in 64 bits
            if REVERSE:
                chunk = CHUNKS - 1 - chunk
            first = chunk * CHUNK
            in_t = _inside(step, T - first, WHOLE_T)
            dt, a, total = _decays(sizes_ptr, levels_ptr, first, step, CHUNK)
            weight = tl.exp2(a) if REVERSE else dt * tl.exp2(total - a)
            x_at = x_ptr + first * xt + step[:, None] * xt + p[None, :] * xp
            x = tl.load(x_at, mask=in_t[:, None] & in_p[None, :], other=0.0)
            B_at = B_ptr + first * Bt + step[:, None] * Bt + n[None, :] * Bn
            B = tl.load(B_at, mask=in_t[:, None] & in_n[None, :], other=0.0)
            weighted = (x.to(tl.float32) * weight[:, None]).to(x.dtype)
            new = tl.dot(tl.trans(weighted), B, input_precision=PRECISION)
            at = ((row * CHUNKS + chunk) * H + head) * P_SIZE * N_SIZE
            found = found + (at, tl.exp2(total), new)  # type: ignore  # noqa: RUF005
        for j in tl.static_range(AT_ONCE):
            tl.store(met_ptr + found[3 * j] + pn, state.to(met_ptr.dtype.element_ty), mask=in_pn)
            state = state * found[3 * j + 1] + found[3 * j + 2]
    if HAS_LAST:
        tl.store(last_ptr + (row * H + head) * P_SIZE * N_SIZE + pn, state, mask=in_pn)


@triton.jit
def _ssd_outputs(
    x_ptr, sizes_ptr, levels_ptr, A_ptr, B_ptr, C_ptr, D_ptr, starts_ptr, y_ptr,
    T, H, CHUNKS, RATIO, xb, xt, xh, xp, Bb, Bt, Bg, Bn, Cb, Ct, Cg, Cn, P_SIZE, N_SIZE,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr, WHOLE_T: tl.constexpr,
    HAS_D: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """y (B, T, H, P), contiguous, from the chunk's inputs and the states at its start."""
    row, chunk = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, group = chunk * CHUNK, tl.program_id(0) * HEADS // RATIO
    step, p, n = tl.arange(0, CHUNK), tl.arange(0, P), tl.arange(0, N)
    in_t, in_p = _inside(step, T - first, WHOLE_T), _inside(p, P_SIZE, WHOLE)
    in_tp = in_t[:, None] & in_p[None, :]
    B_ptr += row * Bb + group * Bg + first * Bt
    C_ptr += row * Cb + group * Cg + first * Ct
    B, C = _B_and_C(B_ptr, C_ptr, step, n, in_t, Bt, Bn, Ct, Cn, N_SIZE, WHOLE)
    products = tl.dot(C, tl.trans(B), input_precision=PRECISION)
    for part in range(1, PARTS):
        B2, C2 = _B_and_C(B_ptr, C_ptr, step, part * N + n, in_t, Bt, Bn, Ct, Cn, N_SIZE, WHOLE)
        products += tl.dot(C2, tl.trans(B2), input_precision=PRECISION)
    causal = step[:, None] >= step[None, :]
    for i in range(0, HEADS):
        head = tl.program_id(0) * HEADS + i
        times = ((row * H + head) * CHUNKS + chunk) * CHUNK
        dt, a, _ = _decays(sizes_ptr, levels_ptr, times, step, CHUNK)
        x_at = x_ptr + row * xb + first * xt + head * xh + step[:, None] * xt + p[None, :] * xp
        x = tl.load(x_at, mask=in_tp, other=0.0)
        starts_at = starts_ptr + ((row * CHUNKS + chunk) * H + head) * P_SIZE * N_SIZE
        decay = _decays_between(a, causal)
        scores = products * decay * dt[None, :]
        state = _state(starts_at, p, n, P_SIZE, N_SIZE, WHOLE)
        y = tl.dot(C, tl.trans(state), input_precision=PRECISION)
        for part in range(1, PARTS):
            _B2, C2 = _B_and_C(B_ptr, C_ptr, step, part * N + n, in_t, Bt, Bn, Ct, Cn, N_SIZE, WHOLE)
            state2 = _state(starts_at, p, part * N + n, P_SIZE, N_SIZE, WHOLE)
            y += tl.dot(C2, tl.trans(state2), input_precision=PRECISION)
        y = y * tl.exp2(a)[:, None]
        y += tl.dot(scores.to(x.dtype), x, input_precision=PRECISION)
        if HAS_D:
            y += tl.load(D_ptr + head) * x.to(tl.float32)
        y_at = y_ptr + ((row * T + first) * H + head) * P_SIZE
        tl.store(y_at + step[:, None] * (H * P_SIZE) + p[None, :], y.to(y_ptr.dtype.element_ty), mask=in_tp)


@triton.jit
def _ssd_gradients_of_x(
    x_ptr, sizes_ptr, levels_ptr, A_ptr, B_ptr, C_ptr, D_ptr, starts_ptr, dends_ptr, dy_ptr,
    starting_ptr, carried_ptr, dx_ptr, dsizes_ptr, dA_ptr, dD_ptr,
    T, H, CHUNKS, RATIO, xb, xt, xh, xp, Bb, Bt, Bg, Bn, Cb, Ct, Cg, Cn, P_SIZE, N_SIZE, dxb, dxt, dxh,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr, WHOLE_T: tl.constexpr,
    HAS_D: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PARTS: tl.constexpr, EARLY: tl.constexpr, BLOCKS: tl.constexpr, LOGS: tl.constexpr,
):  # fmt: skip
    """dx, its last axis contiguous; dsizes (B, H, CHUNKS CHUNK) float32; dA, dD (B, CHUNKS, H).

    From the states at the chunk's start and the gradients of those at its end. EARLY loads all before the
    first product; otherwise each is loaded where it is first multiplied, which holds fewer registers.
    With BLOCKS the sums that need the state at the start are those that `_ssd_gradients_of_B_and_C` left.
    With LOGS dA is the gradient of log(-A).
    """
    row, chunk = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, group = chunk * CHUNK, tl.program_id(0) * HEADS // RATIO
    step, p, n = tl.arange(0, CHUNK), tl.arange(0, P), tl.arange(0, N)
    in_t, in_p = _inside(step, T - first, WHOLE_T), _inside(p, P_SIZE, WHOLE)
    in_tp = in_t[:, None] & in_p[None, :]
    B_ptr += row * Bb + group * Bg + first * Bt
    C_ptr += row * Cb + group * Cg + first * Ct
    if EARLY:
        B, C = _B_and_C(B_ptr, C_ptr, step, n, in_t, Bt, Bn, Ct, Cn, N_SIZE, WHOLE)
    causal = step[:, None] >= step[None, :]
    for i in range(0, HEADS):
        head = tl.program_id(0) * HEADS + i
        times = ((row * H + head) * CHUNKS + chunk) * CHUNK
        dt, a, total = _decays(sizes_ptr, levels_ptr, times, step, CHUNK)
        x_at = x_ptr + row * xb + first * xt + head * xh
        dy_at = dy_ptr + ((row * T + first) * H + head) * P_SIZE
        dy = tl.load(dy_at + step[:, None] * (H * P_SIZE) + p[None, :], mask=in_tp, other=0.0)
        at = ((row * CHUNKS + chunk) * H + head) * P_SIZE * N_SIZE
        if BLOCKS == 0:
            state = _state(starts_ptr + at, p, n, P_SIZE, N_SIZE, WHOLE)
        if EARLY:
            x = tl.load(x_at + step[:, None] * xt + p[None, :] * xp, mask=in_tp, other=0.0)
            dend = _state(dends_ptr + at, p, n, P_SIZE, N_SIZE, WHOLE)
        else:
            C = _columns(C_ptr, step, n, in_t, Ct, Cn, N_SIZE, WHOLE)
        dy32 = dy.to(tl.float32)

        # what the chunk's start gives to y, and its end asks of dt x
        if BLOCKS == 0:
            da = tl.sum(tl.dot(C, tl.trans(state), input_precision=PRECISION) * dy32, axis=1)
        if not EARLY:
            x = tl.load(x_at + step[:, None] * xt + p[None, :] * xp, mask=in_tp, other=0.0)
            dend = _state(dends_ptr + at, p, n, P_SIZE, N_SIZE, WHOLE)
        x32 = x.to(tl.float32)
        if BLOCKS == 0:
            carried = _trace(tl.dot(state, tl.trans(dend), input_precision=PRECISION), p)
        if not EARLY:
            B = _columns(B_ptr, step, n, in_t, Bt, Bn, N_SIZE, WHOLE)
        products = tl.dot(C, tl.trans(B), input_precision=PRECISION)
        dxdt = tl.zeros((CHUNK, P), tl.float32)
        for part in range(1, PARTS):
            B2, C2 = _B_and_C(B_ptr, C_ptr, step, part * N + n, in_t, Bt, Bn, Ct, Cn, N_SIZE, WHOLE)
            dend2 = _state(dends_ptr + at, p, part * N + n, P_SIZE, N_SIZE, WHOLE)
            products += tl.dot(C2, tl.trans(B2), input_precision=PRECISION)
            if BLOCKS == 0:
                state2 = _state(starts_ptr + at, p, part * N + n, P_SIZE, N_SIZE, WHOLE)
                carried += _trace(tl.dot(state2, tl.trans(dend2), input_precision=PRECISION), p)
                da += tl.sum(tl.dot(C2, tl.trans(state2), input_precision=PRECISION) * dy32, axis=1)
            dxdt += tl.dot(B2, tl.trans(dend2), input_precision=PRECISION)
        # within the chunk, by scores as they are multiplied: what cancels then cancels exactly
        scores = (products * _decays_between(a, causal)).to(x.dtype)
        pairs = tl.dot(dy, tl.trans(x), input_precision=PRECISION)
        within = tl.sum(pairs * scores.to(tl.float32) * dt[None, :], axis=1)
        if BLOCKS == 0:
            da = da * tl.exp2(a) + within
        else:
            da, left = within, tl.zeros((P,), tl.float32)
            for block in tl.static_range(BLOCKS):
                to = row * BLOCKS + block
                da += tl.load(starting_ptr + ((to * H + head) * CHUNKS + chunk) * CHUNK + step)
                left += tl.load(carried_ptr + ((to * CHUNKS + chunk) * H + head) * P + p)
            carried = tl.sum(left, axis=0)
        if HAS_D:
            tl.store(dD_ptr + (row * CHUNKS + chunk) * H + head, _trace(pairs, step))

        dxdt += tl.dot(B, tl.trans(dend), input_precision=PRECISION)
        dxdt = dxdt * tl.exp2(total - a)[:, None]
        written = tl.sum(tl.sum(dxdt * x32, axis=1) * dt, axis=0)
        dxdt += tl.dot(tl.trans(scores), dy, input_precision=PRECISION)
        given = tl.sum(dxdt * x32, axis=1)  # to all later steps and the chunk's end
        da -= given * dt

        dx = dxdt * dt[:, None]
        if HAS_D:
            dx += tl.load(D_ptr + head) * dy32
        dx_at = dx_ptr + row * dxb + first * dxt + head * dxh + step[:, None] * dxt + p[None, :]
        tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=in_tp)
        # da is of the running sums a; of each dt A: all from its step on
        drate = tl.cumsum(da, axis=0, reverse=True) + written + tl.exp2(total) * carried
        A = tl.load(A_ptr + head)
        tl.store(dsizes_ptr + times + step, given + drate * A)
        dA = tl.sum(drate * dt, axis=0)
        if LOGS:
            dA *= A
        tl.store(dA_ptr + (row * CHUNKS + chunk) * H + head, dA)


@triton.jit
def _ssd_gradients_of_B_and_C(
    x_ptr, sizes_ptr, levels_ptr, A_ptr, B_ptr, C_ptr, D_ptr, starts_ptr, dends_ptr, dy_ptr,
    starting_ptr, carried_ptr, dB_ptr, dC_ptr,
    T, H, CHUNKS, RATIO, xb, xt, xh, xp, Bb, Bt, Bg, Bn, Cb, Ct, Cg, Cn, P_SIZE, N_SIZE,
    dBb, dBt, dBh, dCb, dCt, dCh,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr, WHOLE_T: tl.constexpr,
    HAS_D: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """dB and dC (B, T, H / HEADS, N): a program sums those of its heads, for N of their columns.

    With SUMS, for each block of N columns, what the state at the start gives to y by dy, (B, blocks, H,
    CHUNKS CHUNK), and the rows of that state by those of the gradient at the end, (B, blocks, CHUNKS, H, P).
    """
    row, chunk = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(N_SIZE, N)
    heads, first = tl.program_id(0) // blocks, chunk * CHUNK
    step, p, n = tl.arange(0, CHUNK), tl.arange(0, P), tl.program_id(0) % blocks * N + tl.arange(0, N)
    in_t, in_p = _inside(step, T - first, WHOLE_T), _inside(p, P_SIZE, WHOLE)
    in_n = _inside(n, N_SIZE, WHOLE)
    in_tp, in_tn = in_t[:, None] & in_p[None, :], in_t[:, None] & in_n[None, :]
    in_pn, pn = in_p[:, None] & in_n[None, :], p[:, None] * N_SIZE + n[None, :]
    group = heads * HEADS // RATIO
    B_at = B_ptr + row * Bb + group * Bg + first * Bt
    C_at = C_ptr + row * Cb + group * Cg + first * Ct
    B = tl.load(B_at + step[:, None] * Bt + n[None, :] * Bn, mask=in_tn, other=0.0)
    C = tl.load(C_at + step[:, None] * Ct + n[None, :] * Cn, mask=in_tn, other=0.0)
    causal = step[:, None] >= step[None, :]
    dB, dC = tl.zeros((CHUNK, N), tl.float32), tl.zeros((CHUNK, N), tl.float32)
    for i in range(0, HEADS):
        head = heads * HEADS + i
        times = ((row * H + head) * CHUNKS + chunk) * CHUNK
        dt, a, total = _decays(sizes_ptr, levels_ptr, times, step, CHUNK)
        x_at = x_ptr + row * xb + first * xt + head * xh
        x = tl.load(x_at + step[:, None] * xt + p[None, :] * xp, mask=in_tp, other=0.0)
        dy_at = dy_ptr + ((row * T + first) * H + head) * P_SIZE
        dy = tl.load(dy_at + step[:, None] * (H * P_SIZE) + p[None, :], mask=in_tp, other=0.0)
        if not SUMS:
            decay = _decays_between(a, causal)
            dscores = tl.dot(dy, tl.trans(x), input_precision=PRECISION) * decay * dt[None, :]
        at = ((row * CHUNKS + chunk) * H + head) * P_SIZE * N_SIZE
        state = tl.load(starts_ptr + at + pn, mask=in_pn, other=0.0)
        dend = tl.load(dends_ptr + at + pn, mask=in_pn, other=0.0)
        asked = (dy.to(tl.float32) * tl.exp2(a)[:, None]).to(x.dtype)
        given = (x.to(tl.float32) * (dt * tl.exp2(total - a))[:, None]).to(x.dtype)
        if SUMS:
            block = row * blocks + tl.program_id(0) % blocks
            both = tl.dot(state, tl.trans(dend), input_precision=PRECISION)
            left = tl.sum(tl.where(p[:, None] == p[None, :], both, 0.0), axis=1)
            tl.store(carried_ptr + ((block * CHUNKS + chunk) * H + head) * P + p, left)
            from_start = tl.dot(asked, state, input_precision=PRECISION)
            starting_at = starting_ptr + ((block * H + head) * CHUNKS + chunk) * CHUNK
            tl.store(starting_at + step, tl.sum(from_start * C.to(tl.float32), axis=1))
            dC += from_start
        else:
            dC += tl.dot(asked, state, input_precision=PRECISION)
        dB += tl.dot(given, dend, input_precision=PRECISION)
        if SUMS:  # here it holds the fewest registers
            decay = _decays_between(a, causal)
            dscores = tl.dot(dy, tl.trans(x), input_precision=PRECISION) * decay * dt[None, :]
        dscores = dscores.to(x.dtype)
        dC += tl.dot(dscores, B, input_precision=PRECISION)
        dB += tl.dot(tl.trans(dscores), C, input_precision=PRECISION)
    dB_at = dB_ptr + row * dBb + first * dBt + heads * dBh + step[:, None] * dBt + n[None, :]
    dC_at = dC_ptr + row * dCb + first * dCt + heads * dCh + step[:, None] * dCt + n[None, :]
    tl.store(dB_at, dB.to(dB_ptr.dtype.element_ty), mask=in_tn)
    tl.store(dC_at, dC.to(dC_ptr.dtype.element_ty), mask=in_tn)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    *,
    dt_limit: tuple[float, float] = NO_LIMIT,
) -> tuple[Tensor, Tensor]:
    """Return `longroll.ops.ssd` with the same arguments; always returns `(y, final_state)`."""
    with no_autocast(x):
        dtype, tf32 = x.dtype, torch.float16 in (x.dtype, B.dtype)
        if tf32:  # as many digits as float16, whose states would overflow
            x = x.float()
        B, C = B.to(x.dtype), C.to(x.dtype)  # products are of one precision
        skip = None if D is None or D.dim() == 2 else D.float()
        bias = None if dt_bias is None else dt_bias.float()
        state = None if initial_state is None else initial_state.float()
        y, final = _SSD.apply(x, dt, A.float(), B, C, skip, state, bias, dt_softplus, dt_limit, tf32)
        y = y.to(dtype)
        if D is not None and D.dim() == 2:  # the kernel takes one skip weight for each head
            y = (y.float() + D.float() * x.float()).to(dtype)
        return (y if z is None else y * F.silu(z)), final


class Steps(NamedTuple):
    """How step sizes are made.

    Args:
        dt: before the bias, softplus and the limit, (B, T, H).
        bias: (H,) float32, or None.
        softplus: whether softplus follows.
        limit: smallest and largest step size.
        out: (B, T), true at padding, which makes no step; None: there is none.
    """

    dt: Tensor
    bias: Tensor | None
    softplus: bool
    limit: tuple[float, float]
    out: Tensor | None = None

    def run(
        self, kernel: Any, chunks: int, *tensors: Tensor, more: tuple[int, ...] = (), **options: bool
    ) -> None:
        """Run a kernel on all chunks, with `more` strides."""
        batch, time, heads = self.dt.shape
        tile = min(STEPS["HEADS"], triton.next_power_of_2(heads))
        bias = None if self.bias is None else self.bias.contiguous()
        out = None if self.out is None else self.out.contiguous().view(torch.uint8)
        kernel[batch, chunks, triton.cdiv(heads, tile)](
            *(self.dt if t is None else t for t in (self.dt, bias, out)), *tensors,
            time, heads, chunks, *self.dt.stride(), *map(float, self.limit), *more,
            HAS_BIAS=self.bias is not None, SOFTPLUS=self.softplus, LIMITED=tuple(self.limit) != NO_LIMIT,
            HAS_OUT=self.out is not None, CHUNK=CHUNK, **STEPS | {"HEADS": tile}, **options,
        )  # fmt: skip

    def sizes(self, A: Tensor, *, logs: bool = False) -> tuple[Tensor, Tensor]:
        """Return step sizes and the running sums of dt A in each chunk, (2, B, H, chunks CHUNK), and A.

        With `logs` the A that is given is log(-A).
        """
        batch, time, heads = self.dt.shape
        chunks = triton.cdiv(time, CHUNK)
        found, given = A.new_empty(2, batch, heads, chunks * CHUNK), A.contiguous()
        rates = torch.empty_like(given) if logs else given
        self.run(_ssd_steps, chunks, given, found[0], found[1], rates, LOGS=logs)
        return found, rates

    def backward(self, dsizes: Tensor, ddt: Tensor, dbias: Tensor) -> None:
        """Write the gradient of dt into `ddt`, and that of the bias, of each chunk, into (B, chunks, H)."""
        self.run(_ssd_steps_backward, dsizes.shape[2] // CHUNK, dsizes, ddt, dbias, more=ddt.stride())


class _Call:
    """Shapes, strides and grids of one call."""

    def __init__(
        self,
        x: Tensor,
        sizes: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        *,
        tf32: bool,
    ) -> None:
        self.x, self.A, self.B, self.C = x, A, B, C
        self.dt, self.levels = sizes
        self.D = None if D is None else D.contiguous()
        self.batch, self.time, self.heads, self.width = x.shape
        self.order, self.ratio = B.shape[3], x.shape[2] // B.shape[2]
        self.chunks = triton.cdiv(self.time, CHUNK)
        self.sizes = (self.time, self.heads, self.chunks, self.ratio)
        self.ends = (self.width, self.order)
        # tensor cores multiply tiles of at least 16
        self.blocks = tuple(max(16, triton.next_power_of_2(size)) for size in self.ends)
        self.few_warps = {"num_warps": 2} if min(self.blocks) < NARROW else {}
        self.precision = "tf32" if tf32 else "ieee"
        # only CUDA's compiler takes a number of registers
        nvidia = torch.version.cuda is not None
        self.of_64 = nvidia and self.blocks[0] == 64 <= self.blocks[1] and x.element_size() == 2

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """x, dt, its levels, A, B, C and D; an absent one by any pointer, which is not read."""
        D = self.A if self.D is None else self.D
        return self.x, self.dt, self.levels, self.A, self.B, self.C, D

    def walk(
        self, x: Tensor, B: Tensor, first: Tensor | None, *, reverse: bool = False, last: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return the states that the chunks meet, (B, chunks, H, P, N) in x's dtype, and, if asked for the
        `last`, the one after these; without a `first` from zero.
        """
        met = x.new_empty(self.batch, self.chunks, self.heads, self.width, self.order)
        if first is not None and first.stride()[2:] != (self.order, 1):
            first = first.contiguous()
        after = self.A.new_empty(self.batch, self.heads, self.width, self.order) if last else None
        options = WALK | (WALK_64 if self.of_64 else {})
        options["AT_ONCE"] = math.gcd(options["AT_ONCE"], self.chunks)
        options |= {name: min(options[name], b) for name, b in zip("PN", self.blocks, strict=True)}
        parts = (triton.cdiv(size, options[name]) for name, size in zip("PN", self.ends, strict=True))
        _ssd_walk[(self.batch * self.heads, *parts)](
            x, self.dt, self.levels, B, *(self.A if t is None else t for t in (first, met, after)),
            *self.sizes, *((0, 0) if first is None else first.stride()[:2]), *x.stride(), *B.stride(),
            *self.ends,
            REVERSE=reverse, HAS_FIRST=first is not None, HAS_LAST=last, CHUNK=CHUNK,
            **self.sureties(options["P"], options["N"]), **options | self.few_warps,
        )  # fmt: skip
        return met, after

    def side_by_side(
        self, kernel: Any, options: dict[str, int], *tensors: Tensor, more: tuple[int, ...] = ()
    ) -> None:
        """Run a kernel on all chunks at once, on its own tensors and `more` strides.

        With N in its options a program has that many of the state's columns; else all, in so many parts.
        """
        p, n, split = *self.blocks, dict[str, int]()
        programs = self.heads // options["HEADS"]
        if "N" in options:
            n = min(n, options["N"])
            programs *= triton.cdiv(self.order, n)
            split = self.stages(options["num_stages"], p, n)
        else:
            if p * n > WIDEST_AT_ONCE:  # neither registers nor shared memory hold it and loads ahead
                n = max(16, WIDEST_AT_ONCE // 2 // p)
                split = {"num_stages": 1}
            split["PARTS"] = triton.cdiv(self.order, n)
        strides = (*self.x.stride(), *self.B.stride(), *self.C.stride())
        # side by side run heads, whose x lies side by side in memory
        kernel[programs, self.chunks, self.batch](
            *self.tensors, *tensors, *self.sizes, *strides, *self.ends, *more,
            HAS_D=self.D is not None, CHUNK=CHUNK, **self.sureties(p, n),
            **options | {"P": p, "N": n} | split | self.few_warps,
        )  # fmt: skip

    def stages(self, most: int, p: int, n: int) -> dict[str, int]:
        """Return how many heads' x, dy and states, p x n, are on their way at once, up to `most`."""
        if not self.x.is_cuda:  # the interpreter
            return {}
        size, room = self.x.element_size(), shared_memory(self.x.device)
        held, each = CHUNK * (2 * n + CHUNK) * size, 2 * (CHUNK + n) * p * size
        return {"num_stages": max(1, min(most, (room - held) // each))}

    def sureties(self, p: int, n: int) -> dict[str, Any]:
        """Return the precision of products, and whether blocks of p x n and chunks of time come out even."""
        whole = self.width % p == 0 and self.order % n == 0
        return {"PRECISION": self.precision, "WHOLE": whole, "WHOLE_T": self.time % CHUNK == 0}

    def sharing(self, options: dict[str, int]) -> dict[str, int]:
        """Return `options` for as many heads a program as B and C serve, unless that leaves the GPU idle."""
        heads, blocks = options["HEADS"], triton.cdiv(self.order, options.get("N", self.blocks[1]))
        heads = self.ratio if self.ratio <= heads else math.gcd(heads, self.ratio)
        while heads % 2 == 0 and self.batch * self.chunks * self.heads // heads * blocks < FEWEST:
            heads //= 2
        return options | {"HEADS": heads}


def forward(
    x: Tensor,
    sizes: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    *,
    keep: bool = False,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the recurrence without a gradient, of `Steps.sizes`; `state` None is zero.

    Returns:
        y (B, T, H, P), contiguous, the final state, and what `backward` takes: the states that the chunks
        meet, which it computes again unless asked to `keep` them.
    """
    call = _Call(x, sizes, A, B, C, D, tf32=tf32)
    starts, final = call.walk(x, B, state)
    assert final is not None
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    call.side_by_side(_ssd_outputs, call.sharing(OUTPUTS), starts, y)
    return y, final, starts if keep else None


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    inputs: tuple[Tensor, ...],
    steps: Steps,
    sizes: Tensor,
    state: Tensor | None,
    starts: Tensor | None,
    into: tuple[Tensor, ...],
    *,
    of_state: bool = True,
    tf32: bool = False,
    logs: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return gradients of the bias of dt, A, D and the state; others are written `into` tensors.

    Args:
        dy: gradient of y.
        dfinal: gradient of the final state; None is zero.
        inputs: x, A, B, C and D of `forward`.
        steps: how its step sizes were made.
        sizes: these.
        state: the initial one; None is zero.
        starts: what `forward` kept.
        into: tensors for dx, ddt, dB and dC; the last axis of dx, dB and dC is contiguous.
        of_state: whether the gradient of the state is asked for; None is returned for it otherwise.
        tf32: multiply float32 in tf32.
        logs: return the gradient of log(-A) instead of that of A.
    """
    (x, A, B, C, D), (dx, ddt, dB, dC), dy = inputs, into, dy.contiguous()
    call = _Call(x, sizes, A, B, C, D, tf32=tf32)
    if starts is None:
        starts, _ = call.walk(x, B, state, last=False)
    dends, dstate = call.walk(dy, C, dfinal, reverse=True, last=of_state)
    dsizes = torch.empty_like(call.dt)
    # a sum for each chunk: programs that add to one number do so in any order
    dA, dD, dbias = sums = A.new_empty(3, call.batch, call.chunks, call.heads)
    options = call.sharing(OF_B_AND_C)
    programs = call.heads // options["HEADS"]
    whole = programs == B.shape[2]  # each program has all heads of its B and C
    parts = (dB, dC) if whole else tuple(A.new_empty(2, *x.shape[:2], programs, call.order))
    strides = (*parts[0].stride()[:3], *parts[1].stride()[:3])
    left, blocks, x_options = (A, A), 0, call.sharing(OF_X)  # any pointers, which are not read
    if call.of_64:
        blocks = triton.cdiv(call.order, min(call.blocks[1], options["N"]))
        shape = (call.batch, blocks, call.heads * call.chunks)
        left = A.new_empty(*shape, CHUNK), A.new_empty(*shape, call.blocks[0])
        x_options |= OF_X_64
    call.side_by_side(
        _ssd_gradients_of_B_and_C, options | {"SUMS": call.of_64}, starts, dends, dy, *left, *parts,
        more=strides,
    )  # fmt: skip
    call.side_by_side(
        _ssd_gradients_of_x, x_options | {"BLOCKS": blocks, "LOGS": logs}, starts, dends, dy, *left,
        dx, dsizes, dA, dD, more=dx.stride()[:3],
    )  # fmt: skip
    for part, total in () if whole else zip(parts, (dB, dC), strict=True):
        total.copy_(part.unflatten(2, (B.shape[2], -1)).sum(3))
    steps.backward(dsizes, ddt, dbias)
    dA, dD, dbias = column_sums(sums.flatten(1, 2))
    return None if steps.bias is None else dbias, dA, None if D is None else dD, dstate


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        state: Tensor | None,
        bias: Tensor | None,
        softplus: bool,
        limit: tuple[float, float],
        tf32: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        sizes, A = Steps(dt, bias, softplus, limit).sizes(A)
        y, final, _ = forward(x, sizes, A, B, C, D, state, tf32=tf32)
        ctx.save_for_backward(x, dt, A, B, C, D, state, bias, sizes)
        ctx.how, ctx.tf32 = (softplus, limit), tf32
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, state, bias, sizes = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        into = dx, ddt, dB, dC = tuple(
            torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C)
        )
        steps = Steps(dt, bias, *ctx.how)
        dbias, dA, dD, dstate = backward(
            dy, dfinal, (x, A, B, C, D), steps, sizes, state, None, into,
            of_state=ctx.needs_input_grad[6], tf32=ctx.tf32,
        )  # fmt: skip
        return dx, ddt, dA, dB, dC, dD, dstate, dbias, None, None, None
