"""Sums of what many programs wrote, in one order and one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = {"ROWS": 256, "COLUMNS": 32, "num_warps": 8}
"""Numbers that a program reads at once."""


@triton.jit
def _column_sums(parts_ptr, sums_ptr, R, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r, c = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    parts_ptr += tl.program_id(1).to(tl.int64) * R * C
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, R, ROWS):
        at = (first + r)[:, None].to(tl.int64) * C + c[None, :]
        total += tl.load(parts_ptr + at, mask=(first + r < R)[:, None] & (c < C)[None, :], other=0.0)
    tl.store(sums_ptr + tl.program_id(1) * C + c, tl.sum(total, axis=0), mask=c < C)


def column_sums(parts: Tensor) -> Tensor:
    """Return the sums of each column, (K, C), of K matrices (K, R, C), contiguous and float32."""
    matrices, rows, columns = parts.shape
    sums = parts.new_empty(matrices, columns)
    tile = TILE | {"ROWS": min(TILE["ROWS"], triton.next_power_of_2(rows))}
    _column_sums[(triton.cdiv(columns, TILE["COLUMNS"]), matrices)](parts, sums, rows, columns, **tile)
    return sums
