"""Mamba-1's selective scan in Triton, forward and backward, with initial and final state.

A program reads `SPAN` steps of one row one after another, for `BLOCK` channels side by side, their states in
registers. Spans run side by side: a first pass finds what each makes of a zero state, `_scan_pass_on` hands
the true states from span to span, a second pass starts from them. Backward keeps the states at the starts of
spans and walks again, to write a state down every `TILE` steps and to find what each span's outputs ask of
the state before it; handed on in reverse, these start the walk back through the tiles, with the states of one
tile in registers. Softplus, dt bias, D and the gate are fused.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longroll.ops._common import LOG2_E, needs_graph, no_autocast, strides

SPAN, TILE = 64, 2
BLOCK, WARPS = 32, 1
"""A warp to a program, so that no sum over channels crosses warps; pinned, nothing is tuned."""
REGISTERS = {} if torch.version.hip else {"maxnreg": 168}
"""Registers of a lane in backward, for up to 16 numbers a channel: more leave fewer programs running."""
ROOM = 1 << 28
"""Numbers of the tiles' states that exist at a time: backward goes through a longer text part by part."""
LN_2 = tl.constexpr(1 / LOG2_E)


@triton.jit
def _step_size(raw, SOFTPLUS: tl.constexpr):
    """dt after softplus, and its derivative."""
    slope = tl.full(raw.shape, 1.0, tl.float32)
    if SOFTPLUS:
        e = tl.exp(-tl.abs(raw))
        slope = tl.where(raw > 0.0, 1.0, e) / (1.0 + e)
        # log(1 + e), its digits kept where e is small: minimax on [0, 1], to 4e-7 of it in float32
        log = -0.10902292 + e * (0.044986654 - e * 0.0087789586)
        log = -0.49998179 + e * (0.33284065 + e * (-0.24536866 + e * (0.17847209 + e * log)))
        raw = tl.maximum(raw, 0.0) + e * (1.0 + e * log)
    return raw, slope


@triton.jit
def _channels(
    bias_ptr, D_SIZE, N_SIZE, HAS_BIAS: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """A program's channels d and state numbers n, their masks and the bias of dt."""
    d, n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    in_d, in_n = d < D_SIZE, n < N_SIZE
    if FULL:
        in_d, in_n = d >= 0, n >= 0
    bias = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    return d, n, in_d, in_n, in_n[:, None] & in_d[None, :], bias


@triton.jit
def _scan_forward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr,
    starts_ptr, ends_ptr, total_ptr, tiles_ptr, y_ptr,
    T, D_SIZE: tl.constexpr, N_SIZE: tl.constexpr, SPANS, FIRST,
    xb, xt: tl.constexpr, xd, dtb, dtt: tl.constexpr, dtd, zb, zt: tl.constexpr, zd,
    Bb, Bt: tl.constexpr, Bn, Cb, Ct: tl.constexpr, Cn, yb, yt: tl.constexpr, yd,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    LOCAL: tl.constexpr, SAVE: tl.constexpr, WRITE: tl.constexpr, ASK: tl.constexpr,
    FULL: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Read one span. LOCAL: from zero, for its end and the sum of its steps. SAVE: tiles' states. WRITE: y.
    ASK: `y_ptr` holds dy; what it asks of the state before the span. FULL: no mask is needed.

    States are (N, D) within the internal buffers, as A is, which decays in powers of 2. Strides of time are
    compiled in: as arguments they cost a third of the forward's instructions in addresses.
    """
    row, span = tl.program_id(0).to(tl.int64), FIRST + tl.program_id(2).to(tl.int64)
    part = row * tl.num_programs(2) + span - FIRST  # of the tiles' states, which are of these spans only
    d, n, in_d, in_n, in_nd, bias = _channels(bias_ptr, D_SIZE, N_SIZE, HAS_BIAS, FULL, BLOCK, N)
    nd = n[:, None] * D_SIZE + d[None, :]
    A = tl.load(A_ptr + nd, mask=in_nd, other=0.0)
    state_at = (row * SPANS + span) * N_SIZE * D_SIZE + nd
    h, total = tl.zeros((N, BLOCK), tl.float32), tl.zeros((BLOCK,), tl.float32)
    left_of_first, asked = h + 1.0, h
    if not LOCAL:
        h = tl.load(starts_ptr + state_at, mask=in_nd, other=0.0)
    skip = tl.zeros((BLOCK,), tl.float32)
    if HAS_D:
        skip = tl.load(D_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    first = span * SPAN
    x_ptr += row * xb + first * xt
    dt_ptr += row * dtb + first * dtt
    z_ptr += row * zb + first * zt
    B_ptr += row * Bb + first * Bt
    C_ptr += row * Cb + first * Ct
    y_ptr += row * yb + first * yt
    zero, left = d * 0, T - first
    for i in range(0, SPAN // TILE):
        sizes, xs, Bs, Cs, gates, dys = (), (), (), (), (), ()
        for j in tl.static_range(TILE):  # loads of a tile come together: none waits for a store
            t = i * TILE + j
            inside, read = in_d, in_n
            if not FULL:
                inside, read = inside & (t + zero < left), read & (t + 0 * n < left)
            raw = tl.load(dt_ptr + t * dtt + d * dtd, mask=inside, other=0.0).to(tl.float32) + bias
            x = tl.load(x_ptr + t * xt + d * xd, mask=inside, other=0.0).to(tl.float32)
            B = tl.load(B_ptr + t * Bt + n * Bn, mask=read, other=0.0).to(tl.float32)[:, None]
            size, _ = _step_size(raw, SOFTPLUS)
            if not FULL:
                size = tl.where(inside, size, 0.0)
            sizes, xs, Bs = sizes + (size,), xs + (x,), Bs + (B,)  # type: ignore  # noqa: RUF005
            if WRITE or ASK:
                C = tl.load(C_ptr + t * Ct + n * Cn, mask=read, other=0.0).to(tl.float32)[:, None]
                gate = 1.0 + zero
                if HAS_Z:
                    z = tl.load(z_ptr + t * zt + d * zd, mask=inside, other=0.0).to(tl.float32)
                    gate = z / (1.0 + tl.exp(-z))
                Cs, gates = Cs + (C,), gates + (gate,)  # type: ignore  # noqa: RUF005
            if ASK:
                dy = tl.load(y_ptr + t * yt + d * yd, mask=inside, other=0.0).to(tl.float32)
                dys = dys + (dy,)  # type: ignore  # noqa: RUF005
        if SAVE:
            at = (part * (SPAN // TILE) + i) * N_SIZE * D_SIZE + nd
            tl.store(tiles_ptr + at, h, mask=in_nd)
        for j in tl.static_range(TILE):
            t = i * TILE + j
            size, x = sizes[j], xs[j]
            decay = tl.exp2(size[None, :] * A)
            h = h * decay + (size * x)[None, :] * Bs[j]
            total += size
            if WRITE:
                inside = in_d
                if not FULL:
                    inside = inside & (t + zero < left)
                y = tl.sum(h * Cs[j], axis=0) + skip * x
                tl.store(y_ptr + t * yt + d * yd, (y * gates[j]).to(y_ptr.dtype.element_ty), mask=inside)
            if ASK:
                left_of_first *= decay
                asked += left_of_first * Cs[j] * (dys[j] * gates[j])[None, :]
    if ASK:
        tl.store(ends_ptr + state_at, asked, mask=in_nd)
    if LOCAL:
        tl.store(ends_ptr + state_at, h, mask=in_nd)
        tl.store(total_ptr + (row * SPANS + span) * D_SIZE + d, total, mask=in_d)


@triton.jit
def _scan_pass_on(
    A_ptr, local_ptr, total_ptr, first_ptr, met_ptr, last_ptr, D_SIZE, N_SIZE, SPANS,
    REVERSE: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute the state that each span meets when `first` (B, D, N) enters at one end, and the state that
    leaves.
    """
    row = tl.program_id(0).to(tl.int64)
    d, n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    in_d = d < D_SIZE
    in_nd = (n < N_SIZE)[:, None] & in_d[None, :]
    dn, nd = d[None, :] * N_SIZE + n[:, None], n[:, None] * D_SIZE + d[None, :]
    A = tl.load(A_ptr + nd, mask=in_nd, other=0.0)
    state = tl.load(first_ptr + row * N_SIZE * D_SIZE + dn, mask=in_nd, other=0.0)
    for i in range(0, SPANS, TOGETHER):
        locals, totals = (), ()
        for j in tl.static_range(TOGETHER):  # loads come together, before any store
            span = row * SPANS + (SPANS - 1 - i - j if REVERSE else i + j)
            there = i + j < SPANS
            local = tl.load(local_ptr + span * N_SIZE * D_SIZE + nd, mask=in_nd & there, other=0.0)
            total = tl.load(total_ptr + span * D_SIZE + d, mask=in_d & there, other=0.0)
            locals, totals = locals + (local,), totals + (total,)  # type: ignore  # noqa: RUF005
        for j in tl.static_range(TOGETHER):
            span = row * SPANS + (SPANS - 1 - i - j if REVERSE else i + j)
            tl.store(met_ptr + span * N_SIZE * D_SIZE + nd, state, mask=in_nd & (i + j < SPANS))
            state = state * tl.exp2(totals[j][None, :] * A) + locals[j]
    tl.store(last_ptr + row * N_SIZE * D_SIZE + dn, state, mask=in_nd)


@triton.jit
def _scan_backward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, tiles_ptr, carries_ptr, dy_ptr,
    dx_ptr, ddt_ptr, dz_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr,
    T, D_SIZE: tl.constexpr, N_SIZE: tl.constexpr, SPANS, FIRST,
    xb, xt: tl.constexpr, xd, dtb, dtt: tl.constexpr, dtd, zb, zt: tl.constexpr, zd,
    Bb, Bt: tl.constexpr, Bn, Cb, Ct: tl.constexpr, Cn, yb, yt: tl.constexpr, yd,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    APART: tl.constexpr, FULL: tl.constexpr,
    SPAN: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradients of one span. dx, ddt and dz are contiguous; those of A, B, C, D and the bias are added to.

    APART: to a place for each span (A, D, bias) or block of channels (B, C), where no other program adds.
    """
    row, span = tl.program_id(0).to(tl.int64), FIRST + tl.program_id(2).to(tl.int64)
    part = row * tl.num_programs(2) + span - FIRST  # of the tiles' states, which are of these spans only
    d, n, in_d, in_n, in_nd, bias = _channels(bias_ptr, D_SIZE, N_SIZE, HAS_BIAS, FULL, BLOCK, N)
    nd = n[:, None] * D_SIZE + d[None, :]
    A = tl.load(A_ptr + nd, mask=in_nd, other=0.0)
    carry = tl.load(carries_ptr + (row * SPANS + span) * N_SIZE * D_SIZE + nd, mask=in_nd, other=0.0)
    skip = tl.zeros((BLOCK,), tl.float32)
    if HAS_D:
        skip = tl.load(D_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    first = span * SPAN
    x_ptr += row * xb + first * xt
    dt_ptr += row * dtb + first * dtt
    z_ptr += row * zb + first * zt
    B_ptr += row * Bb + first * Bt
    C_ptr += row * Cb + first * Ct
    dy_ptr += row * yb + first * yt
    to = (row * T + first) * D_SIZE
    if APART:
        dB_ptr += tl.program_id(1).to(tl.int64) * tl.num_programs(0) * T * N_SIZE
        dC_ptr += tl.program_id(1).to(tl.int64) * tl.num_programs(0) * T * N_SIZE
        dA_ptr += (row * SPANS + span) * N_SIZE * D_SIZE
        dD_ptr += (row * SPANS + span) * D_SIZE
        dbias_ptr += (row * SPANS + span) * D_SIZE
    dx_ptr += to
    ddt_ptr += to
    dz_ptr += to
    dB_ptr += (row * T + first) * N_SIZE
    dC_ptr += (row * T + first) * N_SIZE
    dA = tl.zeros((N, BLOCK), tl.float32)
    dD, dbias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    zero, left = d * 0, T - first
    for i in range(0, SPAN // TILE):
        tile = SPAN // TILE - 1 - i
        at = (part * (SPAN // TILE) + tile) * N_SIZE * D_SIZE + nd
        h = tl.load(tiles_ptr + at, mask=in_nd, other=0.0)
        states, Cs, dys, zs = (h,), (), (), ()
        for j in tl.static_range(TILE):
            t = tile * TILE + j
            inside, read = in_d, in_n[:, None]
            if not FULL:
                inside, read = inside & (t + zero < left), read & (t + 0 * n[:, None] < left)
            raw = tl.load(dt_ptr + t * dtt + d * dtd, mask=inside, other=0.0).to(tl.float32) + bias
            size, _ = _step_size(raw, SOFTPLUS)
            if not FULL:
                size = tl.where(inside, size, 0.0)
            x = tl.load(x_ptr + t * xt + d * xd, mask=inside, other=0.0).to(tl.float32)
            B = tl.load(B_ptr + t * Bt + n[:, None] * Bn, mask=read, other=0.0).to(tl.float32)
            h = h * tl.exp2(size[None, :] * A) + (size * x)[None, :] * B
            states = states + (h,)  # type: ignore  # noqa: RUF005 (Triton knows no unpacking)
            # read before the walk back begins to store, so that it does not wait between its stores
            C = tl.load(C_ptr + t * Ct + n[:, None] * Cn, mask=read, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + t * yt + d * yd, mask=inside, other=0.0).to(tl.float32)
            Cs = Cs + (C,)  # type: ignore  # noqa: RUF005
            dys = dys + (dy,)  # type: ignore  # noqa: RUF005
            if HAS_Z:
                z = tl.load(z_ptr + t * zt + d * zd, mask=inside, other=0.0).to(tl.float32)
                zs = zs + (z,)  # type: ignore  # noqa: RUF005
        for j in tl.static_range(TILE):
            t = tile * TILE + TILE - 1 - j
            inside, in_tn, read = in_d, in_n, in_n[:, None]
            if not FULL:
                inside, in_tn = inside & (t + zero < left), in_tn & (t + 0 * n < left)
                read = read & (t + 0 * n[:, None] < left)
            raw = tl.load(dt_ptr + t * dtt + d * dtd, mask=inside, other=0.0).to(tl.float32) + bias
            size, slope = _step_size(raw, SOFTPLUS)
            if not FULL:
                size = tl.where(inside, size, 0.0)
            x = tl.load(x_ptr + t * xt + d * xd, mask=inside, other=0.0).to(tl.float32)
            B = tl.load(B_ptr + t * Bt + n[:, None] * Bn, mask=read, other=0.0).to(tl.float32)
            C, dy = Cs[TILE - 1 - j], dys[TILE - 1 - j]
            after = states[TILE - j]
            if HAS_Z:
                z = zs[TILE - 1 - j]
                gate = 1.0 / (1.0 + tl.exp(-z))
                y = tl.sum(after * C, axis=0) + skip * x
                dz = dy * y * gate * (1.0 + z * (1.0 - gate))
                tl.store(dz_ptr + t * D_SIZE + d, dz.to(dz_ptr.dtype.element_ty), mask=inside)
                dy *= z * gate
            decay = tl.exp2(size[None, :] * A)
            grad = carry + C * dy[None, :]  # of the state after this step
            carry = grad * decay
            through = tl.sum(grad * B, axis=0)  # gradient of size * x
            rate = carry * states[TILE - 1 - j]  # gradient of size * A
            ddt = (through * x + tl.sum(rate * A, axis=0) * LN_2) * slope
            dx = through * size + skip * dy
            tl.store(dx_ptr + t * D_SIZE + d, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            tl.store(ddt_ptr + t * D_SIZE + d, ddt.to(ddt_ptr.dtype.element_ty), mask=inside)
            dA += rate * size[None, :]
            dD += dy * x
            if FULL:
                dbias += ddt
            else:
                dbias += tl.where(inside, ddt, 0.0)
            dB = tl.sum(grad * (size * x)[None, :], axis=1)
            dC = tl.sum(after * dy[None, :], axis=1)
            tl.atomic_add(dB_ptr + t * N_SIZE + n, dB, mask=in_tn, sem="relaxed")
            tl.atomic_add(dC_ptr + t * N_SIZE + n, dC, mask=in_tn, sem="relaxed")
    tl.atomic_add(dA_ptr + nd, dA, mask=in_nd, sem="relaxed")
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
) -> tuple[Tensor, Tensor]:
    """Return `longroll.ops.selective_scan` with the same arguments; always returns `(y, final_state)`."""
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    if needs_graph(*inputs):
        found: tuple[Tensor, Tensor] = _Scan.apply(dt_softplus, *inputs)
        return found
    with no_autocast(x):
        y, final, _, _ = _Call(dt_softplus, *inputs).forward()
    return y, final


class _Call:
    """The arguments of one call, and its kernels."""

    def __init__(
        self,
        softplus: bool,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
    ) -> None:
        self.x, self.dt, self.z = x, dt, z
        self.D, self.bias = (None if t is None else t.contiguous() for t in (D, dt_bias))
        self.B, self.C = (t.float().contiguous() for t in (B, C))  # better once than in each lane
        self.A = (A.float() * LOG2_E).t().contiguous()  # decays are powers of 2; laid out as states are
        self.batch, self.time, self.width = x.shape
        self.order = A.shape[1]
        self.spans = triton.cdiv(self.time, SPAN)
        self.grid = (self.batch, triton.cdiv(self.width, BLOCK), self.spans)
        self.sizes = (self.time, self.width, self.order, self.spans)
        self.options = {
            "HAS_Z": z is not None, "HAS_BIAS": dt_bias is not None, "SOFTPLUS": softplus,
            "FULL": not (self.time % SPAN or self.width % BLOCK or self.order & (self.order - 1)),
            "SPAN": SPAN, "TILE": TILE, **self.shape,
        }  # fmt: skip
        if initial_state is None:
            initial_state = self.A.new_zeros(self.batch, self.width, self.order)
        self.state = initial_state.float().contiguous()

    @property
    def shape(self) -> dict[str, int]:
        """Sizes of the tensors in registers, for all kernels."""
        order = triton.next_power_of_2(self.order)
        return {"BLOCK": BLOCK, "N": order, "num_warps": WARPS}

    def _given(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """An absent tensor by any pointer, which is not read."""
        return tuple(self.A if t is None else t for t in tensors)

    def states(self, count: int) -> Tensor:
        """Room for states, (B, count, N, D) float32."""
        return self.A.new_empty(self.batch, count, self.order, self.width)

    def read(
        self,
        starts: Tensor | None,
        spans: range,
        *,
        tiles: Tensor | None = None,
        y: Tensor | None = None,
        dy: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Read `spans` from `starts`, and write what is given; with `dy`, what it asks of the spans' starts.

        Without `starts`: from zero, for the states at the spans' ends and their sums of steps.
        """
        local = starts is None
        ends = self.states(self.spans) if local or dy is not None else None
        total = self.A.new_empty(self.batch, self.spans, self.width) if local else None
        given = y if dy is None else dy
        _scan_forward[*self.grid[:2], len(spans)](
            *self._given(self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.bias),
            *self._given(starts, ends, total, tiles, given), *self.sizes, spans.start,
            *strides(self.x, self.dt, self.z, self.B, self.C, given),
            LOCAL=local, SAVE=tiles is not None, WRITE=y is not None, ASK=dy is not None,
            HAS_D=self.D is not None, **self.options,
        )  # fmt: skip
        return self._given(ends, total)

    def _zeros(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Zeros of some shapes, float32, filled by one kernel."""
        parts = self.A.new_zeros(sum(map(math.prod, shapes))).split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _tiles(self, spans: range) -> Tensor:
        return self.states(len(spans) * (SPAN // TILE))

    def pass_on(self, local: Tensor, total: Tensor, first: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """Return what the spans meet, (B, spans, N, D), and what leaves, (B, D, N)."""
        met, last = self.states(self.spans), torch.empty_like(self.state)
        _scan_pass_on[self.grid[:2]](
            self.A, local, total, first, met, last, *self.sizes[1:], REVERSE=reverse, TOGETHER=4, **self.shape
        )
        return met, last

    def forward(self) -> tuple[Tensor, ...]:
        """Return y, the final state, the states at the starts of spans, and the sums of their steps."""
        everything = range(self.spans)
        y = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        local, total = self.read(None, everything)
        starts, final = self.pass_on(local, total, self.state, reverse=False)
        self.read(starts, everything, y=y)
        return y, final, starts, total

    def backward(self, starts: Tensor, total: Tensor, dy: Tensor, dfinal: Tensor) -> tuple[Tensor, ...]:
        """Return gradients of all arguments, in their order."""
        at_once = max(1, ROOM // (self.batch * SPAN // TILE * self.state[0].numel()))
        parts = [range(i, min(i + at_once, self.spans)) for i in range(0, self.spans, at_once)]
        tiles = self._tiles(parts[0]) if len(parts) == 1 else None
        asked, _ = self.read(starts, range(self.spans), tiles=tiles, dy=dy)
        carries, dstate = self.pass_on(asked, total, dfinal.contiguous(), reverse=True)
        dx, ddt, dz = (
            torch.empty(self.x.shape, dtype=t.dtype, device=dy.device) for t in (self.x, self.dt, self.x)
        )
        # programs that add to one number do so in any order, unless each has a place of its own
        apart = torch.are_deterministic_algorithms_enabled()
        spans, blocks = (self.batch * self.spans, self.grid[1]) if apart else (1, 1)
        dA, dD, dbias = self._zeros((spans, *self.A.shape), *2 * [(spans, self.width)])
        dB, dC = self._zeros(*2 * [(blocks, self.batch, self.time, self.order)])
        for part in parts:
            if len(parts) > 1:
                tiles = self._tiles(part)
                self.read(starts, part, tiles=tiles)
            _scan_backward[*self.grid[:2], len(part)](
                *self._given(self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.bias),
                tiles, carries, dy, dx, ddt, dz, dA, dB, dC, dD, dbias, *self.sizes, part.start,
                *strides(self.x, self.dt, self.z, self.B, self.C, dy),
                HAS_D=self.D is not None, APART=apart,
                **self.options, **(REGISTERS if self.order <= 16 else {}),
            )  # fmt: skip
        dA, dB, dC, dD, dbias = (t.sum(0) if apart else t[0] for t in (dA, dB, dC, dD, dbias))
        return dx, ddt, dA.t(), dB, dC, dD, dz, dbias, dstate


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, softplus: bool, *inputs: Any) -> tuple[Tensor, Tensor]:
        with no_autocast(inputs[0]):
            y, final, *saved = _Call(softplus, *inputs).forward()
        ctx.save_for_backward(*inputs, *saved)
        ctx.softplus = softplus
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, starts, total = ctx.saved_tensors
        with no_autocast(dy):
            found = _Call(ctx.softplus, *inputs).backward(starts, total, dy, dfinal)
        grads = [
            g.to(t.dtype) if t is not None and need else None
            for g, t, need in zip(found, inputs, ctx.needs_input_grad[1:], strict=True)
        ]
        return None, *grads
