"""Compile the kernels of a call side by side before it runs; by themselves they compile one after another.

A dry run of the call compiles its kernels on all cores and launches none, so its outputs are meaningless. The
call itself then finds the kernels in Triton's cache.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

_precompiling: contextvars.ContextVar[bool] = contextvars.ContextVar("longroll_precompiling", default=False)
_one_at_a_time = threading.Lock()


def precompile(call: Callable[..., tuple[Tensor | None, ...]], arguments: dict[str, Any]) -> None:
    """Compile what `call(**arguments)` launches, and what its backward does where a gradient is asked for.

    A dry run that fails changes nothing: the call itself compiles what it needs, or says what is wrong.

    Args:
        call: returns what one `torch.autograd.Function` makes: tensors, or None among them.
        arguments: its tensors are only read.
    """
    try:
        from triton import AsyncCompileMode
        from triton.runtime.jit import JITFunction
    except ImportError:  # before Triton 3.5
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each has its own
    pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // ranks))

    def dry_run() -> None:
        _precompiling.set(True)
        with AsyncCompileMode(pool, ignore_errors=True):
            _forward_and_backward(call, arguments)

    # other threads launch as ever
    def run_or_compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=warmup or _precompiling.get(), **kwargs)

    with _one_at_a_time:
        run, JITFunction.run = JITFunction.run, run_or_compile
        try:
            with contextlib.suppress(Exception):
                contextvars.copy_context().run(dry_run)  # leaves nothing set, however it ends
        finally:
            JITFunction.run = run
            pool.shutdown(cancel_futures=True)


def _forward_and_backward(call: Callable[..., tuple[Tensor | None, ...]], arguments: dict[str, Any]) -> None:
    """Run forward and backward in this thread; autograd would run backward in another one."""
    alone = {
        name: a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
        for name, a in arguments.items()
    }
    # gradient checkpointing counts what a block saves, and must not count this
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        outputs = call(**alone)
        graph: Any = next(o.grad_fn for o in outputs if o is not None)
        if graph is not None:
            with torch.no_grad():
                graph.apply(*(None if o is None else torch.empty_like(o) for o in outputs))
