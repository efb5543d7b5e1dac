"""Mamba-1's selective scan in Triton, forward and backward, with initial and final state.

Time is cut into tiles of `TILE` steps, held as (TILE, BLOCK, N) in registers and scanned by
`tl.associative_scan`; a program walks its tiles one after another with the state (BLOCK, N) in registers, for
one row and BLOCK channels. Where rows and channels alone would leave the device idle, time is also cut into
`splits` that run side by side: a first pass finds what each adds to the state, a second starts from the true
states. Forward keeps the state at the start of each tile (4 N / TILE bytes a number of x); backward walks the
tiles from the last to the first and scans each again. Softplus, dt bias, D and the gate are fused.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longroll.ops._common import needs_graph, no_autocast

TILE, BLOCK, WARPS = 32, 4, 4
"""Time steps and channels of a tile, and its warps: pinned, so that the first step need not tune."""
_PROGRAMS = 512  # that keep a device busy: with fewer, time is cut into splits


@triton.jit
def _join(a_left, b_left, a_right, b_right):
    return a_left * a_right, a_right * b_left + b_right


@triton.jit
def _softplus(v):
    return tl.where(v > 20.0, v, tl.log(1.0 + tl.exp(tl.minimum(v, 20.0))))


@triton.jit
def _step_sizes(dt_ptr, bias, t, d, stride_t, stride_d, mask, SOFTPLUS: tl.constexpr):
    """dt after bias and softplus, (TILE, BLOCK), 0 where masked; and its derivative by dt."""
    raw = tl.load(dt_ptr + t[:, None] * stride_t + d[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
    raw = raw + bias[None, :]
    if SOFTPLUS:
        slope = 1.0 / (1.0 + tl.exp(-raw))
        size = _softplus(raw)
    else:
        slope = tl.full(raw.shape, 1.0, tl.float32)
        size = raw
    return tl.where(mask, size, 0.0), slope


@triton.jit
def _forward_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, h0_ptr,
    y_ptr, start_ptr, final_ptr, sum_ptr,
    T, D_SIZE, N_SIZE, STEPS, TILES,
    xb, xt, xd, dtb, dtt, dtd, zb, zt, zd, Bb, Bt, Bn, Cb, Ct, Cn, yb, yt, yd,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    WRITE: tl.constexpr, SAVE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    d, n = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    in_d, in_n = d < D_SIZE, n < N_SIZE
    in_dn = in_d[:, None] & in_n[None, :]
    A = tl.load(A_ptr + d[:, None] * N_SIZE + n[None, :], mask=in_dn, other=0.0).to(tl.float32)
    state_at = ((row * splits + split).to(tl.int64) * D_SIZE + d[:, None]) * N_SIZE + n[None, :]
    h = tl.load(h0_ptr + state_at, mask=in_dn, other=0.0)
    bias = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    skip = tl.zeros((BLOCK,), tl.float32)
    if HAS_D:
        skip = tl.load(D_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    x_ptr += row.to(tl.int64) * xb
    dt_ptr += row.to(tl.int64) * dtb
    z_ptr += row.to(tl.int64) * zb
    B_ptr += row.to(tl.int64) * Bb
    C_ptr += row.to(tl.int64) * Cb
    y_ptr += row.to(tl.int64) * yb
    total = tl.zeros((BLOCK,), tl.float32)
    last = tl.arange(0, TILE) == TILE - 1
    for i in range(0, STEPS):
        tile = split * STEPS + i
        t = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        in_t = t < T
        mask = in_t[:, None] & in_d[None, :]
        if SAVE:
            at = ((row.to(tl.int64) * TILES + tile) * D_SIZE + d[:, None]) * N_SIZE + n[None, :]
            tl.store(start_ptr + at, h, mask=in_dn)
        size, _ = _step_sizes(dt_ptr, bias, t, d, dtt, dtd, mask, SOFTPLUS)
        x = tl.load(x_ptr + t[:, None] * xt + d[None, :] * xd, mask=mask, other=0.0).to(tl.float32)
        in_tn = in_t[:, None] & in_n[None, :]
        B = tl.load(B_ptr + t[:, None] * Bt + n[None, :] * Bn, mask=in_tn, other=0.0).to(tl.float32)
        decay = tl.exp(size[:, :, None] * A[None, :, :])  # (TILE, BLOCK, N); 1 past the end
        added = (size * x)[:, :, None] * B[:, None, :]
        kept, states = tl.associative_scan((decay, added), 0, _join)
        states = states + kept * h[None, :, :]
        if WRITE:
            C = tl.load(C_ptr + t[:, None] * Ct + n[None, :] * Cn, mask=in_tn, other=0.0).to(tl.float32)
            y = tl.sum(states * C[:, None, :], axis=2) + skip[None, :] * x
            if HAS_Z:
                z = tl.load(z_ptr + t[:, None] * zt + d[None, :] * zd, mask=mask, other=0.0).to(tl.float32)
                y = y * z / (1.0 + tl.exp(-z))
            tl.store(y_ptr + t[:, None] * yt + d[None, :] * yd, y.to(y_ptr.dtype.element_ty), mask=mask)
        h = tl.sum(tl.where(last[:, None, None], states, 0.0), axis=0)
        total += tl.sum(size, axis=0)
    tl.store(final_ptr + state_at, h, mask=in_dn)
    tl.store(sum_ptr + (row * splits + split) * D_SIZE + d, total, mask=in_d)


@triton.jit
def _backward_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, start_ptr, dy_ptr, dh_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr, dh0_ptr,
    T, D_SIZE, N_SIZE, STEPS, TILES,
    xb, xt, xd, dtb, dtt, dtd, zb, zt, zd, Bb, Bt, Bn, Cb, Ct, Cn, yb, yt, yd,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    WRITE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    d, n = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    in_d, in_n = d < D_SIZE, n < N_SIZE
    in_dn = in_d[:, None] & in_n[None, :]
    A = tl.load(A_ptr + d[:, None] * N_SIZE + n[None, :], mask=in_dn, other=0.0).to(tl.float32)
    state_at = ((row * splits + split).to(tl.int64) * D_SIZE + d[:, None]) * N_SIZE + n[None, :]
    carry = tl.load(dh_ptr + state_at, mask=in_dn, other=0.0)  # gradient of the state after this split
    bias = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    skip = tl.zeros((BLOCK,), tl.float32)
    if HAS_D:
        skip = tl.load(D_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    x_ptr += row.to(tl.int64) * xb
    dt_ptr += row.to(tl.int64) * dtb
    z_ptr += row.to(tl.int64) * zb
    B_ptr += row.to(tl.int64) * Bb
    C_ptr += row.to(tl.int64) * Cb
    dy_ptr += row.to(tl.int64) * yb
    # gradients of x, dt, z are contiguous (B, T, D), those of B and C (B, T, N) float32
    dx_ptr += row.to(tl.int64) * T * D_SIZE
    ddt_ptr += row.to(tl.int64) * T * D_SIZE
    dz_ptr += row.to(tl.int64) * T * D_SIZE
    dB_ptr += row.to(tl.int64) * T * N_SIZE
    dC_ptr += row.to(tl.int64) * T * N_SIZE
    dA = tl.zeros((BLOCK, N), tl.float32)
    dD = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    first = tl.arange(0, TILE) == 0
    for i in range(0, STEPS):
        tile = split * STEPS + STEPS - 1 - i
        t = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        in_t = t < T
        mask = in_t[:, None] & in_d[None, :]
        in_tn = in_t[:, None] & in_n[None, :]
        size, slope = _step_sizes(dt_ptr, bias, t, d, dtt, dtd, mask, SOFTPLUS)
        x = tl.load(x_ptr + t[:, None] * xt + d[None, :] * xd, mask=mask, other=0.0).to(tl.float32)
        B = tl.load(B_ptr + t[:, None] * Bt + n[None, :] * Bn, mask=in_tn, other=0.0).to(tl.float32)
        C = tl.load(C_ptr + t[:, None] * Ct + n[None, :] * Cn, mask=in_tn, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + t[:, None] * yt + d[None, :] * yd, mask=mask, other=0.0).to(tl.float32)
        decay = tl.exp(size[:, :, None] * A[None, :, :])
        if WRITE:
            added = (size * x)[:, :, None] * B[:, None, :]
            at = ((row.to(tl.int64) * TILES + tile) * D_SIZE + d[:, None]) * N_SIZE + n[None, :]
            h = tl.load(start_ptr + at, mask=in_dn, other=0.0)
            kept, states = tl.associative_scan((decay, added), 0, _join)
            states = states + kept * h[None, :, :]
        if HAS_Z:
            z = tl.load(z_ptr + t[:, None] * zt + d[None, :] * zd, mask=mask, other=0.0).to(tl.float32)
            gate = 1.0 / (1.0 + tl.exp(-z))
            if WRITE:
                y = tl.sum(states * C[:, None, :], axis=2) + skip[None, :] * x
                dz = dy * y * gate * (1.0 + z * (1.0 - gate))
                tl.store(dz_ptr + t[:, None] * D_SIZE + d[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask)
            dy = dy * z * gate
        # dh_t = C_t dy_t + decay_{t+1} dh_{t+1}; within the split, whose last step takes `carry` as it is
        after = t + 1
        within = (after < T) & (after < (split + 1) * STEPS * TILE)
        next_size, _ = _step_sizes(
            dt_ptr, bias, after, d, dtt, dtd, within[:, None] & in_d[None, :], SOFTPLUS
        )
        next_decay = tl.exp(next_size[:, :, None] * A[None, :, :])  # 1 where there is no next step
        weight, grads = tl.associative_scan(
            (next_decay, dy[:, :, None] * C[:, None, :]), 0, _join, reverse=True
        )
        grads = grads + weight * carry[None, :, :]  # (TILE, BLOCK, N)
        if WRITE:
            through = tl.sum(grads * B[:, None, :], axis=2)  # gradient of size * x
            dx = through * size + skip[None, :] * dy
            rate = grads * (states - added)  # gradient of size * A: decay_t h_{t-1} = h_t - added_t
            dsize = through * x + tl.sum(rate * A[None, :, :], axis=2)
            ddt = dsize * slope
            tl.store(dx_ptr + t[:, None] * D_SIZE + d[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
            tl.store(ddt_ptr + t[:, None] * D_SIZE + d[None, :], ddt.to(ddt_ptr.dtype.element_ty), mask=mask)
            dA += tl.sum(rate * size[:, :, None], axis=0)
            dD += tl.sum(dy * x, axis=0)
            dbias += tl.sum(tl.where(mask, ddt, 0.0), axis=0)
            dB = tl.sum(grads * (size * x)[:, :, None], axis=1)
            dC = tl.sum(states * dy[:, :, None], axis=1)
            tl.atomic_add(dB_ptr + t[:, None] * N_SIZE + n[None, :], dB, mask=in_tn, sem="relaxed")
            tl.atomic_add(dC_ptr + t[:, None] * N_SIZE + n[None, :], dC, mask=in_tn, sem="relaxed")
        carry = tl.sum(tl.where(first[:, None, None], grads, 0.0), axis=0)
        # the tile before this one multiplies by this tile's first decay itself
    head = tl.zeros((BLOCK,), tl.int64) + split * STEPS * TILE
    open_d = in_d & (head < T)
    raw = tl.load(dt_ptr + head * dtt + d * dtd, mask=open_d, other=0.0).to(tl.float32) + bias
    if SOFTPLUS:
        raw = _softplus(raw)
    carry = carry * tl.exp(tl.where(open_d, raw, 0.0)[:, None] * A)
    tl.store(dh0_ptr + state_at, carry, mask=in_dn)
    if WRITE:
        tl.atomic_add(dA_ptr + d[:, None] * N_SIZE + n[None, :], dA, mask=in_dn, sem="relaxed")
        tl.atomic_add(dD_ptr + d, dD, mask=in_d, sem="relaxed")
        tl.atomic_add(dbias_ptr + d, dbias, mask=in_d, sem="relaxed")


def selective_scan(
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
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`longroll.ops.selective_scan` with the same arguments; always returns `(y, final_state)`.

    Args:
        splits: runs of time that go side by side; default: as many as keep the device busy.
    """
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    if splits is None:
        splits = max(1, min(64, _PROGRAMS // (x.shape[0] * triton.cdiv(x.shape[2], BLOCK))))
    if needs_graph(*inputs):
        return _Scan.apply(*inputs, dt_softplus, splits)
    with no_autocast(x):
        y, final, _ = _forward(_Call(*inputs, dt_softplus, splits), keep=False)
    return y, final


class _Call:
    """The arguments of one call, and how its time is cut: `splits` runs of `steps` tiles."""

    def __init__(self, x, dt, A, B, C, D, z, dt_bias, initial_state, softplus, splits) -> None:
        self.x, self.dt, self.B, self.C, self.D, self.z, self.bias = x, dt, B, C, D, z, dt_bias
        self.A = A.float().contiguous()
        self.batch, self.time, self.width = x.shape
        self.order = A.shape[1]
        tiles = triton.cdiv(self.time, TILE)
        self.steps = triton.cdiv(tiles, splits)
        self.splits = triton.cdiv(tiles, self.steps)
        self.grid = (self.batch, triton.cdiv(self.width, BLOCK), self.splits)
        self.softplus = softplus
        self.state = self.zeros() if initial_state is None else initial_state.float().contiguous()

    def zeros(self, *axes: int) -> Tensor:
        """Float32 zeros (B, *axes, D, N)."""
        return self.A.new_zeros(self.batch, *axes, self.width, self.order)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """x, dt, A, B, C, D, z, bias; an absent one by any pointer, which is not read."""
        absent = self.A
        return (
            self.x, self.dt, self.A, self.B, self.C,
            *(absent if t is None else t for t in (self.D, self.z, self.bias)),
        )  # fmt: skip

    def sizes(self, y: Tensor) -> tuple[int, ...]:
        """What the kernels need to know of shapes and strides."""
        z = self.x if self.z is None else self.z
        strides = (s for t in (self.x, self.dt, z, self.B, self.C, y) for s in t.stride())
        return self.time, self.width, self.order, self.steps, self.steps * self.splits, *strides

    @property
    def options(self) -> dict:
        return {
            "HAS_D": self.D is not None, "HAS_Z": self.z is not None, "HAS_BIAS": self.bias is not None,
            "SOFTPLUS": self.softplus, "TILE": TILE, "BLOCK": BLOCK,
            "N": triton.next_power_of_2(self.order), "num_warps": WARPS,
        }  # fmt: skip

    def across(self, local: Tensor, total: Tensor, first: Tensor, order: range) -> Tensor:
        """States (B, splits, D, N) at which the splits start, in the given order of splits.

        `local` is what each split makes of a zero state, `total` (B, splits, D) the sum of its step sizes.
        """
        starts = torch.empty_like(local)
        state = first
        for i in order:
            starts[:, i] = state
            state = torch.addcmul(local[:, i], torch.exp(total[:, i, :, None] * self.A), state)
        return starts


def _forward(call: _Call, *, keep: bool) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    y = torch.empty_like(call.x)
    tiles = call.zeros(call.steps * call.splits) if keep else call.A

    def launch(states: Tensor, *, write: bool) -> tuple[Tensor, Tensor]:
        final = torch.empty_like(states)
        total = states.new_empty(call.batch, call.splits, call.width)
        _forward_kernel[call.grid](
            *call.tensors, states, y, tiles, final, total, *call.sizes(y), **call.options,
            WRITE=write, SAVE=write and keep,
        )  # fmt: skip
        return final, total

    states = call.state[:, None]
    if call.splits > 1:
        local, total = launch(call.zeros(call.splits), write=False)
        states = call.across(local, total, call.state, range(call.splits))
    final, total = launch(states.contiguous(), write=True)
    return y, final[:, -1], (tiles, total)


def _backward(call: _Call, tiles: Tensor, total: Tensor, dy: Tensor, dfinal: Tensor) -> tuple:
    dx, ddt = (torch.empty(call.x.shape, dtype=t.dtype, device=t.device) for t in (call.x, call.dt))
    dz = torch.empty_like(dx)
    dA, dD = torch.zeros_like(call.A), call.A.new_zeros(call.width)
    dB, dC = (call.A.new_zeros(call.batch, call.time, call.order) for _ in range(2))
    dbias = torch.zeros_like(dD)

    def launch(grads: Tensor, *, write: bool) -> Tensor:
        before = torch.empty_like(grads)
        _backward_kernel[call.grid](
            *call.tensors, tiles, dy, grads, dx, ddt, dA, dB, dC, dD, dz, dbias, before,
            *call.sizes(dy), **call.options, WRITE=write,
        )  # fmt: skip
        return before

    grads = dfinal[:, None]
    if call.splits > 1:
        local = launch(call.zeros(call.splits), write=False)
        grads = call.across(local, total, dfinal, range(call.splits - 1, -1, -1))
    before = launch(grads.contiguous(), write=True)
    return dx, ddt, dA, dB, dC, dD, dz, dbias, before[:, 0]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        with no_autocast(arguments[0]):
            y, final, saved = _forward(_Call(*arguments), keep=True)
        ctx.save_for_backward(*arguments[:9], *saved)
        ctx.how = arguments[9:]
        return y, final

    @staticmethod
    def backward(ctx, dy, dfinal):
        *inputs, tiles, total = ctx.saved_tensors
        with no_autocast(dy):
            call = _Call(*inputs, *ctx.how)
            found = _backward(call, tiles, total, dy, dfinal.contiguous())
        grads = [
            g.to(t.dtype) if t is not None and need else None
            for g, t, need in zip(found, inputs, ctx.needs_input_grad, strict=False)
        ]
        return *grads, None, None
