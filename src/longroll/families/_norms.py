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
from transformers.models.mamba.modeling_mamba import MambaModel
from transformers.models.mamba2.modeling_mamba2 import (
    Mamba2Model,
    Mamba2RMSNorm,
    MambaRMSNormGated,
)

from longroll.families._cache import StateCache
from longroll.families._replace import replace_forward
from longroll.ops._backend import choose
from longroll.ops._common import needs_graph, product_dtype, state_dtype

ADDS = True
"""Whether the norm of a block also adds what the block before it made to the residual."""
_WIDEST = 8192  # numbers that share a mean, which one program of the kernel holds


def fuse_norms(model: PreTrainedModel) -> None:
    """Let the norms of `model` run in one kernel where there is one; doing it twice is harmless."""
    for module in model.modules():
        if _code(type(module)) in _KNOWN:
            replace_forward(module, functools.partial(_forward, module))
        if type(module) in (MambaModel, Mamba2Model):
            blocks: list[Any] = [*module.layers]  # type: ignore[misc]
            norms = [block.norm for block in blocks[1:]] + [module.norm_f]
            for block, norm, following in zip(blocks, norms, [*blocks[1:], None], strict=True):
                replace_forward(block, functools.partial(_block, block, norm, following))


def _code(kind: type[nn.Module]) -> tuple:
    """Return what tells two forwards apart, as transformers copies its norms from model to model."""
    code = getattr(kind.forward, "__code__", None)
    return () if code is None else (code.co_code, code.co_names, code.co_consts)


_KNOWN = {_code(Mamba2RMSNorm), _code(MambaRMSNormGated)}


def _forward(module: nn.Module, original: Callable, x: Tensor, gate: Tensor | None = None) -> Tensor:
    if gate is None and (normed := _made_before(x, module)) is not None:
        return normed
    weight: Tensor = module.weight  # type: ignore[assignment]
    size: int = getattr(module, "group_size", x.shape[-1])
    kernel = choose("rms_norm", x.device, state_dtype(x, weight, gate)).kernel
    if kernel is None or size > _WIDEST:
        return original(x) if gate is None else original(x, gate)
    return kernel(x, weight, module.variance_epsilon, gate, size, product_dtype(weight, x))


def _block(
    block: Any,
    norm: Any,
    following: nn.Module | None,
    original: Callable,
    hidden_states: Tensor,
    *args: Any,
    **options: Any,
) -> Tensor:
    """Run a block of Mamba, its residual and norms in one kernel.

    A block norms its result for the one after it, which finds it beside the result; a result that something
    in between replaces or changes is normed again. Backward adds the gradients of both in one kernel, too.
    """
    x, own = hidden_states, block.norm
    wide = x.dtype == own.weight.dtype and (x.dtype == torch.float32 or not block.residual_in_fp32)
    given = isinstance(options.get("cache_params"), StateCache) and needs_graph(x)
    again = block.gradient_checkpointing and block.training  # which is in `original`
    if again or not ADDS or not wide or not given or not _plain(own, x):
        return cast(Tensor, original(hidden_states, *args, **options))
    if (normed := _made_before(x, own)) is None:
        normed, x = _norm_of_sum(x, None, own)
    y = block.mixer(normed, *args, **options)
    # a hook may change the result; the weights of a hooked block may lie elsewhere until it runs
    alone = hooked(block) or (following is not None and hooked(following))
    if alone or not _plain(norm, x):
        return x + cast(Tensor, y)
    normed, total = _norm_of_sum(x, y, norm)
    total._normed = norm, total._version, normed  # type: ignore[attr-defined]
    return total


def _norm_of_sum(x: Tensor, add: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    kernel = choose("rms_norm_of_sum", x.device, x.dtype).kernel
    assert kernel is not None
    dtype = product_dtype(norm.weight, x)
    return kernel(x, add, norm.weight, norm.variance_epsilon, x.shape[-1], dtype)


def _plain(norm: nn.Module, x: Tensor) -> bool:
    """Return whether the kernel does all that calling the norm would."""
    known = _code(type(norm)) in _KNOWN and x.shape[-1] <= _WIDEST and not hooked(norm)
    weight: Tensor = norm.weight  # type: ignore[assignment]
    near = type(weight) is nn.Parameter and weight.device == x.device and weight.shape == x.shape[-1:]
    return known and near and choose("rms_norm_of_sum", x.device, state_dtype(x, weight)).kernel is not None


def _made_before(x: Tensor, norm: nn.Module) -> Tensor | None:
    """Return the norm of `x` that the block before made, if that is the norm of x as it is now.

    It stays with x: checkpointing by another library runs the block a second time.
    """
    of, version, normed = getattr(x, "_normed", (None, None, None))
    return cast(Tensor, normed) if of is norm and version == x._version else None


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
