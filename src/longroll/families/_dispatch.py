"""Longroll's ops in the place of transformers' own scan functions, inside a longroll forward only.

Mixers look `mamba_selective_scan`, `mamba2_chunk_scan` and `causal_conv1d_fn` up in their module at call
time: the only place where Mamba-1 can be given a state. The replacement runs longroll's op when a
StateCache left it an initial state and transformers' own function otherwise, so models that were not
opened by longroll compute exactly what they did before.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from longroll import ops
from longroll.families._padding import Padding, limited_steps, no_step, still
from longroll.ops._block_attention import block_attention
from longroll.ops._common import widen_float16


class Start(NamedTuple):
    """What a recurrence starts from, and where its inputs are padding."""

    state: Any
    """The initial state; None is zero."""
    padding: Padding | None = None
    """Where its inputs are padding, which leaves the state as it is; None: nowhere."""


# The states that the recurrences about to run start from, in the order they run in: mixers read one from the
# cache, then call the scan without it (transformers' Mamba-1 has no argument for it), so it is left here.
Handoff = ContextVar[tuple["Start", ...]]
recurrent_handoff: Handoff = ContextVar("longroll_recurrent_state", default=())
conv_handoff: Handoff = ContextVar("longroll_conv_state", default=())
attention_handoff: Handoff = ContextVar("longroll_keys_and_values", default=())


def take(handoff: Handoff) -> Start | None:
    """Return what was left for the op that is about to run, once; None outside a longroll forward."""
    left = handoff.get()
    handoff.set(left[1:])
    return left[0] if left else None


def clear_handoffs() -> None:
    """Forget what was left: a forward that died must not hand its state to another model's."""
    for handoff in (recurrent_handoff, conv_handoff, attention_handoff):
        handoff.set(())


@contextlib.contextmanager
def clean_handoffs() -> Iterator[None]:
    """Clear handoffs after a forward, also where the forward fails."""
    try:
        yield
    except BaseException:
        clear_handoffs()
        raise


def own_recurrence(modeling: ModuleType) -> None:
    """Install the dispatching functions in a transformers modeling module; doing it twice is harmless."""
    for name, (adapter, handoff) in _ADAPTERS.items():
        if hasattr(modeling, name):
            install(modeling, name, adapter, handoff)


def install(modeling: ModuleType, name: str, adapter: Callable, handoff: Handoff) -> None:
    """Let `adapter(..., initial_state=...)` run in the place of a function where a state was left for it."""
    original = getattr(modeling, name)
    if not hasattr(original, "_longroll"):
        replacement = functools.partial(_dispatch, adapter, handoff, original)
        replacement._longroll = True  # type: ignore[attr-defined]
        setattr(modeling, name, replacement)


class _Attention(AttentionInterface):
    """Transformers' attention functions; longroll's where a cache left keys and values for it."""

    def __init__(self, table: AttentionInterface) -> None:
        super().__init__()
        self._local_mapping = table._local_mapping

    def get_interface(self, attn_implementation: str, default: Callable) -> Callable:
        """Return the function that an attention layer calls next."""
        left = take(attention_handoff)
        if left is None:
            return super().get_interface(attn_implementation, default)
        return functools.partial(_block_attention, left.state)


def attention_in_blocks(modeling: ModuleType) -> None:
    """Let attention layers read what a cache keeps in blocks; doing it twice is harmless."""
    table = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", None)
    if table is not None and not isinstance(table, _Attention):
        modeling.ALL_ATTENTION_FUNCTIONS = _Attention(table)  # type: ignore[attr-defined]


def _block_attention(
    past: tuple[tuple[Tensor, Tensor], ...],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_,
    scaling: float | None = None,
    **__,
) -> tuple[Tensor, None]:
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (t.to(dtype) for t in (query, key, value))
    return block_attention(query, key, value, past, scaling).transpose(1, 2).contiguous(), None


def torch_on_cpu(modeling: ModuleType) -> None:
    """Send tensors on a CPU to transformers' PyTorch where it bound a GPU kernel for any device."""
    for name, function in list(vars(modeling).items()):
        if inspect.isfunction(function) and hasattr(function, "__wrapped__"):
            bound = inspect.getclosurevars(function).nonlocals
            if bound.get("is_new_implementation"):  # transformers' name: of a package, not its own
                setattr(modeling, name, functools.partial(_by_device, function))


def _by_device(kernel, *args, **kwargs):
    tensor = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
    function = kernel.__wrapped__ if tensor.device.type == "cpu" else kernel
    return function(*args, **kwargs)


def _dispatch(adapter, handoff, original, *args, **kwargs):
    left = take(handoff)
    if left is None:
        return original(*args, **kwargs)
    padding = {} if left.padding is None else {"padding": left.padding}
    return adapter(*args, **(kwargs | {"initial_state": left.state} | padding))


def _selective_scan(
    hidden_states: Tensor,  # (B, D, T), as are dt and z; B and C are (B, N, T)
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None,
    padding: Padding | None = None,
    **_,
):
    x, dt, B, C = (t.transpose(1, 2) for t in (hidden_states, dt, B, C))
    z = None if z is None else z.transpose(1, 2)
    dt = no_step(dt, padding, softplus=delta_softplus)
    y, final_state = ops.selective_scan(
        x, dt, A, B, C, D, z, delta_bias, delta_softplus, initial_state=initial_state, output_final_state=True
    )
    y = y.transpose(1, 2)
    return (y, final_state) if return_last_state else y


def _chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,  # the checkpoint's, tuned for a GPU: ours chooses its own
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    z: Tensor | None = None,
    *,
    initial_state: Tensor | None,
    padding: Padding | None = None,
    **_,
):
    dt, dt_bias, dt_softplus, dt_limit = limited_steps(dt, dt_bias, dt_softplus, dt_limit, padding)
    y, final_state = ops.ssd(
        widen_float16(hidden_states),
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dt_softplus,
        initial_state=initial_state,
        output_final_state=True,
        dt_limit=dt_limit,
    )
    return (y, final_state) if return_final_states else y


def _delta_rule(
    op: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    initial_state: Tensor | None,
    padding: Padding | None = None,
    **_,
):
    inputs = still(op.__name__, (query, key, value, g, beta), padding)
    return op(*inputs, None, initial_state, output_final_state, use_qk_l2norm_in_kernel)


def _causal_conv(
    hidden_states: Tensor,  # (B, D, T)
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None,
    padding: Padding | None = None,
    **_,
):
    x = hidden_states.transpose(1, 2)
    y = cast(Tensor, ops.short_conv(x, weight, bias, activation, initial_state=initial_state))
    return y.transpose(1, 2)


_ADAPTERS: dict[str, tuple[Callable, Handoff]] = {
    "mamba_selective_scan": (_selective_scan, recurrent_handoff),
    "mamba2_chunk_scan": (_chunk_scan, recurrent_handoff),
    "torch_chunk_gated_delta_rule": (
        functools.partial(_delta_rule, ops.gated_delta_rule),
        recurrent_handoff,
    ),
    "chunk_kimi_delta_attention": (functools.partial(_delta_rule, ops.kda), recurrent_handoff),
    "causal_conv1d_fn": (_causal_conv, conv_handoff),
}
