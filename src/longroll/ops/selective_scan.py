"""Mamba-1's selective scan with an initial state, in plain PyTorch, linear in time and memory.

A span of time is cut into blocks. All blocks step together through their own time, from a zero state, to find what
each adds to the state; a short loop carries the true state over the block starts; a second walk starts from those.
The walk stores the (time, N, D) states of one span only: backward keeps the block starts and walks again. Every
exponential is of `dt * A <= 0`, so nothing overflows however fast a state decays.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from longroll.ops._common import Span, cast, check_shape, needs_graph, no_autocast, spans, state_dtype


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
    output_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run Mamba-1's recurrence `h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t`, `y_t = h_t C_t + D x_t`, gated by z.

    Gradients flow into every tensor argument and from both outputs; double backward is not supported. Arithmetic is
    float32 (float64 when an input is float64), also under autocast.

    Args:
        x: inputs, (B, T, D), T >= 1.
        dt: step sizes, (B, T, D), before `dt_bias` and softplus; must end up >= 0.
        A: decay rates, (D, N), negative.
        B: input projections, (B, T, N).
        C: output projections, (B, T, N).
        D: skip weights, (D,).
        z: gate, (B, T, D): the output is multiplied by `silu(z)`.
        dt_bias: (D,), added to dt.
        dt_softplus: pass dt through softplus after the bias.
        initial_state: (B, D, N); zero when None.
        output_final_state: also return the state after the last step.

    Returns:
        y (B, T, D) in x's dtype, or `(y, final_state)` with the state (B, D, N) in float32 (float64).

    Raises:
        ValueError: a shape does not fit, or T is 0.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    dtype = state_dtype(*inputs)
    rates = A.to(dtype).t().contiguous()  # (N, D): channels last, so that every broadcast runs along memory
    state = None if initial_state is None else initial_state.to(dtype).transpose(1, 2)  # (B, N, D)
    arguments = (x, dt, rates, B, C, cast(D, dtype), z, cast(dt_bias, dtype), state)
    if needs_graph(*inputs):
        y, final = _Scan.apply(*arguments, dt_softplus, output_final_state)
    else:
        with no_autocast(x):
            y, final = _forward(*arguments, dt_softplus, None)
    return (y, final.transpose(1, 2)) if output_final_state else y


def _check(x, dt, A, B, C, D, z, dt_bias, initial_state) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must have shape (B, T, D) with T >= 1, got {tuple(x.shape)}")
    if A.dim() != 2:
        raise ValueError(f"A must have shape (D, N), got {tuple(A.shape)}")
    batch, time, width = x.shape
    order = A.shape[1]
    check_shape("A", A, (width, order), "D, N")
    check_shape("dt", dt, (batch, time, width), "B, T, D")
    check_shape("B", B, (batch, time, order), "B, T, N")
    check_shape("C", C, (batch, time, order), "B, T, N")
    check_shape("D", D, (width,), "D")
    check_shape("z", z, (batch, time, width), "B, T, D")
    check_shape("dt_bias", dt_bias, (width,), "D")
    check_shape("initial_state", initial_state, (batch, width, order), "B, D, N")


def _plan(x: Tensor, order: int) -> list[Span]:
    """Choose spans whose (time, B, N, D) buffers stay in the last-level cache (CPU) or fill the device (GPU)."""
    batch, time, width = x.shape
    step = batch * width * order  # numbers in one state
    length, budget = (16, 1 << 20) if x.device.type == "cpu" else (32, 1 << 26)
    return list(spans(time, length, max(1, budget // (step * length))))


class _Buffers:
    """(time, B, blocks, N, D) work space, allocated once a call and viewed at each span's size."""

    def __init__(self, plan: list[Span], batch: int, rates: Tensor, count: int) -> None:
        self.batch, self.state = batch, rates.shape
        steps = max(span.blocks * span.length for span in plan)
        self.flat = [rates.new_empty(steps * batch * rates.numel()) for _ in range(count)]

    def view(self, span: Span) -> list[Tensor]:
        shape = (span.length, self.batch, span.blocks, *self.state)
        return [flat[: math.prod(shape)].view(shape) for flat in self.flat]


def _cut(tensor: Tensor, span: Span, dtype: torch.dtype) -> Tensor:
    """(B, T, F) -> the span's (length, B, blocks, F), a view where dtype allows."""
    part = tensor[:, span.start : span.stop].to(dtype)
    if part.stride(-1) != 1:
        part = part.contiguous()
    return part.unflatten(1, (span.blocks, span.length)).permute(2, 0, 1, 3)


def _paste(target: Tensor, span: Span, value: Tensor) -> None:
    """Write a (length, B, blocks, F) result into its place in (B, T, F)."""
    target[:, span.start : span.stop].unflatten(1, (span.blocks, span.length)).copy_(
        value.permute(1, 2, 0, 3)
    )


def _step_sizes(raw: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    raw = raw if bias is None else raw + bias
    return F.softplus(raw) if softplus else raw


def _load(decay: Tensor, h: Tensor, rates: Tensor, dt: Tensor, dtx: Tensor, B: Tensor) -> None:
    """Fill `decay` with exp(dt A) and `h` with what each step adds to the state."""
    torch.mul(dt.unsqueeze(3), rates, out=decay).exp_()
    torch.mul(dtx.unsqueeze(3), B.unsqueeze(4), out=h)


def _starts(decay: Tensor, h: Tensor, rates: Tensor, dt: Tensor, state: Tensor) -> Tensor:
    """States at the start of each block, (B, blocks, N, D), given the one at the start of the first."""
    starts = torch.empty_like(h[0])
    starts[:, 0] = state
    if starts.shape[1] > 1:
        added = h[0, :, :-1].clone()
        for d, a in zip(decay[1:, :, :-1].unbind(0), h[1:, :, :-1].unbind(0), strict=True):
            torch.addcmul(a, d, added, out=added)
        across = torch.exp(dt[:, :, :-1].sum(0).unsqueeze(2) * rates)
        for i in range(added.shape[1]):
            torch.addcmul(added[:, i], across[:, i], starts[:, i], out=starts[:, i + 1])
    return starts


def _walk(decay: Tensor, h: Tensor, starts: Tensor) -> None:
    """Turn `h` from what each step adds into the state after each step."""
    before = starts
    for d, now in zip(decay.unbind(0), h.unbind(0), strict=True):
        now.addcmul_(d, before)
        before = now


def _forward(
    x, dt, rates, B, C, D, z, dt_bias, state, softplus, keep: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Outputs and final state (B, N, D); appends each span's block starts to `keep`."""
    dtype, plan = rates.dtype, _plan(x, rates.shape[0])
    buffers = _Buffers(plan, x.shape[0], rates, 2)
    if state is None:
        state = rates.new_zeros(x.shape[0], *rates.shape)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for span in plan:
        decay, h = buffers.view(span)
        x_, B_, C_ = (_cut(t, span, dtype) for t in (x, B, C))
        dt_ = _step_sizes(_cut(dt, span, dtype), dt_bias, softplus)
        _load(decay, h, rates, dt_, dt_ * x_, B_)
        starts = _starts(decay, h, rates, dt_, state)
        _walk(decay, h, starts)
        state = h[-1, :, -1].clone()
        out = torch.matmul(C_.unsqueeze(3), h).squeeze(3)
        if D is not None:
            out.addcmul_(x_, D)
        if z is not None:
            out.mul_(F.silu(_cut(z, span, dtype)))
        _paste(y, span, out)
        if keep is not None:
            keep.append(starts)
    return y, state


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, rates, B, C, D, z, dt_bias, state, softplus, want_final):
        keep: list[Tensor] = []
        with no_autocast(x):
            y, final = _forward(x, dt, rates, B, C, D, z, dt_bias, state, softplus, keep)
        ctx.save_for_backward(x, dt, rates, B, C, D, z, dt_bias, *keep)
        ctx.softplus = softplus
        ctx.set_materialize_grads(False)
        return y, (final if want_final else None)

    @staticmethod
    def backward(ctx, dy, dfinal):
        x, dt, rates, B, C, D, z, dt_bias, *keep = ctx.saved_tensors
        with no_autocast(x):
            grads = _backward(x, dt, rates, B, C, D, z, dt_bias, ctx.softplus, keep, dy, dfinal)
        return (
            *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)),
            None,
            None,
        )


def _backward(x, dt, rates, B, C, D, z, dt_bias, softplus, keep, dy, dfinal) -> tuple[Tensor | None, ...]:
    dtype, plan = rates.dtype, _plan(x, rates.shape[0])
    buffers = _Buffers(plan, x.shape[0], rates, 3)
    dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    drates = torch.zeros_like(rates)
    dD = None if D is None else torch.zeros_like(D)
    ddt_bias = None if dt_bias is None else torch.zeros_like(dt_bias)
    dstate = rates.new_zeros(x.shape[0], *rates.shape) if dfinal is None else dfinal
    if dy is None:
        dy = torch.zeros_like(x)
    for span, starts in zip(reversed(plan), reversed(keep), strict=True):
        decay, h, g = buffers.view(span)
        x_, B_, C_, dy_ = (_cut(t, span, dtype) for t in (x, B, C, dy))
        raw = _cut(dt, span, dtype)
        raw = raw if dt_bias is None else raw + dt_bias
        dt_ = F.softplus(raw) if softplus else raw
        dtx = dt_ * x_
        _load(decay, h, rates, dt_, dtx, B_)
        _walk(decay, h, starts)

        if z is not None:
            z_ = _cut(z, span, dtype)
            ungated = torch.matmul(C_.unsqueeze(3), h).squeeze(3)
            if D is not None:
                ungated.addcmul_(x_, D)
            sigmoid = torch.sigmoid(z_)
            gate = z_ * sigmoid
            _paste(dz, span, dy_ * ungated * (sigmoid + gate * (1 - sigmoid)))
            dy_ = dy_ * gate

        torch.mul(C_.unsqueeze(4), dy_.unsqueeze(3), out=g)
        _paste(dC, span, torch.matmul(h, dy_.unsqueeze(4)).squeeze(4))
        dstate = _walk_back(decay, g, rates, dt_, dstate)  # g: gradient of the state after each step
        _paste(dB, span, torch.matmul(g, dtx.unsqueeze(4)).squeeze(4))
        ddtx = torch.matmul(B_.unsqueeze(3), g).squeeze(3)

        g.mul_(decay)
        g[1:].mul_(h[:-1])
        g[0].mul_(starts)  # g: gradient of dt A
        drates += torch.mul(g, dt_.unsqueeze(3), out=h).sum((0, 1, 2))
        ddt_ = torch.mul(g, rates, out=h).sum(3).addcmul_(ddtx, x_)
        if softplus:
            ddt_ = ddt_ * torch.sigmoid(raw)
        _paste(ddt, span, ddt_)
        if ddt_bias is not None:
            ddt_bias += ddt_.sum((0, 1, 2))
        dx_ = ddtx.mul_(dt_)
        if D is not None:
            dx_.addcmul_(dy_, D)
            dD += (dy_ * x_).sum((0, 1, 2))
        _paste(dx, span, dx_)
    return dx, ddt, drates, dB, dC, dD, dz, ddt_bias, dstate


def _walk_back(decay: Tensor, g: Tensor, rates: Tensor, dt: Tensor, dstate: Tensor) -> Tensor:
    """Turn `g` from each output's gradient into each state's, (time, B, blocks, N, D), by reverse accumulation.

    `dstate` (B, N, D) is the gradient of the state after the span; returns that of the state before it.
    """
    ends = torch.empty_like(g[0])  # gradients that reach each block from later ones
    ends[:, -1] = dstate
    if ends.shape[1] > 1:
        local = g[-1, :, 1:].clone()
        for d, now in zip(
            reversed(decay[1:, :, 1:].unbind(0)), reversed(g[:-1, :, 1:].unbind(0)), strict=True
        ):
            torch.addcmul(now, d, local, out=local)
        local.mul_(decay[0, :, 1:])
        across = torch.exp(dt[:, :, 1:].sum(0).unsqueeze(2) * rates)
        for i in reversed(range(local.shape[1])):
            torch.addcmul(local[:, i], across[:, i], ends[:, i + 1], out=ends[:, i])
    g[-1].add_(ends)
    after = g[-1]
    for d, now in zip(reversed(decay[1:].unbind(0)), reversed(g[:-1].unbind(0)), strict=True):
        now.addcmul_(d, after)
        after = now
    return decay[0, :, 0] * g[0, :, 0]
