"""RMS norm, of an input that may be gated first, in Triton: what Mamba's blocks do around their recurrence.

`y = weight * rms(x * silu(gate))` over groups of the last axis, as transformers' MambaRMSNormGated computes
it: in float32, rounded to x's precision before the weight.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from longroll.ops.gpu._math import sigmoid
from longroll.ops.gpu._sums import column_sums

_PROGRAMS = {"plain": 512, "gated": 256}  # of backward; each sums the weight's gradient over its rows


@triton.jit
def _silu(v):
    gate = sigmoid(v)
    return v * gate, gate * (1.0 + v * (1.0 - gate))


@triton.jit
def _norm_forward(
    x_ptr, add_ptr, gate_ptr, weight_ptr, sum_ptr, y_ptr, rstd_ptr, eps, GROUPS, SIZE, xr, ar, gr,
    HAS_ADD: tl.constexpr, HAS_GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With `add`, the norm is that of x + add, which is written into `sum`."""
    row, group, i = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    inside, at = i < SIZE, group * SIZE + i
    stored = tl.load(x_ptr + row * xr + at, mask=inside, other=0.0)
    if HAS_ADD:
        added = tl.load(add_ptr + row * ar + at, mask=inside, other=0.0).to(tl.float32)
        stored = (stored.to(tl.float32) + added).to(stored.dtype)
        tl.store(sum_ptr + row * GROUPS * SIZE + at, stored, mask=inside)
    h = stored.to(tl.float32)
    if HAS_GATE:
        h *= _silu(tl.load(gate_ptr + row * gr + at, mask=inside, other=0.0).to(tl.float32))[0]
    rstd = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / SIZE + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    y = weight.to(tl.float32) * (h * rstd).to(stored.dtype).to(tl.float32)
    tl.store(y_ptr + row * GROUPS * SIZE + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row * GROUPS + group, rstd)


@triton.jit
def _norm_inputs(
    x_ptr, gate_ptr, dy_ptr, row, at, inside, WIDTH, xr, gr, HAS_GATE: tl.constexpr
):  # fmt: skip
    """Load what backward reads of a row; without a gate x stands for it."""
    x = tl.load(x_ptr + row * xr + at, mask=inside, other=0.0)
    dy = tl.load(dy_ptr + row * WIDTH + at, mask=inside, other=0.0)
    gate = x
    if HAS_GATE:
        gate = tl.load(gate_ptr + row * gr + at, mask=inside, other=0.0)
    return x, dy, gate


@triton.jit
def _norm_backward(
    x_ptr, gate_ptr, weight_ptr, rstd_ptr, dy_ptr, more_ptr, dx_ptr, dadd_ptr, dgate_ptr, dweight_ptr,
    ROWS, GROUPS, SIZE, xr, gr, dgr,
    HAS_MORE: tl.constexpr, HAS_ADD: tl.constexpr, HAS_GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx, to which `more` is added, its copy `dadd`, and dy are contiguous; dweight (programs, GROUPS SIZE)
    float32, of each program by itself.
    """
    group, i = tl.program_id(1), tl.arange(0, BLOCK)
    inside, at = i < SIZE, group * SIZE + i
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    row, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    x, dy, gate = _norm_inputs(x_ptr, gate_ptr, dy_ptr, row, at, inside, GROUPS * SIZE, xr, gr, HAS_GATE)
    for _ in range(tl.program_id(0), ROWS, step):
        ahead = inside & (row + step + 0 * i < ROWS)  # the next row is read before this one is written
        next_x, next_dy, next_gate = _norm_inputs(
            x_ptr, gate_ptr, dy_ptr, row + step, at, ahead, GROUPS * SIZE, xr, gr, HAS_GATE
        )
        x, dy = x.to(tl.float32), dy.to(tl.float32)
        rstd, to, more = tl.load(rstd_ptr + row * GROUPS + group), row * GROUPS * SIZE + at, 0.0
        if HAS_MORE:
            more = tl.load(more_ptr + to, mask=inside, other=0.0).to(tl.float32)
        h = x
        if HAS_GATE:
            opened, slope = _silu(gate.to(tl.float32))
            h = x * opened
        unit = h * rstd
        dweight += dy * unit
        dy *= weight
        dh = rstd * (dy - unit * (tl.sum(dy * unit, axis=0) / SIZE))
        if HAS_GATE:
            dgate = (dh * x * slope).to(dgate_ptr.dtype.element_ty)
            tl.store(dgate_ptr + row * dgr + at, dgate, mask=inside)
            dh *= opened
        dh += more
        if HAS_ADD:
            tl.store(dadd_ptr + to, dh.to(dadd_ptr.dtype.element_ty), mask=inside)
        tl.store(dx_ptr + to, dh.to(dx_ptr.dtype.element_ty), mask=inside)
        row += step
        x, dy, gate = next_x, next_dy, next_gate
    tl.store(dweight_ptr + tl.program_id(0) * GROUPS * SIZE + at, dweight, mask=inside)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None = None,
    size: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return `weight * rms(x * silu(gate))`.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.
        gate: (..., D), as x.
        size: numbers that share a mean; default D.
        dtype: the dtype of the result; default: what weight and x promote to.
    """
    y: Tensor = _RMSNorm.apply(
        x, weight, gate, eps, size or x.shape[-1], dtype or torch.result_type(weight, x)
    )
    return y


def _rows(tensor: Tensor) -> Tensor:
    """Return (rows, D), last axis contiguous, without a copy where the strides allow it."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def forward(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    eps: float,
    size: int,
    dtype: torch.dtype,
    add: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the inverse of each mean's root (rows, groups), for `backward`, and x, or x + `add`."""
    rows, gates, adds = _rows(x), *(None if t is None else _rows(t) for t in (gate, add))
    groups = rows.shape[1] // size
    rstd = torch.empty(len(rows), groups, dtype=torch.float32, device=x.device)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = x if add is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm_forward[(len(rows), groups)](
        *(rows if t is None else t for t in (rows, adds, gates)), weight, total, y, rstd, eps, groups, size,
        *(0 if t is None else t.stride(0) for t in (rows, adds, gates)),
        HAS_ADD=add is not None, **_options(gate, size),
    )  # fmt: skip
    return y, rstd, total


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    rstd: Tensor,
    dgate: Tensor | None,
    more: Tensor | None = None,
    dadd: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return dx, plus `more`, and dweight.

    The gradient of the gate is written into `dgate`, of any strides that rows can have, and dx once more into
    `dadd`, contiguous, in another precision.
    """
    rows, gates = _rows(x), None if gate is None else _rows(gate)
    groups, dy = rstd.shape[1], dy.contiguous()
    size = rows.shape[1] // groups
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    more = None if more is None else more.contiguous()
    dgates = _rows(dx) if dgate is None else dgate.view(-1, dgate.shape[-1])
    programs = min(len(rows), _PROGRAMS["plain" if gate is None else "gated"])
    dweight = rstd.new_empty(1, programs, weight.numel())
    _norm_backward[(programs, groups)](
        rows, rows if gates is None else gates, weight, rstd,
        dy, dy if more is None else more, dx, dx if dadd is None else dadd, dgates, dweight,
        len(rows), groups, size, rows.stride(0), 0 if gates is None else gates.stride(0), dgates.stride(-2),
        HAS_MORE=more is not None, HAS_ADD=dadd is not None, **_options(gate, size),
    )  # fmt: skip
    return dx, column_sums(dweight)[0].to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gate: Tensor | None,
        eps: float,
        size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        y, rstd, _ = forward(x, weight, gate, eps, size, dtype)
        ctx.save_for_backward(x, weight, gate, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate, rstd = ctx.saved_tensors
        dgate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dx, dweight = backward(dy, x, weight, gate, rstd, dgate)
        return dx, dweight, dgate, None, None, None


def rms_norm_of_sum(
    x: Tensor, add: Tensor | None, weight: Tensor, eps: float, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return `rms_norm` of x + `add`, and the sum, in x's dtype; the norm's backward adds both gradients."""
    found: tuple[Tensor, Tensor] = _RMSNormOfSum.apply(x, add, weight, eps, size, dtype)
    return found


class _RMSNormOfSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, add: Tensor | None, weight: Tensor, eps: float, size: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, rstd, total = forward(x, weight, None, eps, size, dtype, add)
        total = total.view_as(total) if add is None else total
        ctx.save_for_backward(total, weight, rstd)
        ctx.dtype = None if add is None else add.dtype
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, more: Tensor | None) -> tuple[Tensor | None, ...]:
        dweight, dadd = None, None
        if dy is None:  # the norm was not used; the sum may have been changed in place since
            dx = more
        else:
            x, weight, rstd = ctx.saved_tensors
            if ctx.dtype not in (None, x.dtype):
                dadd = torch.empty(x.shape, dtype=ctx.dtype, device=x.device)
            dx, dweight = backward(dy, x, weight, None, rstd, None, more, dadd)
        if ctx.dtype is not None and dadd is None and dx is not None:
            dadd = dx.to(ctx.dtype)
        return dx, dadd, dweight, None, None, None


def _options(gate: Tensor | None, size: int) -> dict[str, Any]:
    block = triton.next_power_of_2(size)
    return {"HAS_GATE": gate is not None, "BLOCK": block, "num_warps": min(8, max(1, block // 256))}
