"""Compile the kernels of a call side by side before it runs; by themselves they compile one after another.

The call is rehearsed: its kernels are compiled on all cores and not launched, so that what it computes means
nothing. It then finds them in Triton's cache.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_rehearsing: ContextVar[bool] = ContextVar("longroll_rehearsing", default=False)


def compile_ahead(call: Callable[..., tuple], arguments: dict[str, Any]) -> None:
    """Compile what `call(**arguments)` launches, and what its backward does where a gradient is asked for.

    A rehearsal that fails changes nothing: the call itself compiles what it needs, or says what is wrong.

    Args:
        call: returns tensors made by one `torch.autograd.Function`, or None among them.
        arguments: its tensors are only read.
    """
    try:
        from triton import AsyncCompileMode
        from triton.runtime.jit import JITFunction
    except ImportError:  # before Triton 3.5
        return
    run = JITFunction.run

    def run_or_compile(self, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=warmup or _rehearsing.get(), **kwargs)

    token = _rehearsing.set(True)  # in this thread only: others launch as ever
    JITFunction.run = run_or_compile
    try:
        with contextlib.suppress(Exception), ThreadPoolExecutor(os.cpu_count()) as pool:  # noqa: SIM117
            with AsyncCompileMode(pool, ignore_errors=True):
                _forward_and_backward(call, arguments)
    finally:
        JITFunction.run = run
        _rehearsing.reset(token)


def _forward_and_backward(call: Callable[..., tuple], arguments: dict[str, Any]) -> None:
    """Both in this thread, where autograd would run backward in its own."""
    outputs = call(
        **{
            name: a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
            for name, a in arguments.items()
        }
    )
    made = [o for o in outputs if o is not None]
    if made[0].grad_fn is not None:
        with torch.no_grad():
            made[0].grad_fn.apply(*(torch.empty_like(o) for o in made))
