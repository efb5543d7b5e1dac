"""Mamba-2's recurrence (state space duality) in Triton, forward and backward, with initial and final state.

Chunks of `CHUNK` steps run side by side; only the states at their starts are handed from chunk to chunk, by
an elementwise kernel. Nothing but the inputs is kept for backward, which makes the states again. Products are
made in the precision of x, sums, decays and states in float32. The layout of the work follows mamba-ssm's
ops/triton/ssd_*.py (Dao and Gu 2024).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from longroll.ops._common import cast, no_autocast

CHUNK, WARPS = 64, 4
_BLOCK = 1024  # numbers of a state that a program of the elementwise kernel carries


@triton.jit
def _decays(dt_ptr, A, t, in_t, stride):
    """Step sizes (CHUNK,) and the running sum of dt A within the chunk, both 0 / level past the end."""
    dt = tl.load(dt_ptr + t * stride, mask=in_t, other=0.0)
    return dt, tl.cumsum(dt * A, axis=0)


@triton.jit
def _chunk_states(
    x_ptr, dt_ptr, A_ptr, B_ptr, local_ptr, decay_ptr,
    T, H, CHUNKS, RATIO, xb, xt, xh, xp, Bb, Bt, Bg, Bn, P_SIZE, N_SIZE,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What each chunk makes of a zero state, (B, CHUNKS, H, P, N) float32, and the decay across it."""
    row, chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    t, p, n = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, P), tl.arange(0, N)
    in_t, in_p, in_n = t < T, p < P_SIZE, n < N_SIZE
    A = tl.load(A_ptr + head)
    dt, a = _decays(dt_ptr + row * T * H + head, A, t, in_t, H)
    total = tl.sum(dt, axis=0) * A
    x_at = x_ptr + row * xb + head * xh + t[:, None] * xt + p[None, :] * xp
    x = tl.load(x_at, mask=in_t[:, None] & in_p[None, :], other=0.0)
    B_at = B_ptr + row * Bb + (head // RATIO) * Bg + t[:, None] * Bt + n[None, :] * Bn
    B = tl.load(B_at, mask=in_t[:, None] & in_n[None, :], other=0.0)
    weighted = x.to(tl.float32) * (dt * tl.exp(total - a))[:, None]
    state = tl.dot(tl.trans(weighted.to(x.dtype)), B, input_precision="ieee")
    at = ((row * CHUNKS + chunk) * H + head) * P_SIZE * N_SIZE + p[:, None] * N_SIZE + n[None, :]
    tl.store(local_ptr + at, state, mask=in_p[:, None] & in_n[None, :])
    tl.store(decay_ptr + (row * CHUNKS + chunk) * H + head, tl.exp(total))


@triton.jit
def _pass_states(
    local_ptr, decay_ptr, first_ptr, starts_ptr, last_ptr, H, CHUNKS, SIZE,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Carry a state over the chunks: `starts[c]` is what chunk c meets, `last` what comes out at the end."""
    row, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    state = tl.load(first_ptr + (row * H + head) * SIZE + i, mask=inside, other=0.0)
    for step in range(0, CHUNKS):
        chunk = step
        if REVERSE:
            chunk = CHUNKS - 1 - step
        at = (row * CHUNKS + chunk) * H + head
        tl.store(starts_ptr + at * SIZE + i, state, mask=inside)
        local = tl.load(local_ptr + at * SIZE + i, mask=inside, other=0.0)
        state = state * tl.load(decay_ptr + at) + local
    tl.store(last_ptr + (row * H + head) * SIZE + i, state, mask=inside)


@triton.jit
def _chunk_outputs(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, starts_ptr, y_ptr,
    T, H, CHUNKS, RATIO, xb, xt, xh, xp, Bb, Bt, Bg, Bn, Cb, Ct, Cg, Cn, P_SIZE, N_SIZE,
    HAS_D: tl.constexpr, CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """y (B, T, H, P), contiguous, from the chunk's inputs and the state at its start."""
    row, chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    step = tl.arange(0, CHUNK)
    t, p, n = chunk * CHUNK + step, tl.arange(0, P), tl.arange(0, N)
    in_t, in_p, in_n = t < T, p < P_SIZE, n < N_SIZE
    in_tp, in_tn = in_t[:, None] & in_p[None, :], in_t[:, None] & in_n[None, :]
    A = tl.load(A_ptr + head)
    dt, a = _decays(dt_ptr + row * T * H + head, A, t, in_t, H)
    x = tl.load(x_ptr + row * xb + head * xh + t[:, None] * xt + p[None, :] * xp, mask=in_tp, other=0.0)
    group = head // RATIO
    B = tl.load(B_ptr + row * Bb + group * Bg + t[:, None] * Bt + n[None, :] * Bn, mask=in_tn, other=0.0)
    C = tl.load(C_ptr + row * Cb + group * Cg + t[:, None] * Ct + n[None, :] * Cn, mask=in_tn, other=0.0)
    at = ((row * CHUNKS + chunk) * H + head) * P_SIZE * N_SIZE + p[:, None] * N_SIZE + n[None, :]
    state = tl.load(starts_ptr + at, mask=in_p[:, None] & in_n[None, :], other=0.0)
    scores = tl.dot(C, tl.trans(B), input_precision="ieee")
    causal = step[:, None] >= step[None, :]
    scores *= tl.where(causal, tl.exp(tl.where(causal, a[:, None] - a[None, :], 0.0)), 0.0) * dt[None, :]
    y = tl.dot(scores.to(x.dtype), x, input_precision="ieee")
    y += tl.dot(C, tl.trans(state.to(C.dtype)), input_precision="ieee") * tl.exp(a)[:, None]
    if HAS_D:
        y += tl.load(D_ptr + head) * x.to(tl.float32)
    y_at = y_ptr + (row * T * H + head) * P_SIZE + t[:, None] * (H * P_SIZE) + p[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=in_tp)


@triton.jit
def _chunk_gradients_of_states(
    dt_ptr, A_ptr, C_ptr, dy_ptr, local_ptr, decay_ptr,
    T, H, CHUNKS, RATIO, Cb, Ct, Cg, Cn, P_SIZE, N_SIZE,
    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What each chunk's outputs ask of the state at its start, (B, CHUNKS, H, P, N), and its decay."""
    row, chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    t, p, n = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, P), tl.arange(0, N)
    in_t, in_p, in_n = t < T, p < P_SIZE, n < N_SIZE
    A = tl.load(A_ptr + head)
    dt, a = _decays(dt_ptr + row * T * H + head, A, t, in_t, H)
    C_at = C_ptr + row * Cb + (head // RATIO) * Cg + t[:, None] * Ct + n[None, :] * Cn
    C = tl.load(C_at, mask=in_t[:, None] & in_n[None, :], other=0.0)
    dy_at = dy_ptr + (row * T * H + head) * P_SIZE + t[:, None] * (H * P_SIZE) + p[None, :]
    dy = tl.load(dy_at, mask=in_t[:, None] & in_p[None, :], other=0.0)
    weighted = dy.to(tl.float32) * tl.exp(a)[:, None]
    state = tl.dot(tl.trans(weighted.to(dy.dtype)), C, input_precision="ieee")
    at = ((row * CHUNKS + chunk) * H + head) * P_SIZE * N_SIZE + p[:, None] * N_SIZE + n[None, :]
    tl.store(local_ptr + at, state, mask=in_p[:, None] & in_n[None, :])
    tl.store(decay_ptr + (row * CHUNKS + chunk) * H + head, tl.exp(tl.sum(dt, axis=0) * A))


@triton.jit
def _chunk_gradients(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, starts_ptr, dends_ptr, dy_ptr,
    dx_ptr, ddt_ptr, drate_ptr, dB_ptr, dC_ptr, dD_ptr,
    T, H, CHUNKS, RATIO, xb, xt, xh, xp, Bb, Bt, Bg, Bn, Cb, Ct, Cg, Cn, P_SIZE, N_SIZE,
    HAS_D: tl.constexpr, CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk and head, from the state at its start and the gradient of that at its end.

    dx (B, T, H, P); ddt, and drate of dt A, (B, T, H) float32; dB, dC (B, T, H, N), of each head by itself.
    """
    row, chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    step = tl.arange(0, CHUNK)
    t, p, n = chunk * CHUNK + step, tl.arange(0, P), tl.arange(0, N)
    in_t, in_p, in_n = t < T, p < P_SIZE, n < N_SIZE
    in_tp, in_tn = in_t[:, None] & in_p[None, :], in_t[:, None] & in_n[None, :]
    in_pn = in_p[:, None] & in_n[None, :]
    A = tl.load(A_ptr + head)
    dt, a = _decays(dt_ptr + row * T * H + head, A, t, in_t, H)
    total = tl.sum(dt, axis=0) * A
    x = tl.load(x_ptr + row * xb + head * xh + t[:, None] * xt + p[None, :] * xp, mask=in_tp, other=0.0)
    group = head // RATIO
    B = tl.load(B_ptr + row * Bb + group * Bg + t[:, None] * Bt + n[None, :] * Bn, mask=in_tn, other=0.0)
    C = tl.load(C_ptr + row * Cb + group * Cg + t[:, None] * Ct + n[None, :] * Cn, mask=in_tn, other=0.0)
    tp = (row * T * H + head) * P_SIZE + t[:, None] * (H * P_SIZE) + p[None, :]
    dy = tl.load(dy_ptr + tp, mask=in_tp, other=0.0)
    at = ((row * CHUNKS + chunk) * H + head) * P_SIZE * N_SIZE + p[:, None] * N_SIZE + n[None, :]
    state = tl.load(starts_ptr + at, mask=in_pn, other=0.0)
    dend = tl.load(dends_ptr + at, mask=in_pn, other=0.0)
    own = x.dtype

    causal = step[:, None] >= step[None, :]
    decay = tl.where(causal, tl.exp(tl.where(causal, a[:, None] - a[None, :], 0.0)), 0.0)
    scores = tl.dot(C, tl.trans(B), input_precision="ieee") * decay  # (CHUNK, CHUNK), without dt
    dscores = tl.dot(dy, tl.trans(x), input_precision="ieee") * dt[None, :]
    both = dscores * scores
    dscores = (dscores * decay).to(own)
    to_end = tl.exp(total - a)  # decay from each step to the chunk's end
    from_start = tl.exp(a)

    # gradient of dt x
    dxdt = tl.dot(tl.trans(scores.to(own)), dy, input_precision="ieee")
    ends = tl.dot(B, tl.trans(dend.to(own)), input_precision="ieee") * to_end[:, None]
    dxdt += ends
    x32 = x.to(tl.float32)
    dx = dxdt * dt[:, None]
    if HAS_D:
        D = tl.load(D_ptr + head)
        dx += D * dy.to(tl.float32)
        dD = tl.sum(tl.sum(dy.to(tl.float32) * x32, axis=1), axis=0)
        tl.atomic_add(dD_ptr + head, dD, sem="relaxed")
    tl.store(dx_ptr + tp, dx.to(dx_ptr.dtype.element_ty), mask=in_tp)

    tn = (row * T * H + head) * N_SIZE + t[:, None] * (H * N_SIZE) + n[None, :]
    read = tl.dot(dy, state.to(own), input_precision="ieee") * from_start[:, None]
    dC = tl.dot(dscores, B, input_precision="ieee") + read
    tl.store(dC_ptr + tn, dC.to(dC_ptr.dtype.element_ty), mask=in_tn)
    dB = tl.dot(tl.trans(dscores), C, input_precision="ieee")
    weighted = (x32 * (dt * to_end)[:, None]).to(own)
    dB += tl.dot(weighted, dend.to(own), input_precision="ieee")
    tl.store(dB_ptr + tn, dB.to(dB_ptr.dtype.element_ty), mask=in_tn)

    # gradient of the running sums a, then of each dt A: all sums from its step on
    written = tl.sum(ends * x32, axis=1) * dt
    da = tl.sum(both, axis=1) - tl.sum(both, axis=0) + tl.sum(read * C.to(tl.float32), axis=1) - written
    all_written = tl.sum(written, axis=0) + tl.exp(total) * tl.sum(tl.sum(state * dend, axis=1), axis=0)
    drate = tl.cumsum(da, axis=0, reverse=True) + all_written
    th = row * T * H + t * H + head
    ddt = tl.sum(dxdt * x32, axis=1) + drate * A
    tl.store(ddt_ptr + th, ddt, mask=in_t)
    tl.store(drate_ptr + th, drate, mask=in_t)


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
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Tensor]:
    """`longroll.ops.ssd` with the same arguments; always returns `(y, final_state)`."""
    with no_autocast(x):
        steps = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
        steps = F.softplus(steps) if dt_softplus else steps
        if dt_limit != (0.0, float("inf")):
            steps = steps.clamp(*dt_limit)
        state = initial_state
        if state is None:
            state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=torch.float32)
        y, final = _SSD.apply(x, steps, A.float(), B, C, cast(D, torch.float32), state.float())
        return (y if z is None else y * F.silu(z)), final


class _Call:
    """Shapes, strides and grids of one call."""

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> None:
        self.x, self.dt, self.A, self.B, self.C, self.D = x, dt.contiguous(), A.contiguous(), B, C, D
        self.batch, self.time, self.heads, self.width = x.shape
        self.order, self.ratio = B.shape[3], x.shape[2] // B.shape[2]
        self.chunks = triton.cdiv(self.time, CHUNK)
        self.grid = (self.batch, self.chunks, self.heads)
        self.sizes = (self.time, self.heads, self.chunks, self.ratio)
        self.ends = (self.width, self.order)
        # tensor cores multiply tiles of at least 16
        p, n = (max(16, triton.next_power_of_2(size)) for size in self.ends)
        self.options = {"CHUNK": CHUNK, "P": p, "N": n, "num_warps": WARPS}

    def states(self) -> Tensor:
        """Room for a state a chunk, (B, chunks, H, P, N) float32."""
        return self.A.new_empty(self.batch, self.chunks, self.heads, self.width, self.order)

    def carry(self, local: Tensor, decay: Tensor, first: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """The state that each chunk meets, and the one after the last, going forward or in reverse."""
        starts, last, size = torch.empty_like(local), torch.empty_like(first), self.width * self.order
        _pass_states[(self.batch * self.heads, triton.cdiv(size, _BLOCK))](
            local, decay, first.contiguous(), starts, last, self.heads, self.chunks, size,
            REVERSE=reverse, BLOCK=_BLOCK,
        )  # fmt: skip
        return starts, last


def _states(call: _Call, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state at the start of each chunk, and the final one."""
    local, decay = call.states(), call.A.new_empty(call.grid)
    _chunk_states[call.grid](
        call.x, call.dt, call.A, call.B, local, decay,
        *call.sizes, *call.x.stride(), *call.B.stride(), *call.ends, **call.options,
    )  # fmt: skip
    return call.carry(local, decay, state, reverse=False)


def _forward(call: _Call, state: Tensor) -> tuple[Tensor, Tensor]:
    starts, final = _states(call, state)
    y = torch.empty(call.x.shape, dtype=call.x.dtype, device=call.x.device)
    _chunk_outputs[call.grid](
        call.x, call.dt, call.A, call.B, call.C, call.A if call.D is None else call.D, starts, y,
        *call.sizes, *call.x.stride(), *call.B.stride(), *call.C.stride(), *call.ends,
        HAS_D=call.D is not None, **call.options,
    )  # fmt: skip
    return y, final


def _backward(call: _Call, state: Tensor, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    starts, _ = _states(call, state)
    local, decay = call.states(), call.A.new_empty(call.grid)
    _chunk_gradients_of_states[call.grid](
        call.dt, call.A, call.C, dy, local, decay,
        *call.sizes, *call.C.stride(), *call.ends, **call.options,
    )  # fmt: skip
    dends, dstate = call.carry(local, decay, dfinal, reverse=True)
    dx = torch.empty(call.x.shape, dtype=call.x.dtype, device=call.x.device)
    ddt, drate = torch.empty_like(call.dt), torch.empty_like(call.dt)
    dB, dC = (call.A.new_empty(*call.x.shape[:3], call.order) for _ in range(2))
    dD = torch.zeros_like(call.A)
    _chunk_gradients[call.grid](
        call.x, call.dt, call.A, call.B, call.C, call.A if call.D is None else call.D, starts, dends, dy,
        dx, ddt, drate, dB, dC, dD,
        *call.sizes, *call.x.stride(), *call.B.stride(), *call.C.stride(), *call.ends,
        HAS_D=call.D is not None, **call.options,
    )  # fmt: skip
    dB, dC = (g.unflatten(2, (-1, call.ratio)).sum(3).to(t.dtype) for g, t in ((dB, call.B), (dC, call.C)))
    dA = (drate * call.dt).sum((0, 1))
    return dx, ddt, dA, dB, dC, (None if call.D is None else dD), dstate


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state):
        ctx.save_for_backward(x, dt, A, B, C, D, state)
        return _forward(_Call(x, dt, A, B, C, D), state)

    @staticmethod
    def backward(ctx, dy, dfinal):
        *inputs, state = ctx.saved_tensors
        return _backward(_Call(*inputs), state, dy.contiguous(), dfinal)
