"""One kernel for the RMS norms on a GPU, where transformers runs a chain of small ones.

On an H200 the norms of a Mamba-2 took longer than its recurrence. Modules are given the kernel one by one, so
that models longroll did not open keep their own, and only where their code is the one the kernel computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mamba2.modeling_mamba2 import Mamba2RMSNorm, MambaRMSNormGated

from longroll.families._replace import replace_forward
from longroll.ops._backend import choose
from longroll.ops._common import product_dtype, state_dtype

_WIDEST = 8192  # numbers that share a mean, which one program of the kernel holds


def fuse_norms(model: PreTrainedModel) -> None:
    """Let the norms of `model` run in one kernel where there is one; doing it twice is harmless."""
    for module in model.modules():
        if _code(type(module)) in _KNOWN:
            replace_forward(module, functools.partial(_forward, module))


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


def is_fused(module: nn.Module) -> bool:
    """Return whether a gated norm would run in the kernel, where there is one."""
    size: int = getattr(module, "group_size", _WIDEST + 1)
    return _code(type(module)) in _KNOWN and size <= _WIDEST
