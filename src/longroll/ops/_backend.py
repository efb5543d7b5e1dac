"""Which implementation of an op runs where, and why: one table."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

KERNELS = {op: f"longroll.ops.triton.{op}" for op in ("selective_scan", "ssd")}
"""Op -> the module of its GPU kernel."""

SWITCH = "LONGROLL_KERNELS"
"""Environment variable: `triton` runs the GPU kernels; anything else plain PyTorch."""


class Choice(NamedTuple):
    """The kernel to run, or None for plain PyTorch, and the reason."""

    kernel: Callable | None
    reason: str


def choose(op: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """Choose the implementation of `op` for inputs on `device` whose arithmetic is in `dtype`."""
    if device.type != "cuda":
        return Choice(None, "chunked PyTorch: no GPU")
    if op not in KERNELS:
        return Choice(None, "chunked PyTorch: no kernel of ours takes a state yet")
    if importlib.util.find_spec("triton") is None:
        return Choice(None, "chunked PyTorch: triton is not installed")
    if dtype == torch.float64:
        return Choice(None, "chunked PyTorch: the kernel computes in float32")
    if os.environ.get(SWITCH) != "triton":
        return Choice(
            None, f"chunked PyTorch: the kernel is not measured on a GPU yet ({SWITCH}=triton runs it)"
        )
    return Choice(getattr(importlib.import_module(KERNELS[op]), op), "triton")
