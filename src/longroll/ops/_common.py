"""Shared code of the recurrences: precision, argument checks, work space, and how time is cut into blocks."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

LOG2_E = math.log2(math.e)
"""Decays are powers of 2: on a CPU `torch.exp2` measured 4.5 times the speed of `torch.exp`."""

NO_LIMIT = (0.0, math.inf)
"""Bounds of a time step dt that bound nothing."""


class Span(NamedTuple):
    """`blocks` equal runs of `length` time steps, starting at time `start`."""

    start: int
    blocks: int
    length: int

    @property
    def stop(self) -> int:
        """First time step after the span."""
        return self.start + self.blocks * self.length


_once: ContextVar[Callable[..., Any] | None] = ContextVar("longroll_once", default=None)


@contextmanager
def without_numbers(once: Callable[..., Any]) -> Iterator[None]:
    """For runs whose tensors have no numbers: `turns` leaves out what allocates as its neighbours do, and
    `once(function, *arguments)` makes the calls of `plainly`.
    """
    token = _once.set(once)
    try:
        yield
    finally:
        _once.reset(token)


def turns(whole: range) -> Sequence[int]:
    """Return the turns of a loop that leaves in memory only what was there before: all, but in runs without
    numbers.
    """
    return whole if len(whole) < 4 or _once.get() is None else (*whole[:2], whole[-1])


def plainly(function: Callable[..., T], *arguments: Any) -> T:
    """Return what a function without a gradient returns."""
    once = _once.get()
    found: T = function(*arguments) if once is None else once(function, *arguments)
    return found


class Scratch:
    """Named work space of one call, reused from span to span.

    Fresh memory can cost a page fault per 4 KiB on a CPU: 77 us for a product of 49k numbers that takes 5.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return uninitialised memory; the same memory for the same name, so its last content is lost."""
        view = self._views.get((name, shape))
        if view is None:
            size = math.prod(shape)
            if name not in self._flat or self._flat[name].numel() < size:
                self._flat[name] = self._like.new_empty(size)
            view = self._views[name, shape] = self._flat[name][:size].view(shape)
        return view


def spans(time: int, length: int, blocks: int) -> Iterator[Span]:
    """Cut `time` into spans of at most `blocks` blocks of `length` steps; a shorter block comes last."""
    start = 0
    while time - start >= length:
        span = Span(start, min(blocks, (time - start) // length), length)
        yield span
        start = span.stop
    if start < time:
        yield Span(start, 1, time - start)


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 when any of the tensors is, else float32: the precision of states and arithmetic."""
    return (
        torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    )


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context that keeps autocast from lowering the precision of decays and states."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def needs_graph(*tensors: Tensor | None) -> bool:
    """Say whether autograd will ask for a gradient of any of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], axes: str) -> None:
    """Raise ValueError when an argument that is given has another shape than `axes` or holds no floats."""
    if tensor is None:
        return
    check_floats(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape ({axes}) = {shape}, got {tuple(tensor.shape)}")


def check_floats(name: str, tensor: Tensor) -> None:
    """Raise ValueError when a tensor is complex, of which a cast drops a part, or of integers."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be real and of a floating-point dtype, got {tensor.dtype}")


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Convert a tensor that may be absent."""
    return None if tensor is None else tensor.to(dtype)


def room_for(*tensors: Tensor | None) -> Any:
    """Return uninitialised contiguous gradients, one for each tensor; None for an absent one."""
    return tuple(None if t is None else t.new_empty(t.shape) for t in tensors)


def zeros_for(*tensors: Tensor | None) -> Any:
    """Return zero gradients, one for each tensor; None for an absent one."""
    return tuple(None if t is None else t.new_zeros(t.shape) for t in tensors)


def strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Return strides of tensors with three axes, one after another; zeros for an absent one."""
    return tuple(s for t in tensors for s in ((0, 0, 0) if t is None else t.stride()))


def product_dtype(weight: Tensor, x: Tensor) -> torch.dtype:
    """Return what a product of them is made in: autocast's dtype under autocast, otherwise the wider of the
    two.
    """
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return torch.result_type(weight, x)


def widen_float16(x: Tensor) -> Tensor:
    """Return `x` in float32 where it is float16, in which an output that a norm would scale down may
    overflow.
    """
    return x.float() if x.dtype == torch.float16 else x


def ungate(z: Tensor, dy: Tensor, ungated: Tensor, dz: Tensor, scratch: Scratch) -> Tensor:
    """Write the gate's gradient into `dz`; return that of the output before the gate."""
    sigmoid = torch.sigmoid(z, out=scratch("sigmoid", *z.shape))
    gate = torch.mul(z, sigmoid, out=scratch("gate", *z.shape))
    ungated.mul_(dy)
    inner = torch.mul(dy, gate, out=scratch("dy", *z.shape))
    dz.copy_(sigmoid.addcmul_(gate, sigmoid, value=-1).add_(gate).mul_(ungated))  # s + z s (1 - s)
    return inner
