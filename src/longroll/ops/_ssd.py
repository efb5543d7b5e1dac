"""Mamba-2's recurrence (state space duality) in chunks, with an initial state, in plain PyTorch.

Inside a chunk the recurrence is a masked attention, `(C B^T * decay) (dt x)`: matrix products. Between chunks
the state moves by a short loop. Backward keeps the states at the chunk starts and recomputes the rest, a few
chunks at a time. Decays are exponentials of differences of running sums; these are summed in float64 and
subtracted as float32 pairs, so that a strong decay early in a chunk costs the later ones no digits.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longroll.ops._backend import kernel_for
from longroll.ops._common import (
    LOG2_E,
    NO_LIMIT,
    Scratch,
    Span,
    cast,
    check_floats,
    check_shape,
    needs_graph,
    no_autocast,
    plainly,
    room_for,
    spans,
    state_dtype,
    ungate,
    zeros_for,
)


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
    dt_limit: tuple[float, float] = NO_LIMIT,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run Mamba-2: `h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T`, `y_t = h_t C_t + D x_t`, gated by z.

    Gradients flow into every tensor argument and from both outputs; double backward is not supported.
    Arithmetic is float32 (float64 when an input is float64), also under autocast.

    Args:
        x: inputs, (B, T, H, P), T >= 1.
        dt: step sizes, (B, T, H), before `dt_bias`, softplus and `dt_limit`; must end up >= 0.
        A: decay rates, (H,), negative.
        B: input projections, (B, T, G, N); head h uses group h // (H / G).
        C: output projections, (B, T, G, N).
        D: skip weights, (H,), or (H, P): one for each channel.
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
        ValueError: a shape does not fit, an input is complex or of integers, H is not a multiple of G, or T
            or chunk_size is below 1.

    Source: Dao and Gu, "Transformers are SSMs", 2024, section 6.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, chunk_size)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    dtype = state_dtype(*inputs)
    kernel = kernel_for("ssd", x, B, *inputs)
    if kernel is not None:
        y, final = kernel(*inputs[:8], dt_softplus, initial_state, dt_limit=dt_limit)
        assert final is not None  # this kernel always returns it
        return (y, final) if output_final_state else y
    options = _Options(dt_softplus, (dt_limit[0], dt_limit[1]), output_final_state, _plan(x, chunk_size))
    state = None if initial_state is None else _state_in(initial_state.to(dtype), B.shape[2])
    arguments = (x, dt, A.to(dtype), B, C, cast(D, dtype), z, cast(dt_bias, dtype), state, options)
    if needs_graph(*inputs):
        y, final = _SSD.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        with no_autocast(x):
            y, final = plainly(_forward, *arguments, None)
    if not output_final_state:
        return y
    assert final is not None
    return y, _state_out(final, x.shape[2], x.shape[3])


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int | None,
) -> None:
    check_floats("x", x)
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
    if D is not None and D.dim() == 2:
        check_shape("D", D, (heads, width), "H, P")
    else:
        check_shape("D", D, (heads,), "H")
    check_shape("z", z, tuple(x.shape), "B, T, H, P")
    check_shape("dt_bias", dt_bias, (heads,), "H")
    check_shape("initial_state", initial_state, (batch, heads, width, B.shape[3]), "B, H, P, N")


class _Options(NamedTuple):
    softplus: bool
    limit: tuple[float, float]
    want_final: bool
    plan: tuple[Span, ...]


def _plan(x: Tensor, chunk_size: int | None) -> tuple[Span, ...]:
    """Choose chunks, and how many of them are in work at once, by the size of their (q, q) decay matrices.

    Measured on 2 CPU cores with 24 heads of 64 and with 4: 64 steps a chunk are fastest, but one chunk of up
    to 128 beats two, since it has no state to pass on.
    """
    batch, time, heads, _ = x.shape
    length = chunk_size or (time if time <= 128 else 64)
    budget = (1 << 18) if x.device.type == "cpu" else (1 << 25)
    return tuple(spans(time, length, max(1, budget // (batch * heads * length * length))))


def _state_in(state: Tensor, groups: int) -> Tensor:
    """Return (B, H, P, N) -> (B, g, N, r P): heads of a group share one matrix product with their B and C."""
    grouped: Tensor = state.unflatten(1, (groups, -1))
    return grouped.permute(0, 1, 4, 2, 3).flatten(3)


def _state_out(state: Tensor, heads: int, width: int) -> Tensor:
    """Return (B, g, N, r P) -> (B, H, P, N)."""
    parted: Tensor = state.unflatten(3, (-1, width))
    return parted.permute(0, 1, 3, 4, 2).reshape(state.shape[0], heads, width, -1)


def _heads(tensor: Tensor, span: Span, groups: int) -> Tensor:
    """View the span of (B, T, H, ...) as (B, c, g, r, q, ...)."""
    part = tensor[:, span.start : span.stop].unflatten(1, (span.blocks, span.length))
    grouped: Tensor = part.unflatten(3, (groups, -1))
    return grouped.movedim(2, 4)


def _groups(tensor: Tensor, span: Span) -> Tensor:
    """View the span of (B, T, G, N) as (B, c, g, q, N)."""
    part: Tensor = tensor[:, span.start : span.stop].unflatten(1, (span.blocks, span.length))
    return part.transpose(2, 3)


class _Chunks(NamedTuple):
    """What forward and backward both need of a span: c chunks of q steps, g groups of r heads."""

    x: Tensor  # (B, c, g, r, q, p)
    raw: Tensor  # (B, c, g, r, q) dt before softplus and limits
    positive: Tensor  # (B, c, g, r, q) dt before limits
    dt: Tensor  # (B, c, g, r, q)
    dtx: Tensor  # (B, c, g, r, q, p)
    B: Tensor  # (B, c, g, q, n)
    C: Tensor  # (B, c, g, q, n)
    arriving: Tensor  # (B, c, g, r, q) decay from the chunk's start through each step
    leaving: Tensor  # (B, c, g, r, q) decay after each step to the chunk's end
    decay: Tensor  # (B, c, g, r, q, q) decay after the column's step through the row's; 1 above the diagonal
    scores: Tensor  # (B, c, g, q, q) C B^T, 0 above the diagonal
    mixer: Tensor  # (B, c, g, r, q, q) scores * decay: y = mixer dtx


def _load(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    options: _Options,
    span: Span,
    scratch: Scratch,
) -> _Chunks:
    dtype, groups, per_head = A.dtype, B.shape[2], (B.shape[2], -1, 1)
    x_, raw = (_heads(t, span, groups).to(dtype) for t in (x, dt))
    B_, C_ = (_groups(t, span).to(dtype) for t in (B, C))
    raw = raw if dt_bias is None else raw + dt_bias.view(per_head)
    positive = F.softplus(raw) if options.softplus else raw
    dt_ = positive if options.softplus and options.limit == NO_LIMIT else positive.clamp(*options.limit)
    dtx = torch.mul(x_, dt_.unsqueeze(-1), out=scratch("dtx", *x_.shape))
    log_steps = dt_.double() * (A.double() * LOG2_E).view(per_head)
    arriving, leaving, decay = _decays(log_steps, dtype, scratch)
    scores = torch.matmul(C_, B_.mT, out=scratch("scores", *B_.shape[:-1], B_.shape[-2])).tril_()
    mixer = torch.mul(decay, scores.unsqueeze(3), out=scratch("mixer", *decay.shape))
    return _Chunks(x_, raw, positive, dt_, dtx, B_, C_, arriving, leaving, decay, scores, mixer)


def _decays(log_steps: Tensor, dtype: torch.dtype, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """Return from the log2 decay of each step (..., q): decays up to, after and between (row, column)
    steps.
    """
    exact = log_steps.cumsum(-1)
    total = exact.to(dtype)
    decay = torch.sub(
        total.unsqueeze(-1), total.unsqueeze(-2), out=scratch("decay", *total.shape, total.shape[-1])
    )
    if total.dtype != torch.float64:
        rest = (exact - total).to(total.dtype)
        decay.add_(rest.unsqueeze(-1)).sub_(rest.unsqueeze(-2))
    leaving = (exact[..., -1:] - exact).to(total.dtype)
    return total.exp2_(), leaving.exp2_(), decay.clamp_(max=0).exp2_()


def _by_step(values: Tensor, weight: Tensor, name: str, scratch: Scratch) -> Tensor:
    """Weigh (..., r, q, p) by (..., r, q) and lay the heads of a step side by side: (..., q, r p)."""
    values = values.transpose(3, 4)
    return torch.mul(values, weight.mT.unsqueeze(-1), out=scratch(name, *values.shape)).flatten(4)


def _product(left: Tensor, right: Tensor, name: str, scratch: Scratch) -> Tensor:
    return torch.matmul(left, right, out=scratch(name, *left.shape[:-1], right.shape[-1]))


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    options: _Options,
    keep: list[Tensor | None] | None,
) -> tuple[Tensor, Tensor | None]:
    """Return outputs and final state (B, g, n, r p); appends each span's chunk start states to `keep`."""
    scratch, groups = Scratch(A), B.shape[2]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for span in options.plan:
        chunks = _load(x, dt, A, B, C, dt_bias, options, span, scratch)
        last = span.stop == x.shape[1]
        starts, state = _carry(chunks, state, skip_last=last and not options.want_final, scratch=scratch)
        read = None if starts is None else _read(chunks, starts, scratch)
        out = _output(chunks, read, D, scratch)
        if z is not None:
            z_ = _heads(z, span, groups).to(A.dtype)
            out.mul_(torch.sigmoid(z_, out=scratch("sigmoid", *z_.shape))).mul_(z_)
        _heads(y, span, groups).copy_(out)
        if keep is not None:
            keep.append(starts)
    return y, state


def _carry(
    chunks: _Chunks, state: Tensor | None, skip_last: bool, scratch: Scratch
) -> tuple[Tensor | None, Tensor | None]:
    """Return states at the start of each chunk, (B, c, g, n, r p), and after the last one (None when
    skipped).

    A state of None is zero: a single first chunk then has no state to read.
    """
    blocks = chunks.x.shape[1]
    if skip_last and blocks == 1:
        return (None if state is None else state.unsqueeze(1)), None
    weighted = _by_step(chunks.dtx, chunks.leaving, "weighted", scratch)
    added = _product(chunks.B.mT, weighted, "added", scratch)  # (B, c, g, n, r p)
    kept = _kept(chunks)
    starts = torch.empty_like(added)
    starts[:, 0] = 0 if state is None else state
    for i in range(blocks - 1):
        torch.addcmul(added[:, i], kept[:, i], starts[:, i], out=starts[:, i + 1])
    return starts, (None if skip_last else torch.addcmul(added[:, -1], kept[:, -1], starts[:, -1]))


def _kept(chunks: _Chunks) -> Tensor:
    """Decay across each whole chunk, as wide as its states: (B, c, g, 1, r p)."""
    return chunks.arriving[..., -1].repeat_interleave(chunks.x.shape[-1], -1).unsqueeze(-2)


def _read(chunks: _Chunks, starts: Tensor, scratch: Scratch) -> Tensor:
    """Return what the chunk start states give to the outputs, (B, c, g, r, q, p)."""
    read: Tensor = _product(chunks.C, starts, "read", scratch).unflatten(-1, (-1, chunks.x.shape[-1]))
    return read.mul_(chunks.arriving.mT.unsqueeze(-1)).transpose(3, 4)


def _output(chunks: _Chunks, read: Tensor | None, D: Tensor | None, scratch: Scratch) -> Tensor:
    """Return y before the gate, (B, c, g, r, q, p)."""
    out = _product(chunks.mixer, chunks.dtx, "out", scratch)
    if read is not None:
        out.add_(read)
    return out if D is None else out.addcmul_(chunks.x, _skip(D, chunks.x.shape[2]))


def _skip(D: Tensor, groups: int) -> Tensor:
    """View the skip weights (H,) or (H, P) as (g, r, 1, 1 or P)."""
    return D.view(groups, D.shape[0] // groups, 1, -1)


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
        z: Tensor | None,
        dt_bias: Tensor | None,
        state: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor | None]:
        keep: list[Tensor | None] = []
        with no_autocast(x):
            y, final = _forward(x, dt, A, B, C, D, z, dt_bias, state, options, keep)
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, *keep)
        ctx.options, ctx.has_state = options, state is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, z, dt_bias, *keep = ctx.saved_tensors
        with no_autocast(x):
            grads = _backward(x, dt, A, B, C, D, z, dt_bias, ctx.has_state, ctx.options, keep, dy, dfinal)
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), None


def _backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    has_state: bool,
    options: _Options,
    keep: list[Tensor | None],
    dy: Tensor | None,
    dfinal: Tensor | None,
) -> tuple[Tensor | None, ...]:
    scratch, groups, dtype = Scratch(A), B.shape[2], A.dtype
    per_head = (groups, -1, 1)
    dx, ddt, dB, dC, dz = room_for(x, dt, B, C, z)
    dA, dD, ddt_bias = zeros_for(A, D, dt_bias)
    dstate = dfinal
    dy = torch.zeros_like(x) if dy is None else dy
    for span, starts in zip(reversed(options.plan), reversed(keep), strict=True):
        chunks = _load(x, dt, A, B, C, dt_bias, options, span, scratch)
        read = None if starts is None else _read(chunks, starts, scratch)
        dy_ = _heads(dy, span, groups)
        if z is None:
            dy_ = scratch("dy", *dy_.shape).copy_(dy_)
        else:
            z_ = _heads(z, span, groups).to(dtype)
            dy_ = ungate(z_, dy_, _output(chunks, read, D, scratch), _heads(dz, span, groups), scratch)

        ddtx, dB_, dC_, dlog = _within(chunks, dy_, scratch)
        from_start = None
        if starts is not None and read is not None:
            dread = _by_step(dy_, chunks.arriving, "dread", scratch)
            dC_ += _product(dread, starts.mT, "narrow", scratch)
            from_start = _product(chunks.C.mT, dread, "from_start", scratch)  # (B, c, g, n, r p)
            dlog += _sum_from(torch.mul(dy_, read, out=scratch("product", *dy_.shape)).sum(-1))
        dends, dstate = _carry_back(chunks, dstate, from_start, has_state or span.start > 0)
        if dends is not None:
            _into_ends(chunks, starts, dends, ddtx, dB_, dlog, scratch)

        dA += (dlog * chunks.dt).sum((0, 1, 4)).flatten()
        ddt_ = torch.mul(ddtx, chunks.x, out=scratch("product", *ddtx.shape)).sum(-1)
        ddt_.addcmul_(dlog, A.view(per_head))
        if options.limit != NO_LIMIT or not options.softplus:
            low, high = options.limit
            ddt_.mul_((chunks.positive >= low) & (chunks.positive <= high))
        if options.softplus:
            ddt_.mul_(torch.sigmoid(chunks.raw))
        if ddt_bias is not None:
            ddt_bias += ddt_.sum((0, 1, 4)).flatten()
        dx_ = ddtx.mul_(chunks.dt.unsqueeze(-1))
        if D is not None:
            dx_.addcmul_(dy_, _skip(D, groups))
            skipped = torch.mul(dy_, chunks.x, out=scratch("product", *dy_.shape))
            dD += skipped.sum((0, 1, 4) if D.dim() == 2 else (0, 1, 4, 5)).view_as(D)
        _heads(ddt, span, groups).copy_(ddt_)
        _heads(dx, span, groups).copy_(dx_)
        _groups(dB, span).copy_(dB_)
        _groups(dC, span).copy_(dC_)
    return dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dstate


def _within(chunks: _Chunks, dy: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of y = (scores * decay) dtx: of dtx, B, C and each step's log decay. Consumes the
    mixer.
    """
    ddtx = _product(chunks.mixer.mT, dy, "ddtx", scratch)
    dmixer = _product(dy, chunks.dtx.mT, "dmixer", scratch)
    crossing = chunks.mixer.mul_(dmixer)  # gradient of each log decay; none on the diagonal, where it is 0
    crossing.diagonal(dim1=-2, dim2=-1).zero_()
    # Pairs on one side of a step cancel, and little is left beside them where dt is large.
    exact = crossing.double()
    dlog = _sum_from(exact.sum(-1) - exact.sum(-2)).to(dy.dtype)
    dscores = dmixer.mul_(chunks.decay).sum(3).tril_()  # (B, c, g, q, q)
    dB = _product(dscores.mT, chunks.C, "dB", scratch)
    return ddtx, dB, _product(dscores, chunks.B, "dC", scratch), dlog


def _sum_from(value: Tensor) -> Tensor:
    """Return sums from each step to the chunk's end, in float64 since large terms cancel."""
    return value.double().flip(-1).cumsum(-1).flip(-1)


def _carry_back(
    chunks: _Chunks, dstate: Tensor | None, from_start: Tensor | None, want_first: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return gradients of the chunks' end states, (B, c, g, n, r p), and of the state before them; None is
    zero.

    `dstate` is the gradient of the state after the span, `from_start` that of each start state through y.
    """
    if dstate is None and chunks.x.shape[1] == 1:
        return None, (None if from_start is None else from_start[:, 0].clone())
    if from_start is None:  # a single first chunk without a state
        assert dstate is not None
        return dstate.unsqueeze(1), None
    kept = _kept(chunks)
    dends = torch.empty_like(from_start)
    dends[:, -1] = 0 if dstate is None else dstate
    for i in reversed(range(1, dends.shape[1])):
        torch.addcmul(from_start[:, i], kept[:, i], dends[:, i], out=dends[:, i - 1])
    first = torch.addcmul(from_start[:, 0], kept[:, 0], dends[:, 0]) if want_first else None
    return dends, first


def _into_ends(
    chunks: _Chunks,
    starts: Tensor | None,
    dends: Tensor,
    ddtx: Tensor,
    dB: Tensor,
    dlog: Tensor,
    scratch: Scratch,
) -> None:
    """Add the gradients that come through the chunks' end states to those of dtx, B and the log decays."""
    width = chunks.x.shape[-1]
    weighted = _by_step(chunks.dtx, chunks.leaving, "weighted", scratch)
    dB += _product(weighted, dends.mT, "narrow", scratch)
    dweighted = _product(chunks.B, dends, "dweighted", scratch).unflatten(-1, (-1, width))
    dweighted.mul_(chunks.leaving.mT.unsqueeze(-1))
    ddtx += dweighted.transpose(3, 4)
    passed = dweighted.transpose(3, 4).mul_(chunks.dtx).sum(-1)  # gradient of the log decay after each step
    dlog[..., 1:] += passed.cumsum(-1)[..., :-1]
    if starts is not None:
        across = torch.mul(dends, starts, out=scratch("across", *dends.shape)).sum(-2)  # (B, c, g, r p)
        dlog += (across.unflatten(-1, (-1, width)).sum(-1) * chunks.arriving[..., -1]).unsqueeze(-1)
