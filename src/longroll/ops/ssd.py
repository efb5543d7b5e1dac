"""Mamba-2's recurrence (state space duality) in chunks, with an initial state, in plain PyTorch.

Inside a chunk the recurrence is a masked attention, `(C B^T * decay) (dt x)`: matrix products. Between chunks the
state moves by a short loop. Backward keeps the state at the start of each chunk and recomputes the rest, a few
chunks at a time. Decays are exponentials of differences of running sums; these are summed in float64 and subtracted
as float32 pairs, so that a strong decay early in a chunk costs the later ones no digits.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longroll.ops._common import Span, cast, check_shape, needs_graph, no_autocast, spans, state_dtype

INFINITY = float("inf")


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
    output_final_state: bool = False,
    chunk_size: int | None = None,
    dt_limit: tuple[float, float] = (0.0, INFINITY),
) -> Tensor | tuple[Tensor, Tensor]:
    """Run Mamba-2's recurrence `h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T`, `y_t = h_t C_t + D x_t`, gated by z.

    Gradients flow into every tensor argument and from both outputs; double backward is not supported. Arithmetic is
    float32 (float64 when an input is float64), also under autocast.

    Args:
        x: inputs, (B, T, H, P), T >= 1.
        dt: step sizes, (B, T, H), before `dt_bias`, softplus and `dt_limit`; must end up >= 0.
        A: decay rates, (H,), negative.
        B: input projections, (B, T, G, N); head h uses group h // (H / G).
        C: output projections, (B, T, G, N).
        D: skip weights, (H,).
        z: gate, (B, T, H, P): the output is multiplied by `silu(z)`.
        dt_bias: (H,), added to dt.
        dt_softplus: pass dt through softplus after the bias.
        initial_state: (B, H, P, N); zero when None.
        output_final_state: also return the state after the last step.
        chunk_size: time steps a chunk; only speed and memory depend on it. None: what measured fastest.
        dt_limit: smallest and largest step size, applied last, as in transformers.

    Returns:
        y (B, T, H, P) in x's dtype, or `(y, final_state)` with the state (B, H, P, N) in float32 (float64).

    Raises:
        ValueError: a shape does not fit, H is not a multiple of G, or T or chunk_size is below 1.

    Source: Dao and Gu, "Transformers are SSMs", 2024, section 6.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, chunk_size)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    dtype = state_dtype(*inputs)
    options = _Options(dt_softplus, dt_limit, output_final_state, tuple(_plan(x, chunk_size)))
    state = None if initial_state is None else _state_in(initial_state.to(dtype), B.shape[2])
    arguments = (x, dt, A.to(dtype), B, C, cast(D, dtype), z, cast(dt_bias, dtype), state, options)
    if needs_graph(*inputs):
        y, final = _SSD.apply(*arguments)
    else:
        with no_autocast(x):
            y, final = _forward(*arguments, None)
    return (y, _state_out(final, x.shape[2:])) if output_final_state else y


def _check(x, dt, A, B, C, D, z, dt_bias, initial_state, chunk_size) -> None:
    if x.dim() != 4 or x.shape[1] == 0:
        raise ValueError(f"x must have shape (B, T, H, P) with T >= 1, got {tuple(x.shape)}")
    if B.dim() != 4 or x.shape[2] % B.shape[2]:
        raise ValueError(
            f"B must have shape (B, T, G, N) with G dividing H = {x.shape[2]}, got {tuple(B.shape)}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    batch, time, heads, width = x.shape
    check_shape("dt", dt, (batch, time, heads), "B, T, H")
    check_shape("A", A, (heads,), "H")
    check_shape("B", B, (batch, time, *B.shape[2:]), "B, T, G, N")
    check_shape("C", C, tuple(B.shape), "B, T, G, N")
    check_shape("D", D, (heads,), "H")
    check_shape("z", z, tuple(x.shape), "B, T, H, P")
    check_shape("dt_bias", dt_bias, (heads,), "H")
    check_shape("initial_state", initial_state, (batch, heads, width, B.shape[3]), "B, H, P, N")


class _Options(NamedTuple):
    softplus: bool
    limit: tuple[float, float]
    want_final: bool
    plan: tuple[Span, ...]


def _plan(x: Tensor, chunk_size: int | None) -> list[Span]:
    """Choose chunks, and how many of them are in work at once, by the size of their (q, q) decay matrices."""
    batch, time, heads, _ = x.shape
    cpu = x.device.type == "cpu"
    length = chunk_size or (128 if time <= 128 else 64)
    budget = (1 << 18) if cpu else (1 << 25)
    return list(spans(time, length, max(1, budget // (batch * heads * length * length))))


def _state_in(state: Tensor, groups: int) -> Tensor:
    """(B, H, P, N) -> (B, G, N, H/G * P): heads of a group share one matrix product with their B and C."""
    return state.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3).flatten(3)


def _state_out(state: Tensor, head_shape: torch.Size) -> Tensor:
    """(B, G, N, H/G * P) -> (B, H, P, N)."""
    heads, width = head_shape
    return state.unflatten(3, (-1, width)).permute(0, 1, 3, 4, 2).reshape(state.shape[0], heads, width, -1)


def _cut(tensor: Tensor, span: Span, dtype: torch.dtype) -> Tensor:
    """(B, T, ...) -> the span's (B, c, q, ...), a view where dtype allows."""
    return tensor[:, span.start : span.stop].to(dtype).unflatten(1, (span.blocks, span.length))


class _Chunk(NamedTuple):
    """What forward and backward both need of a span: c chunks of q steps; r heads in each of g groups."""

    x: Tensor  # (B, c, q, h, p)
    raw: Tensor  # (B, c, q, h) dt before softplus and limits
    positive: Tensor  # (B, c, q, h) dt before limits
    dt: Tensor  # (B, c, q, h)
    B: Tensor  # (B, c, g, q, n)
    C: Tensor  # (B, c, g, q, n)
    total: Tensor  # (B, c, h, q) log decay from the chunk's start through each step
    remaining: Tensor  # (B, c, h, q) log decay from each step to the chunk's end
    decay: Tensor  # (B, c, h, q, q) from column to row, 0 above the diagonal
    scores: Tensor  # (B, c, g, q, q) C B^T
    dtx: Tensor  # (B, c, h, q, p)


def _chunk(x, dt, A, B, C, dt_bias, options: _Options, span: Span) -> _Chunk:
    dtype = A.dtype
    x_ = _cut(x, span, dtype)
    raw = _cut(dt, span, dtype)
    raw = raw if dt_bias is None else raw + dt_bias
    positive = F.softplus(raw) if options.softplus else raw
    dt_ = (
        positive if options.limit == (0.0, INFINITY) and options.softplus else positive.clamp(*options.limit)
    )
    B_, C_ = (_cut(t, span, dtype).transpose(2, 3) for t in (B, C))
    total, remaining, decay = _decays((dt_ * A).transpose(2, 3))
    dtx = (x_ * dt_.unsqueeze(-1)).transpose(2, 3).contiguous()
    return _Chunk(x_, raw, positive, dt_, B_, C_, total, remaining, decay, torch.matmul(C_, B_.mT), dtx)


def _decays(rates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From log decays (..., q) to those summed from the start, those left to the end, and exp of all differences."""
    exact = rates.double().cumsum(-1)
    total = exact.to(rates.dtype)
    remaining = (exact[..., -1:] - exact).to(rates.dtype)
    decay = total.unsqueeze(-1) - total.unsqueeze(-2)
    if rates.dtype != torch.float64:
        rest = (exact - total).to(rates.dtype)
        decay.add_(rest.unsqueeze(-1)).sub_(rest.unsqueeze(-2))
    return total, remaining, decay.clamp_(max=0).exp_().tril_()


def _per_head(chunk: _Chunk, value: Tensor, weight: Tensor) -> Tensor:
    """Scale (B, c, q, h, p) values by a (B, c, h, q) weight and lay them out by group, (B, c, g, q, r * p)."""
    scaled = value * weight.transpose(2, 3).unsqueeze(-1)
    return scaled.unflatten(3, (chunk.B.shape[2], -1)).flatten(4).transpose(2, 3)


def _forward(x, dt, A, B, C, D, z, dt_bias, state, options: _Options, keep: list | None):
    """Outputs and final state (B, g, n, r * p); appends each span's chunk start states to `keep`."""
    dtype = A.dtype
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for span in options.plan:
        chunk = _chunk(x, dt, A, B, C, dt_bias, options, span)
        mixer = _mix(chunk)
        out = torch.matmul(mixer, chunk.dtx).transpose(2, 3)  # (B, c, q, h, p)
        last = span.stop == x.shape[1]
        starts, state = _carry(chunk, state, skip_last=last and not options.want_final)
        if keep is not None:
            keep.append(starts)
        if starts is not None:
            out = out + _from_states(chunk, starts)
        if D is not None:
            out = out.addcmul(chunk.x, D.unsqueeze(-1))
        if z is not None:
            out = out * F.silu(_cut(z, span, dtype))
        y[:, span.start : span.stop].unflatten(1, (span.blocks, span.length)).copy_(out)
    return y, state


def _mix(chunk: _Chunk) -> Tensor:
    """The masked attention matrix, (B, c, h, q, q)."""
    groups = chunk.scores.shape[2]
    return (chunk.decay.unflatten(2, (groups, -1)) * chunk.scores.unsqueeze(3)).flatten(2, 3)


def _carry(chunk: _Chunk, state: Tensor | None, skip_last: bool) -> tuple[Tensor | None, Tensor | None]:
    """States at the start of each chunk, (B, c, g, n, r * p), and after the last one (unless skipped).

    None stands for zero: a lone first chunk then has no state to read.
    """
    blocks = chunk.x.shape[1]
    if skip_last and blocks == 1:
        return (None if state is None else state.unsqueeze(1)), None
    weighted = _per_head(chunk, chunk.x, chunk.remaining.exp() * chunk.dt.transpose(2, 3))
    added = torch.matmul(chunk.B.mT, weighted)  # (B, c, g, n, r * p)
    kept = _chunk_decay(chunk)
    if state is None:
        state = torch.zeros_like(added[:, 0])
    starts = []
    for i in range(blocks):
        starts.append(state)
        if not (skip_last and i == blocks - 1):
            state = torch.addcmul(added[:, i], kept[:, i], state)
    return torch.stack(starts, 1), state


def _chunk_decay(chunk: _Chunk) -> Tensor:
    """Decay across each chunk, broadcastable to its states: (B, c, g, 1, r * p)."""
    groups, width = chunk.B.shape[2], chunk.x.shape[-1]
    across = chunk.total[..., -1].exp().unflatten(2, (groups, -1))
    return across.repeat_interleave(width, -1).unsqueeze(-2)


def _from_states(chunk: _Chunk, starts: Tensor) -> Tensor:
    """What the chunk start states give to the outputs, (B, c, q, h, p)."""
    read = torch.matmul(chunk.C, starts).transpose(2, 3).reshape(chunk.x.shape)
    return read.mul_(chunk.total.exp().transpose(2, 3).unsqueeze(-1))


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, dt_bias, state, options):
        keep: list[Tensor | None] = []
        with no_autocast(x):
            y, final = _forward(x, dt, A, B, C, D, z, dt_bias, state, options, keep)
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, *keep)
        ctx.options, ctx.has_state = options, state is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx, dy, dfinal):
        x, dt, A, B, C, D, z, dt_bias, *keep = ctx.saved_tensors
        with no_autocast(x):
            grads = _backward(x, dt, A, B, C, D, z, dt_bias, ctx.has_state, ctx.options, keep, dy, dfinal)
        return (*(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), None)


def _backward(
    x, dt, A, B, C, D, z, dt_bias, has_state, options, keep, dy, dfinal
) -> tuple[Tensor | None, ...]:
    dtype = A.dtype
    dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dA = torch.zeros_like(A)
    dD = None if D is None else torch.zeros_like(D)
    ddt_bias = None if dt_bias is None else torch.zeros_like(dt_bias)
    dstate = dfinal
    if dy is None:
        dy = torch.zeros_like(x)
    for span, starts in zip(reversed(options.plan), reversed(keep), strict=True):
        chunk = _chunk(x, dt, A, B, C, dt_bias, options, span)
        groups, width = chunk.B.shape[2], chunk.x.shape[-1]
        mixer = _mix(chunk)
        dy_ = _cut(dy, span, dtype)
        read = None if starts is None else _from_states(chunk, starts)

        def paste(target: Tensor, value: Tensor, span: Span = span) -> None:
            target[:, span.start : span.stop].unflatten(1, (span.blocks, span.length)).copy_(value)

        if z is not None:
            out = torch.matmul(mixer, chunk.dtx).transpose(2, 3)
            out = out if read is None else out + read
            out = out if D is None else out.addcmul(chunk.x, D.unsqueeze(-1))
            z_ = _cut(z, span, dtype)
            sigmoid = torch.sigmoid(z_)
            gate = z_ * sigmoid
            paste(dz, dy_ * out * (sigmoid + gate * (1 - sigmoid)))
            dy_ = dy_ * gate

        # Within the chunk: y = (scores * decay) dtx.
        dy_heads = dy_.transpose(2, 3).contiguous()  # (B, c, h, q, p)
        dmixer = torch.matmul(dy_heads, chunk.dtx.mT)  # (B, c, h, q, q); decay masks it below
        ddtx = torch.matmul(mixer.mT, dy_heads)
        crossing = mixer.mul_(dmixer).tril_(-1)  # gradient of each log decay from column to row
        dlog = _reverse_sum(crossing.sum(-1) - crossing.sum(-2))
        dscores = dmixer.mul_(chunk.decay).unflatten(2, (groups, -1)).sum(3)
        dC_ = torch.matmul(dscores, chunk.B)  # (B, c, g, q, n)
        dB_ = torch.matmul(dscores.mT, chunk.C)

        # From the chunk's start state into its outputs.
        from_start = None
        if starts is not None:
            dread = _per_head(chunk, dy_, chunk.total.exp())  # (B, c, g, q, r * p)
            dC_ += torch.matmul(dread, starts.mT)
            from_start = torch.matmul(chunk.C.mT, dread)  # (B, c, g, n, r * p)
            dlog += _reverse_sum((dy_ * read).sum(-1).transpose(2, 3))

        # From the chunk's steps and start state into its end state.
        dends, dstate = _carry_back(chunk, dstate, from_start, has_state or span.start > 0)
        if dends is not None:
            leaving = chunk.remaining.exp()
            weighted = _per_head(chunk, chunk.x, leaving * chunk.dt.transpose(2, 3))
            dB_ += torch.matmul(weighted, dends.mT)
            dweighted = torch.matmul(chunk.B, dends).unflatten(4, (-1, width)).transpose(3, 4).flatten(2, 3)
            dleft = dweighted * leaving.unsqueeze(-1)  # (B, c, h, q, p)
            ddtx += dleft
            passed = (dleft * chunk.dtx).sum(-1)
            dlog[..., 1:] += passed.cumsum(-1)[..., :-1]
            if starts is not None:
                through = (dends * starts * _chunk_decay(chunk)).sum(-2).unflatten(-1, (-1, width)).sum(-1)
                dlog += through.flatten(2, 3).unsqueeze(-1)

        dlog = dlog.transpose(2, 3)  # (B, c, q, h): gradient of dt A
        ddtx = ddtx.transpose(2, 3)  # (B, c, q, h, p)
        dA += (dlog * chunk.dt).sum((0, 1, 2))
        ddt_ = (ddtx * chunk.x).sum(-1).addcmul(dlog, A)
        low, high = options.limit
        ddt_ = ddt_ * ((chunk.positive >= low) & (chunk.positive <= high))
        if options.softplus:
            ddt_ = ddt_ * torch.sigmoid(chunk.raw)
        if ddt_bias is not None:
            ddt_bias += ddt_.sum((0, 1, 2))
        paste(ddt, ddt_)
        dx_ = ddtx * chunk.dt.unsqueeze(-1)
        if D is not None:
            dx_.addcmul_(dy_, D.unsqueeze(-1))
            dD += (dy_ * chunk.x).sum((0, 1, 2, 4))
        paste(dx, dx_)
        paste(dB, dB_.transpose(2, 3))
        paste(dC, dC_.transpose(2, 3))
    return dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dstate


def _reverse_sum(value: Tensor) -> Tensor:
    """Sums from each position to the end, added up in float64 since large terms cancel."""
    return value.double().flip(-1).cumsum(-1).flip(-1).to(value.dtype)


def _carry_back(
    chunk: _Chunk, dstate: Tensor | None, from_start: Tensor | None, want_first: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of each chunk's end state, (B, c, g, n, r * p), and of the state before the span; None is zero."""
    blocks = chunk.x.shape[1]
    if dstate is None and blocks == 1:
        return None, (None if from_start is None else from_start[:, 0])
    kept = _chunk_decay(chunk)
    dends = torch.empty_like(from_start) if from_start is not None else dstate.new_empty(0)
    if from_start is None:
        return dstate.unsqueeze(1), (kept[:, 0] * dstate if want_first else None)
    dstate = torch.zeros_like(from_start[:, 0]) if dstate is None else dstate
    for i in reversed(range(blocks)):
        dends[:, i] = dstate
        if i > 0 or want_first:
            dstate = torch.addcmul(from_start[:, i], kept[:, i], dstate)
    return dends, (dstate if want_first else None)
