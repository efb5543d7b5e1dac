"""What the matrix-valued recurrences share: a chunk of time is one affine map of the state.

However the steps inside a chunk decay, erase and write, the chunk as a whole reads and moves the state S (K, V)
at its start linearly: `o = local + read S` and `S' = keep S + add`. An op is a function that makes these four
from the chunk's inputs, for many chunks at once, out of matrix products; here they are strung together.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longroll.ops._common import Span, check_shape, no_autocast, spans, state_dtype


class Chunk(NamedTuple):
    """The affine map of each chunk; leading axes (n, B, H)."""

    local: Tensor  # (..., C, V)
    read: Tensor  # (..., C, K)
    keep: Tensor  # (..., K, K), or a decay (..., K, 1) or (..., 1, 1)
    add: Tensor  # (..., K, V)


def run(
    chunk: Callable[..., Chunk],
    timed: tuple[Tensor, ...],
    initial_state: Tensor | None,
    length: int,
    fixed: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Run an op over (B, T, H, ...) inputs; returns o (B, T, H, V) and the final state (B, H, K, V)."""
    first = timed[0]
    dtype = state_dtype(*timed, *fixed, initial_state)
    state = None if initial_state is None else initial_state.to(dtype)
    fixed = tuple(t.to(dtype) for t in fixed)
    outputs = []
    with no_autocast(first):
        for span in spans(first.shape[1], length, max(1, 1024 // length)):
            local, read, keep, add = chunk(*(_cut(t.to(dtype), span) for t in timed), *fixed)
            starts, state = _carry(keep, add, state)
            o = local + read @ starts
            outputs.append(o.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : span.stop - span.start])
    assert state is not None
    return torch.cat(outputs, 1).to(first.dtype), state


def _cut(tensor: Tensor, span: Span) -> Tensor:
    """(B, T, H, ...) -> the span's (n, B, H, C, ...), filled with zeros up to a power of 2."""
    part = tensor[:, span.start : span.stop].unflatten(1, (span.blocks, span.length)).movedim(3, 2)
    missing = (1 << (span.length - 1).bit_length()) - span.length
    return F.pad(part.transpose(0, 1), (0, 0) * (tensor.dim() - 3) + (0, missing)).contiguous()


def _carry(keep: Tensor, add: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """States at the start of each chunk, (n, B, H, K, V), and after the last one."""
    state = torch.zeros_like(add[0]) if state is None else state
    starts = []
    for i in range(add.shape[0]):
        starts.append(state)
        state = (keep[i] @ state if keep.shape[-1] > 1 else keep[i] * state) + add[i]
    return torch.stack(starts), state


def check(
    queries: dict[str, Tensor], v: Tensor, scalars: dict[str, Tensor], initial_state: Tensor | None
) -> None:
    """Raise ValueError unless (B, T, H, K) queries and keys, values, (B, T, H) numbers and the state fit."""
    name, q = next(iter(queries.items()))
    if q.dim() != 4 or q.shape[1] == 0:
        raise ValueError(f"{name} must have shape (B, T, H, K) with T >= 1, got {tuple(q.shape)}")
    batch, time, heads, width = q.shape
    for name, tensor in queries.items():
        check_shape(name, tensor, (batch, time, heads, width), "B, T, H, K")
    check_shape("v", v, (batch, time, heads, v.shape[-1]), "B, T, H, V")
    for name, tensor in scalars.items():
        check_shape(name, tensor, (batch, time, heads), "B, T, H")
    check_shape("initial_state", initial_state, (batch, heads, width, v.shape[-1]), "B, H, K, V")
