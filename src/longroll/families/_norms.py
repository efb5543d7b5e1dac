"""One kernel for the RMS norms on a GPU, where transformers runs a chain of small ones.

On an H200 the norms of a Mamba-2 took longer than its recurrence. Modules are given the kernel one by one, so
that models longroll did not open keep their own, and only where their code is the one the kernel computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mamba.modeling_mamba import MambaBlock
from transformers.models.mamba2.modeling_mamba2 import (
    Mamba2Block,
    Mamba2RMSNorm,
    MambaRMSNormGated,
)

from longroll.families._cache import StateCache
from longroll.families._replace import replace_forward
from longroll.ops._backend import choose
from longroll.ops._common import needs_graph, product_dtype, state_dtype

THROUGH = False
"""Whether a block's residual goes through its norm, whose backward adds the gradients of both."""
_WIDEST = 8192  # numbers that share a mean, which one program of the kernel holds


def fuse_norms(model: PreTrainedModel) -> None:
    """Let the norms of `model` run in one kernel where there is one; doing it twice is harmless."""
    for module in model.modules():
        if _code(type(module)) in _KNOWN:
            replace_forward(module, functools.partial(_forward, module))
        if type(module) in (MambaBlock, Mamba2Block):
            replace_forward(module, functools.partial(_block, module))


def _code(kind: type[nn.Module]) -> tuple:
    """Return what tells two forwards apart, as transformers copies its norms from model to model."""
    code = getattr(kind.forward, "__code__", None)
    return () if code is None else (code.co_code, code.co_names, code.co_consts)


_KNOWN = {_code(Mamba2RMSNorm), _code(MambaRMSNormGated)}


def _forward(module: nn.Module, original: Callable, x: Tensor, gate: Tensor | None = None) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    size: int = getattr(module, "group_size", x.shape[-1])
    kernel = choose("rms_norm", x.device, state_dtype(x, weight, gate)).kernel
    if kernel is None or size > _WIDEST:
        return original(x) if gate is None else original(x, gate)
    return kernel(x, weight, module.variance_epsilon, gate, size, product_dtype(weight, x))


def _block(block: Any, original: Callable, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
    """Add what the mixer makes of the norm to its input; the norm's backward adds both gradients."""
    norm, x = block.norm, hidden_states
    kernel = choose("rms_norm_and_input", x.device, state_dtype(x, norm.weight)).kernel
    wide = x.dtype == norm.weight.dtype and (x.dtype == torch.float32 or not block.residual_in_fp32)
    wide = wide and isinstance(options.get("cache_params"), StateCache)
    fits = _code(type(norm)) in _KNOWN and x.shape[-1] <= _WIDEST and not hooked(norm)
    if not THROUGH or kernel is None or not fits or not wide or not needs_graph(x):
        return cast(Tensor, original(hidden_states, *args, **options))
    normed, residual = kernel(
        x, norm.weight, norm.variance_epsilon, x.shape[-1], product_dtype(norm.weight, x)
    )
    return residual + cast(Tensor, block.mixer(normed, *args, **options))


def hooked(module: nn.Module) -> bool:
    """Return whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        or module._backward_pre_hooks or hasattr(module, "_hf_hook")
    )  # fmt: skip


def is_fused(module: nn.Module) -> bool:
    """Return whether a gated norm would run in the kernel, where there is one."""
    size: int = getattr(module, "group_size", _WIDEST + 1)
    return _code(type(module)) in _KNOWN and size <= _WIDEST
