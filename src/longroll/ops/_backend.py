"""Which implementation of an op runs where, and why: one table."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

TRITON = "longroll.ops.gpu"
FLA = "longroll.ops.fla_kernels"
KERNELS = {
    "selective_scan": f"{TRITON}.selective_scan",
    "ssd": f"{TRITON}.ssd",
    "short_conv": f"{TRITON}.short_conv",
    "rms_norm": f"{TRITON}.rms_norm",
    "rms_norm_of_sum": f"{TRITON}.rms_norm",
    "mamba2": f"{TRITON}.mamba2",
    "linear": f"{TRITON}.linear",
    "cross_entropy": f"{TRITON}.cross_entropy",
    "gla": FLA,
    "retention": FLA,
    "rwkv6": FLA,
    "rwkv7": FLA,
    "delta_rule": FLA,
    "gated_delta_rule": FLA,
    "kda": FLA,
}
"""Op -> the module of its GPU kernel."""

WIDEST_KEYS = {"rwkv7": 256, "delta_rule": 256, "gated_delta_rule": 256, "kda": 256}
"""Op -> the widest key that fla's kernel takes."""

WIDEST_FLOAT32 = 64 * 64
"""Numbers in a head's state up to which the SSD's kernels take float32: those products are unrolled."""

WIDEST_AT_ONCE = 64 * 256
"""Numbers of a head's state that the SSD's kernels take at once; wider ones go in parts."""

TF32_FOR_FLOAT16 = True
"""Whether the SSD of float16 models runs in kernels that multiply in tf32, as many digits as float16 has."""

SWITCH = "LONGROLL_KERNELS"
"""Environment variable: with `torch` the ops run in plain PyTorch; otherwise GPU kernels run where they
fit.
"""


Kernel = Callable[..., tuple[Tensor, Tensor | None]]
"""Returns outputs, and the final state where it is asked for."""


class Choice(NamedTuple):
    """The kernel to run, or None for plain PyTorch, and the reason."""

    kernel: Callable[..., Any] | None
    reason: str


def choose(op: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] = ()) -> Choice:
    """Choose the implementation of an op.

    Args:
        op: its name.
        device: where its inputs are.
        dtype: the dtype of its arithmetic; of ops that multiply matrices (SSD, fla's), of their inputs.
        sizes: sizes of a head's keys and values, for these; of Mamba-2's, head and state.
    """
    slow = _refusal(op, device, dtype, sizes)
    if slow is not None:
        return Choice(None, f"chunked PyTorch: {slow}")
    module = importlib.import_module(KERNELS[op])
    kernel = _on(device, getattr(module, op))
    return Choice(kernel, "fla's kernel" if KERNELS[op] == FLA else "triton")


@functools.cache
def _on(device: torch.device, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return `kernel` run on `device`: Triton launches on the current one, wherever the tensors are."""

    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device(device):
            return kernel(*args, **kwargs)

    return run


def kernel_for(op: str, q: Tensor, v: Tensor, *others: Tensor | None) -> Kernel | None:
    """Return the kernel of an op with a (K, V) state for these inputs, or None for plain PyTorch.

    Products are made in the dtype of q; of Mamba-2 q is x, and v is B.
    """
    wide = any(t is not None and t.dtype == torch.float64 for t in (q, v, *others))
    sizes = (q.shape[-1], v.shape[-1])
    dtype = v.dtype if op == "ssd" and v.dtype == torch.float16 else q.dtype  # x may be widened
    return choose(op, v.device, torch.float64 if wide else dtype, sizes).kernel


def _refusal(op: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> str | None:
    """Return why no kernel runs; None where one does."""
    if device.type != "cuda":
        return "no GPU"
    if os.environ.get(SWITCH) == "torch":
        return f"{SWITCH}=torch"
    if op not in KERNELS:
        return "longroll has no kernel for this op yet"
    fla = KERNELS[op] == FLA
    for package in ("triton", "fla") if fla else ("triton",):
        if not _installed(package):
            return f"{package} is not installed"
    if dtype == torch.float64:
        return "the kernel computes in float32"
    if fla:
        return _refusal_of_fla(op, dtype, sizes)
    if dtype == torch.float16 and op in (("mamba2",) if TF32_FOR_FLOAT16 else ("mamba2", "ssd")):
        return "float16 holds no state above 65,504"
    return _refusal_of_ssd(device, dtype, *sizes) if op in ("ssd", "mamba2") and sizes else None


def _refusal_of_ssd(device: torch.device, dtype: torch.dtype, width: int, order: int) -> str | None:
    if dtype == torch.float32 and width * order > WIDEST_FLOAT32:
        return "products of float32 in heads this wide compile for a minute or more"
    part = min(order, max(16, WIDEST_AT_ONCE // width))  # columns of a state
    # the most shared memory that a kernel needs: B and C, x and dy, a state and its gradient, and scores of a
    # chunk
    itemsize = 4 if dtype == torch.float16 else dtype.itemsize  # whose products are made in tf32
    at_hand = itemsize * (128 * (width + part) + 2 * width * part + 64 * 64)
    room = shared_memory(device)
    if at_hand > room:
        return f"heads of {width} x {order} want {at_hand >> 10} KiB of shared memory, {room >> 10} are there"
    return None


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program can have."""
    gpu: Any = torch.cuda.get_device_properties(device)
    found: int = getattr(gpu, "shared_memory_per_block_optin", None) or gpu.shared_memory_per_block
    return found


def _refusal_of_fla(op: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> str | None:
    exact = os.environ.get("TRITON_F32_DEFAULT") == "ieee"
    if dtype == torch.float32 and not exact and not _tf32_is_allowed():
        return "fla's kernels multiply float32 in tf32 (torch.set_float32_matmul_precision('high') allows it)"
    if any(size < 16 or size % 2 for size in sizes):
        return "fla's kernels want even head sizes of at least 16"
    widest = WIDEST_KEYS.get(op)
    if sizes and widest is not None and sizes[0] > widest:
        return f"fla's kernel takes keys of at most {widest}"
    return None


def _tf32_is_allowed() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # PyTorch's newer switch was used, as by transformers
        precision: str = torch.backends.cuda.matmul.fp32_precision
        return precision == "tf32"


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
