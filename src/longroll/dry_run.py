"""Run a model without its weights, and count the memory that the run would take.

Tensors here have shapes, dtypes and devices, and no numbers (PyTorch's `FakeTensorMode`), and GPU kernels are
not launched, so that a model of any size runs on any machine. The operations are those of a real
run, forward and backward, so that the tensors that live at once are those of a real run too.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from longroll._dry_functions import repeated_functions
from longroll.errors import LongrollError, named
from longroll.families import model_class
from longroll.families.int8 import to_int8
from longroll.model import RecurrentLM
from longroll.outline import entries_of
from longroll.state import StateKey

_WIDEST_WINDOW = 16_384  # of attention, up to which it is read to its end


class Ledger(TorchDispatchMode):
    """Counts the bytes of the tensors that live, and the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes of the tensors that were made under the ledger and live."""
        self.peak = 0
        """The most that `live` was since `start`."""
        self._held: set[int] = set()

    def start(self) -> int:
        """Count the peak from here; return the bytes that live."""
        self.peak = self.live
        return self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in tree_iter(result):
            if isinstance(item, Tensor):
                self._note(item)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._held:
            self._held.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.live -= size


class _Dry(Ledger):
    """A ledger of tensors without numbers.

    A mask leaves a size that only numbers tell: here it leaves all.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in _all_of(index)], *args[2:])
        elif func is torch.ops.aten.nonzero.default:
            func, args = torch.ops.aten.new_empty.default, (args[0], (args[0].numel(), args[0].ndim))
            kwargs = {"dtype": torch.long}
        return super().__torch_dispatch__(func, types, args, kwargs)


def _all_of(index: Tensor | None) -> list[Tensor | None]:
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.long)] * index.ndim


@contextmanager
def dry_run() -> Iterator[Ledger]:
    """Run operations without numbers, and yield the ledger that counts the bytes of their tensors."""
    torch_log = logging.getLogger("torch._subclasses.fake_tensor")
    before = torch_log.level
    torch_log.setLevel(logging.CRITICAL)
    try:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake, _no_launches(), _moved_anew(), _Dry() as ledger, repeated_functions(ledger):
            yield ledger
    finally:
        torch_log.setLevel(before)


@contextmanager
def _no_launches() -> Iterator[None]:
    """Keep Triton kernels from launching."""
    try:
        from triton.runtime.autotuner import Autotuner, Heuristics
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return
    kinds = (JITFunction, Autotuner, Heuristics)
    before = [kind.run for kind in kinds]
    try:
        for kind in kinds:
            kind.run = lambda self, *args, **kwargs: None
        yield
    finally:
        for kind, run in zip(kinds, before, strict=True):
            kind.run = run


@contextmanager
def _moved_anew() -> Iterator[None]:
    """`Module.to` makes new parameters: tensors without numbers cannot be changed in place."""

    def apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(fn)
        for name, parameter in self._parameters.items():
            if parameter is not None and (moved := fn(parameter)) is not parameter:
                self._parameters[name] = nn.Parameter(moved.detach(), parameter.requires_grad)
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else fn(buffer)
        return self

    before = nn.Module._apply
    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = before  # type: ignore[method-assign]


def dry_model(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    int8: bool = False,
) -> RecurrentLM:
    """Return a model of `config` without weights, in eval mode; within `dry_run` only.

    Args:
        config: the config of the model.
        dtype: the dtype of its weights, but for those that `from_pretrained` keeps in float32.
        device: where it would be.
        int8: whether its large linear layers are in 8 bits.

    Raises:
        LongrollError: for a config that no model has.
    """
    try:
        with no_init_weights(), torch.device(device):
            found = model_class(config.model_type)
            model: Any = AutoModelForCausalLM.from_config(config) if found is None else found(config)
            _cast(model, dtype)
            model.tie_weights()
        if dtype != torch.bfloat16:
            model.set_experts_implementation("batched_mm")  # grouped products want bfloat16 here
        lm = RecurrentLM(model.eval())
        if int8:
            to_int8(lm.model, lm.width, keep=False)
        return lm
    except LongrollError:
        raise
    except Exception as error:  # sizes that no tensor has, or that do not divide each other
        raise LongrollError(f"No model of {config.model_type} has this config: {named(error)}") from None


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Hold the weights in `dtype`, as `from_pretrained` does; these tensors cannot be moved in place."""
    kept = model._keep_in_fp32_modules_strict or ()
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                full = f"{path}.{name}"
                wanted = torch.float32 if any(part in full for part in kept) else dtype
                if parameter.dtype != wanted:
                    module._parameters[name] = nn.Parameter(parameter.detach().to(wanted))


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model and of the state of one row."""

    parameters: int
    """How many numbers."""
    weights: int
    """Bytes of the parameters."""
    operations: float
    """Floating-point operations of the matrix products of a forward, a token; attention to earlier tokens is
    not among them."""
    recurrent: int
    """Bytes of the recurrent state of a row."""
    conv: int
    """Bytes of the conv state of a row."""
    grows: tuple[tuple[int, int, int | None], ...]
    """Keys, values and all else of the part `attention`: bytes after one token, bytes that each further token
    adds, and the most where a window bounds them."""

    @property
    def state(self) -> int:
        """Bytes of the recurrent and conv state of a row."""
        return self.recurrent + self.conv

    def keys_and_values(self, length: int) -> int:
        """Return the bytes of keys and values of a row after `length` tokens."""
        return sum(
            min(first + step * (length - 1), first + step * length if most is None else most)
            for first, step, most in self.grows
        )


@torch.no_grad()
def sizes_of(lm: RecurrentLM) -> Sizes:
    """Return the sizes of a model, of a dry run or real.

    Args:
        lm: the model; within `dry_run`, one of `dry_model`.
    """
    counts, states = [], []
    for tokens in (1, 2):
        with FlopCounterMode(display=False) as counter:
            states.append(_state_after(lm, tokens, head=True))
        counts.append(counter.get_total_flops())
    one, two = states
    windows = [size for size in _windows(lm.model.config) if size <= _WIDEST_WINDOW]
    last = _state_after(lm, max(windows) + 8) if windows else {}
    later = _state_after(lm, max(windows) + 9) if windows else {}
    grows = []
    for key, tensor in one.items():
        if key.part == "attention":
            step = two[key].nbytes - tensor.nbytes
            bounded = key in last and last[key].nbytes == later[key].nbytes
            grows.append((tensor.nbytes, step, last[key].nbytes if bounded else None))
    fixed = {
        part: sum(t.nbytes for key, t in one.items() if key.part == part) for part in ("recurrent", "conv")
    }
    return Sizes(
        parameters=sum(p.numel() for p in lm.model.parameters()),
        weights=sum(p.nbytes for p in lm.model.parameters()),
        operations=counts[1] - counts[0],
        recurrent=fixed["recurrent"],
        conv=fixed["conv"],
        grows=tuple(grows),
    )


def _state_after(lm: RecurrentLM, tokens: int, *, head: bool = False) -> dict[StateKey, Tensor]:
    ids = torch.zeros(1, tokens, dtype=torch.long, device=lm.device)
    hidden, state = lm(ids, logits=False)
    if head:
        lm.head(hidden)
    return dict(state)


def _windows(config: Any) -> set[int]:
    """Return sizes of windows that a config speaks of."""
    found: set[int] = set()
    for holder in (config, config.get_text_config()):
        for name, value in entries_of(holder.to_dict()):
            if "window" in name and isinstance(value, int) and not isinstance(value, bool) and value > 0:
                found.add(value)
    return found


_LENGTHS = (512, 1024)  # of a forward whose work space is counted


@torch.no_grad()
def forward_bytes(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> float:
    """Return the bytes that a forward without gradient takes for each of its tokens, at its peak.

    Weights, states and logits are not among them; keys and values of these tokens are.

    Args:
        config: the config of the model.
        dtype: the dtype of its weights.
        device: where it runs; GPU kernels are planned for on a machine that has the GPU.

    Raises:
        LongrollError: for a config that no model has.
    """
    peaks = []
    with dry_run() as ledger:
        lm = dry_model(config, dtype=dtype, device=device)
        for tokens in _LENGTHS:
            before = ledger.start()
            lm(torch.zeros(1, tokens, dtype=torch.long, device=device), logits=False)
            peaks.append(ledger.peak - before)
    return (peaks[1] - peaks[0]) / (_LENGTHS[1] - _LENGTHS[0])
