"""In a dry run, each function of autograd that longroll wrote runs once for inputs of a kind.

The layers of a model call the same functions with inputs of the same shapes, and a function over chunks of
time makes hundreds of operations. What a call allocates, keeps and returns depends on the kinds of its inputs
alone, so that later calls allocate the same without the operations between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from longroll.ops._common import without_numbers

_OPS = ("longroll.ops.", "longroll.families.int8")


class Counter(Protocol):
    """Counts the bytes of tensors that live."""

    live: int
    peak: int


class _Made(NamedTuple):
    """A tensor that a call left: where its memory comes from, and how it lies there."""

    source: tuple[str, int]  # "given" and the index of an input, "new" and the number of the memory
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class _Call(NamedTuple):
    """What a call did."""

    memory: tuple[tuple[int, torch.dtype, torch.device], ...]  # numbers of each new piece, their dtype, place
    outputs: tuple[_Made | None, ...]
    single: bool
    saved: tuple[_Made | None, ...]
    above: int  # the peak within the call, above what lived before it
    attributes: dict[str, Any]
    materialize: bool


_calls: dict[Any, _Call | None] = {}  # also of earlier dry runs: a plan makes one for each setting


@contextmanager
def repeated_functions(counter: Counter) -> Iterator[None]:
    """Within it, functions of longroll run once for inputs of a kind; `counter` counts as if all ran."""

    def once(function: Callable[..., Any], *args: Any) -> Any:
        """Make a call without a gradient."""
        key = None if torch.is_grad_enabled() else _key(function, args, _autocast(args))
        call = _calls.get(key)
        if call is not None:
            return _allocated(call, args, counter)[0]
        outputs, above = _measured(counter, lambda: function(*args))
        if key is not None and key not in _calls:
            _calls[key] = _described(args, outputs, _Noted(None, None), above)
        return outputs

    kinds: dict[type, type] = {}
    before = Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__.startswith(_OPS) and not kwargs:
            if cls not in kinds:
                kinds[cls] = _repeating(cls, counter)
            cls = kinds[cls]
        return before.__func__(cls, *args, **kwargs)

    Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        with without_numbers(once):
            yield
    finally:
        Function.apply = before  # type: ignore[method-assign]


def _repeating(cls: Any, counter: Counter) -> type:
    """Return a function of autograd that does what `cls` does, or what it did before."""

    def forward(ctx: Any, *args: Any) -> Any:
        key = _key(cls, args, (ctx.needs_input_grad, torch.is_grad_enabled(), _autocast(args)))
        if key is None:
            return cls.forward(ctx, *args)
        ctx.kind_of_call = key
        if _calls.get(key) is None:
            noted = _Noted(ctx, None)
            outputs, above = _measured(counter, lambda: cls.forward(noted, *args))
            if key not in _calls:
                _calls[key] = _described(args, outputs, noted, above)
            return outputs
        call = _calls[key]
        assert call is not None
        outputs, saved = _allocated(call, args, counter)
        for name, value in call.attributes.items():
            setattr(ctx, name, value)
        ctx.set_materialize_grads(call.materialize)
        ctx.save_for_backward(*saved)
        return outputs

    def backward(ctx: Any, *grads: Any) -> Any:
        key = _key(getattr(ctx, "kind_of_call", None), grads, None)
        noted = _Noted(ctx, ctx.saved_tensors)
        if key is None or _calls.get(key) is None:
            outputs, above = _measured(counter, lambda: cls.backward(noted, *grads))
            if key is not None and key not in _calls:
                _calls[key] = _described(grads, outputs, noted, above)
            return outputs
        call = _calls[key]
        assert call is not None
        return _allocated(call, grads, counter)[0]

    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward), "__module__": __name__}
    return type(cls.__name__, (Function,), parts)


class _Noted:
    """The context of a call, which notes what is put into it and unpacks what was saved once."""

    def __init__(self, ctx: Any, saved: tuple[Tensor, ...] | None) -> None:
        vars(self).update(_ctx=ctx, _attributes={}, _saved=(), _materialize=True, _more=False)
        if saved is not None:
            vars(self)["saved_tensors"] = saved

    def __getattr__(self, name: str) -> Any:
        if name.startswith("mark_"):
            vars(self)["_more"] = True
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._attributes[name] = value
        setattr(self._ctx, name, value)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        vars(self)["_saved"] = tensors
        self._ctx.save_for_backward(*tensors)

    def set_materialize_grads(self, value: bool) -> None:
        vars(self)["_materialize"] = value
        self._ctx.set_materialize_grads(value)


def _measured(counter: Counter, run: Callable[[], Any]) -> tuple[Any, int]:
    """Return what `run` returns, and its peak above what lives before it."""
    before, peak = counter.live, counter.peak
    counter.peak = before
    found = run()
    above = counter.peak - before
    counter.peak = max(peak, counter.peak)
    return found, above


def _autocast(args: Sequence[Any]) -> tuple[bool, torch.dtype]:
    device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _key(first: Any, args: Sequence[Any], rest: Any) -> Any:
    """Return what tells apart calls that allocate differently; None for arguments that cannot be told."""
    if first is None:
        return None
    places: dict[int, int] = {}
    parts: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            place = places.setdefault(arg.untyped_storage()._cdata, len(places))
            parts.append((place, arg.shape, arg.stride(), arg.storage_offset(), arg.dtype, arg.device))
        else:
            parts.append(arg)
    key = first, tuple(parts), rest
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _described(args: Sequence[Any], outputs: Any, noted: _Noted, above: int) -> _Call | None:
    """Return what a call did; None for one whose results are more than tensors in memory of their own."""
    single = not isinstance(outputs, tuple)
    given = {a.untyped_storage()._cdata: i for i, a in reversed([*enumerate(args)]) if isinstance(a, Tensor)}
    memory: dict[int, int] = {}
    pieces: list[tuple[int, torch.dtype, torch.device]] = []

    def made(tensor: Any) -> _Made | None:
        if tensor is None:
            return None
        storage = tensor.untyped_storage()
        if storage._cdata in given:
            source = "given", given[storage._cdata]
        else:
            if storage._cdata not in memory:
                memory[storage._cdata] = len(pieces)
                pieces.append((storage.nbytes() // tensor.element_size(), tensor.dtype, tensor.device))
            source = "new", memory[storage._cdata]
        return _Made(
            source, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device
        )

    every = (outputs,) if single else outputs
    if noted._more or not all(t is None or isinstance(t, Tensor) for t in (*every, *noted._saved)):
        return None
    results, saved = tuple(map(made, every)), tuple(map(made, noted._saved))
    same = all(
        m is None or m.source[0] == "given" or m.dtype == pieces[m.source[1]][1] for m in (*results, *saved)
    )
    if not same or any(m is not None and m.source[0] == "given" for m in results):
        return None
    return _Call(tuple(pieces), results, single, saved, above, noted._attributes, noted._materialize)


def _allocated(call: _Call, args: Sequence[Any], counter: Counter) -> tuple[Any, list[Tensor | None]]:
    """Return results and saved tensors of a call that is not made, in memory of their own."""
    counter.peak = max(counter.peak, counter.live + call.above)
    pieces = [torch.empty(count, dtype=dtype, device=device) for count, dtype, device in call.memory]

    def again(made: _Made | None) -> Tensor | None:
        if made is None:
            return None
        kind, index = made.source
        base: Tensor = args[index] if kind == "given" else pieces[index]
        if base.shape == made.size and base.stride() == made.stride and base.dtype == made.dtype:
            return base
        return base.as_strided(made.size, made.stride, made.offset)

    results = tuple(map(again, call.outputs))
    return (results[0] if call.single else results), [again(made) for made in call.saved]
