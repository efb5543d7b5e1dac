"""Shared code of the recurrences with a (K, V) state: how chunks of time act on the state.

However the steps inside a chunk decay, erase and write, the chunk as a whole reads and moves the state at its
start linearly. An op is a function that makes the terms of these two maps from the chunk's inputs, for many
chunks at once and out of matrix products; here they are strung together. Only the walk of the state from
chunk to chunk is a loop. Backward keeps, for several spans of chunks, only the states at their starts, and
runs each again.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longroll.ops._common import (
    Span,
    check_shape,
    needs_graph,
    no_autocast,
    plainly,
    spans,
    state_dtype,
)

CHUNK = 32
"""Steps a chunk: of 16, 32, 64 and 128 the fastest or within 10 % of it in every op, on one CPU core."""
SPAN = 1 << 17
"""Numbers of one input in a span of chunks: few enough for a CPU's second-level cache; a GPU takes more."""


class Chunk(NamedTuple):
    """`o = read S + local + mixer U` and `S' = keep S + add + write^T U`, where `U = new + old S`.

    Leading axes (n, B, H), one that is 1 stands for all; terms that are None are 0.
    """

    read: Tensor  # (..., C, K)
    keep: Tensor  # (..., K, 1) or (..., 1, 1)
    local: Tensor | None = None  # (..., C, V)
    add: Tensor | None = None  # (..., K, V)
    mixer: Tensor | None = None  # (..., C, C)
    write: Tensor | None = None  # (..., C, K)
    new: Tensor | None = None  # (..., C, V)
    old: Tensor | None = None  # (..., C, K)


def run(
    chunk: Callable[..., Chunk],
    timed: tuple[Tensor, ...],
    initial_state: Tensor | None,
    output_final_state: bool,
    fixed: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor | None]:
    """Run an op.

    Args:
        chunk: makes the terms of chunks from the pieces of `timed`, (n, B, H, C, ...), and from `fixed`.
        timed: q, k, v and others, (B, T, H, ...).
        initial_state: (B, H, K, V); zero when None.
        output_final_state: also return the state after the last step.
        fixed: tensors that are the same at all times.

    Returns:
        o (B, T, H, V) in q's dtype, and the final state (B, H, K, V) or None.
    """
    _, k, v = timed[:3]
    dtype = state_dtype(*timed, *fixed, initial_state)
    shape = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    state = v.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    fixed = tuple(t.to(dtype) for t in fixed)
    blocks = (SPAN if v.device.type == "cpu" else 128 * SPAN) // (
        shape[0] * shape[1] * CHUNK * max(shape[2:])
    )
    plan = tuple(spans(v.shape[1], CHUNK, max(1, blocks)))
    # Autocast would lower the precision of a backward pass that is not shielded, as _Run's is.
    shielded = len(plan) > 1 or torch.is_autocast_enabled(v.device.type)
    if shielded and needs_graph(*timed, *fixed, state):
        o, final = _Run.apply(chunk, plan, len(timed), state, *timed, *fixed)  # type: ignore[no-untyped-call]
    else:
        o, final = plainly(_run, chunk, plan, len(timed), state, *timed, *fixed)
    return o, (final if output_final_state else None)


def check(
    keys: dict[str, Tensor], v: Tensor, numbers: dict[str, Tensor], initial_state: Tensor | None
) -> None:
    """Raise ValueError unless `keys` are (B, T, H, K), v (B, T, H, V), `numbers` (B, T, H); and the state."""
    name, first = next(iter(keys.items()))
    if first.dim() != 4 or first.shape[1] == 0:
        raise ValueError(f"{name} must have shape (B, T, H, K) with T >= 1, got {tuple(first.shape)}")
    batch, time, heads, width = first.shape
    for name, tensor in keys.items():
        check_shape(name, tensor, (batch, time, heads, width), "B, T, H, K")
    check_shape("v", v, (batch, time, heads, v.shape[-1]), "B, T, H, V")
    for name, tensor in numbers.items():
        check_shape(name, tensor, (batch, time, heads), "B, T, H")
    check_shape("initial_state", initial_state, (batch, heads, width, v.shape[-1]), "B, H, K, V")


def solve(lower: Tensor, sides: Tensor) -> Tensor:
    """Solve `(1 + L) x = sides` for the part L of `lower` below the diagonal.

    Transposed: in this memory order LAPACK needs no copies, and the solution took a third of the time.
    """
    solution: Tensor = torch.linalg.solve_triangular(
        lower.mT, sides.mT, left=False, upper=True, unitriangular=True
    )
    return solution.mT


def _forward(
    chunk: Callable[..., Chunk],
    plan: Sequence[Span],
    timed: Sequence[Tensor],
    fixed: Sequence[Tensor],
    state: Tensor,
    keep: list[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Return outputs and final state; appends the state at the start of each span to `keep`."""
    o = torch.empty_like(timed[2], dtype=timed[0].dtype)
    with no_autocast(o):
        for span in plan:
            if keep is not None:
                keep.append(state)
            part, state = _span(chunk, [_cut(t, span, state.dtype) for t in timed], fixed, state)
            _view(o, span).copy_(part)
    return o, state


def _run(
    chunk: Callable[..., Chunk], plan: tuple[Span, ...], count: int, state: Tensor, *inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Return outputs and final state."""
    return _forward(chunk, plan, inputs[:count], inputs[count:], state, None)


def _view(tensor: Tensor, span: Span) -> Tensor:
    """View a span of (B, T, H, ...) as (n, B, H, C, ...)."""
    part: Tensor = tensor[:, span.start : span.stop].unflatten(1, (span.blocks, span.length))
    return part.movedim(3, 2).transpose(0, 1)


def _cut(tensor: Tensor, span: Span, dtype: torch.dtype) -> Tensor:
    """Copy a span of (B, T, H, ...) to (n, B, H, C, ...)."""
    return _view(tensor, span).to(dtype, copy=True, memory_format=torch.contiguous_format)


def _span(
    chunk: Callable[..., Chunk], parts: Sequence[Tensor], fixed: Sequence[Tensor], state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return outputs (n, B, H, C, V) of a span, and the state after it."""
    terms = chunk(*parts, *fixed)
    lead = terms.read.shape[:3]
    keep, add, write, new, old = (
        None if t is None else t.expand(lead + t.shape[3:]).flatten(1, 2)
        for t in (terms.keep, terms.add, terms.write, terms.new, terms.old)
    )
    walk: Callable[..., Any] = _Carry.apply if torch.is_grad_enabled() else _carry
    starts, values, final = walk(state.flatten(0, 1), keep, add, write, new, old)
    o = terms.read.flatten(0, 2) @ starts.flatten(0, 1)
    if terms.local is not None:
        o = o + terms.local.flatten(0, 2)
    if terms.mixer is not None:
        o = torch.baddbmm(o, terms.mixer.flatten(0, 2), values.flatten(0, 1))
    return o.unflatten(0, lead), final.view_as(state)


def _carry(
    state: Tensor,
    keep: Tensor,
    add: Tensor | None,
    write: Tensor | None,
    new: Tensor | None,
    old: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Walk from chunk to chunk: states at their starts (n, B H, K, V), U of each, and the last state."""
    starts = state.new_empty(keep.shape[0], *state.shape)
    values = None if new is None else torch.empty_like(new)
    for i in range(len(starts)):
        starts[i] = state
        state = keep[i] * state if add is None else torch.addcmul(add[i], keep[i], state)
        if values is not None:
            assert write is not None and new is not None and old is not None
            torch.baddbmm(new[i], old[i], starts[i], out=values[i])
            state.baddbmm_(write[i].mT, values[i])
    return starts, values, state


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        state: Tensor,
        keep: Tensor,
        add: Tensor | None,
        write: Tensor | None,
        new: Tensor | None,
        old: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        starts, values, final = _carry(state, keep, add, write, new, old)
        ctx.save_for_backward(starts, keep, write, old, values)
        return starts, values, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstarts: Tensor, dvalues: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        starts, keep, write, old, values = ctx.saved_tensors
        dends = torch.empty_like(starts)
        dnew = None if values is None else torch.empty_like(values)
        for i in reversed(range(len(starts))):
            dends[i] = dstate
            dstate = torch.addcmul(dstarts[i], keep[i], dstate)
            if dnew is not None:
                torch.baddbmm(dvalues[i], write[i], dends[i], out=dnew[i])
                dstate.baddbmm_(old[i].mT, dnew[i])
        dkeep = (dends * starts).sum_to_size(keep.shape) if ctx.needs_input_grad[1] else None
        dadd = dends if ctx.needs_input_grad[2] else None
        if dnew is None:
            return dstate, dkeep, dadd, None, None, None
        return dstate, dkeep, dadd, values @ dends.mT, dnew, dnew @ starts.mT


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        chunk: Callable[..., Chunk],
        plan: tuple[Span, ...],
        count: int,
        state: Tensor,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        keep: list[Tensor] = []
        o, final = _forward(chunk, plan, inputs[:count], inputs[count:], state, keep)
        ctx.save_for_backward(*inputs, *keep)
        ctx.chunk, ctx.plan, ctx.count = chunk, plan, count
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a second look is refused under gradient checkpointing
        inputs, keep = saved[: -len(ctx.plan)], saved[-len(ctx.plan) :]
        timed, fixed = inputs[: ctx.count], inputs[ctx.count :]
        needs = ctx.needs_input_grad[4:]
        grads = [torch.empty_like(t) if need else None for t, need in zip(timed, needs, strict=False)]
        sums = [torch.zeros_like(t) for t in fixed]
        dstate = torch.zeros_like(keep[0]) if dstate is None else dstate
        with no_autocast(dstate):
            for span, start in zip(reversed(ctx.plan), reversed(keep), strict=True):
                state = start.detach().requires_grad_()
                fixed = [t.detach().requires_grad_() for t in fixed]
                parts = [_cut(t.detach(), span, state.dtype) for t in timed]
                wanted = [p.requires_grad_() for p, need in zip(parts, needs, strict=False) if need]
                with torch.enable_grad():
                    o, final = _span(ctx.chunk, parts, fixed, state)
                dpart = torch.zeros_like(o) if do is None else _view(do, span).to(o.dtype)
                dstate, *found = torch.autograd.grad((o, final), [state, *fixed, *wanted], (dpart, dstate))
                for total in sums:
                    total += found.pop(0)
                for grad in grads:
                    if grad is not None:
                        _view(grad, span).copy_(found.pop(0))
        return None, None, None, dstate, *grads, *sums
