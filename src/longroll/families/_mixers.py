"""Mamba's and Mamba-2's mixers over longroll's ops, time before channels throughout.

transformers' own turn every tensor for kernels that longroll does not use, and slice what needs no slicing,
which backward pays for in copies. Mixers of hybrids, which differ in details, keep their forward and get the
ops by `_dispatch`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from longroll import ops
from longroll.families._cache import StateCache
from longroll.families._norms import hooked, is_fused
from longroll.families._padding import limited_steps, no_step
from longroll.families._replace import replace_forward
from longroll.families._room import free_bytes
from longroll.ops._backend import choose
from longroll.ops._common import needs_graph, product_dtype, state_dtype, widen_float16
from longroll.ops._linear import is_faster, linear
from longroll.ops._short_conv import last_inputs

KEPT = 1 / 4
"""Share of a GPU's spare memory that may hold what backward would compute again. On an 80 GB GPU it holds all
of a 370M Mamba-2's 8,192 tokens, which saves a twentieth of the step (benchmarks/results/step-*)."""
_SAVED = 3  # bytes that a layer saves for backward anyway, in those of its first projection's result
LINEAR = True
"""Whether the gradients of projections' weights are written in float32 under autocast."""


def own_mixers(model: PreTrainedModel) -> None:
    """Give the mixers of `model` the forwards below; doing it twice is harmless."""
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for module in model.modules():
        if type(module) in _FORWARDS:
            # from now on `gradient_checkpointing_enable` sets it
            vars(module)["gradient_checkpointing"] = checkpointing
            replace_forward(module, functools.partial(_in_longroll, _FORWARDS[type(module)], module))


def _in_longroll(
    forward: Callable, mixer: nn.Module, original: Callable, hidden_states: Tensor, cache_params=None, **other
) -> Tensor:
    if not isinstance(cache_params, StateCache):  # the model is used by itself
        return original(hidden_states, cache_params=cache_params, **other)
    y = forward(mixer, hidden_states, cache_params)
    if not torch.is_autocast_enabled(y.device.type):
        y = y.to(hidden_states.dtype)
    return _projected(mixer.out_proj, y)


def _projected(layer: Any, x: Tensor) -> Tensor:
    """Return `layer(x)`; under autocast a weight's gradient is made in the weight's precision."""
    plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not hooked(layer)
    if plain and layer.bias is None and is_faster(x, layer.weight):
        return linear(x, layer.weight)
    if LINEAR and plain and needs_graph(layer.weight):
        dtype = product_dtype(layer.weight, x)
        if dtype.itemsize == 2 and layer.weight.dtype == torch.float32:
            kernel = choose("linear", x.device, dtype).kernel
            if kernel is not None:
                return cast(Tensor, kernel(x, layer.weight, layer.bias, dtype))
    return cast(Tensor, layer(x))


def _mamba(mixer: Any, hidden: Tensor, cache: StateCache) -> Tensor:
    x, gate = _projected(mixer.in_proj, hidden).chunk(2, dim=-1)
    x = _conv(mixer, x, cache)
    sizes = (mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size)
    dt, B, C = mixer.x_proj(x).split(sizes, dim=-1)
    dt = no_step(F.linear(dt, mixer.dt_proj.weight), cache.padding, softplus=True)
    y, final_state = ops.selective_scan(
        x, dt, -mixer.A_log.float().exp(), B, C, mixer.D.float(), gate,
        mixer.dt_proj.bias.float(), True,
        initial_state=cache.start(mixer.layer_idx, "recurrent"), output_final_state=True,
    )  # fmt: skip
    cache.keep(mixer.layer_idx, "recurrent", final_state)
    return y


def _mamba2(mixer: Any, hidden: Tensor, cache: StateCache) -> Tensor:
    projected = _projected(mixer.in_proj, hidden)
    wide = state_dtype(projected, mixer.A_log) == torch.float64
    sizes = (mixer.head_dim, mixer.ssm_state_size)
    kernel = choose("mamba2", projected.device, torch.float64 if wide else projected.dtype, sizes).kernel
    if kernel is not None and is_fused(mixer.norm):
        return _mamba2_at_once(kernel, mixer, projected, cache)
    channels, shared = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
    gate, xBC, dt = projected.split((channels, mixer.conv_dim, mixer.num_heads), dim=-1)
    x, B, C = _conv(mixer, xBC, cache).split((channels, shared, shared), dim=-1)
    B, C = (t.unflatten(-1, (mixer.n_groups, mixer.ssm_state_size)) for t in (B, C))
    x = widen_float16(x.unflatten(-1, (mixer.num_heads, mixer.head_dim)))
    dt, bias, softplus, limit = limited_steps(dt, mixer.dt_bias, True, mixer.time_step_limit, cache.padding)
    y, final_state = ops.ssd(
        x, dt, -mixer.A_log.float().exp(), B, C, mixer.D, None, bias, softplus,
        initial_state=cache.start(mixer.layer_idx, "recurrent"), output_final_state=True, dt_limit=limit,
    )  # fmt: skip
    cache.keep(mixer.layer_idx, "recurrent", final_state)
    return mixer.norm(y.flatten(-2), gate)


def _mamba2_at_once(kernel: Callable, mixer: Any, projected: Tensor, cache: StateCache) -> Tensor:
    """Return the same in one step of autograd; hooks on the convolution and the norm are not called."""
    from longroll.ops.gpu.mamba2 import Shape

    conv, norm, layer = mixer.conv1d, mixer.norm, mixer.layer_idx
    past, state = cache.start(layer, "conv"), cache.start(layer, "recurrent")
    shape = Shape(
        mixer.num_heads, mixer.head_dim, mixer.n_groups, mixer.ssm_state_size, tuple(mixer.time_step_limit),
        norm.variance_epsilon, norm.group_size, product_dtype(norm.weight, projected),
    )  # fmt: skip
    needed = (layer + 1) * shape.kept_bytes(projected)
    shape = shape._replace(keep=not mixer.gradient_checkpointing and needed <= _room(mixer, projected, cache))
    bias = None if conv.bias is None else conv.bias.float()
    y, final_state = kernel(
        projected, conv.weight.squeeze(1).float(), bias, mixer.dt_bias.float(), mixer.A_log.float(),
        mixer.D.float(), norm.weight, None if past is None else past.float().mT[:, 1:],
        None if state is None else state.float(), shape,
        None if cache.padding is None else cache.padding.out(3),
    )  # fmt: skip
    _, convolved, _ = shape.split(projected)
    cache.keep(layer, "conv", _tail(convolved, conv.weight.shape[-1], past, cache))
    cache.keep(layer, "recurrent", final_state)
    return y


def _room(mixer: Any, projected: Tensor, cache: StateCache) -> float:
    """Return the bytes that all layers of a forward may keep on a GPU for a faster backward.

    The first layer decides, for a forward that another library's checkpointing repeats, too. Spare is what
    the tensors that backward reads anyway and the gradients to come leave free.
    """
    if not KEPT or not torch.is_grad_enabled():
        return 0.0
    device = projected.device
    if device not in cache.room:
        coming = sum(p.nbytes for p in mixer.parameters() if p.requires_grad and p.grad is None)
        needed = len(cache.layers) * (coming + _SAVED * projected.nbytes)
        cache.room[device] = KEPT * max(0.0, free_bytes(device) - needed)
    return cache.room[device]


def _conv(mixer: Any, x: Tensor, cache: StateCache) -> Tensor:
    conv, past = mixer.conv1d, cache.start(mixer.layer_idx, "conv")
    y = ops.short_conv(x, conv.weight.squeeze(1), conv.bias, mixer.activation, initial_state=past)
    cache.keep(mixer.layer_idx, "conv", _tail(x, conv.weight.shape[-1], past, cache))
    return cast(Tensor, y)


def _tail(x: Tensor, width: int, past: Tensor | None, cache: StateCache) -> Tensor:
    """Return the last `width` inputs of a convolution, (B, D, width) in float32 (float64)."""
    if cache.padding is None:
        return last_inputs(x, width, past)
    return cache.padding.last_inputs(x, width, past).to(state_dtype(x, past))


_FORWARDS: dict[type[nn.Module], Callable] = {MambaMixer: _mamba, Mamba2Mixer: _mamba2}
