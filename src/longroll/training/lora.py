"""Adapters on the linear layers of a model, and their forward without needless passes over memory.

peft widens the input of each adapted projection to float32, which autocast narrows again, and multiplies the
output of the adapter by its scale. Here autocast gets the input as it is, and the scale multiplies the few
numbers between both matrices. A scale that is a power of two, as `with_lora` sets it, gives the same bits.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from longroll.errors import LongrollError
from longroll.families._replace import replace_forward
from longroll.model import RecurrentLM

_READ_BARE = ["dt_proj", "out_proj", "x_proj.2"]
"""Projections whose weights the mixers of Mamba and RWKV-6 or their kernels read past any adapter."""


def with_lora(model: Any, rank: int) -> Any:
    """Put adapters of a rank on the linear layers; rank 0 leaves the model as it is."""
    if not rank:
        return model
    check_peft()
    from peft import LoraConfig, get_peft_model

    linear = {
        name: id(next(m.parameters(recurse=False)))  # of a layer in 8 bits: its codes
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
    }
    uses = Counter(linear.values())
    shared = [name for name, weight in linear.items() if uses[weight] > 1]  # would merge once for each use
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=_READ_BARE + shared
    )
    return lean(get_peft_model(model, config))


def check_peft() -> None:
    """Refuse adapters without the package that makes them."""
    if find_spec("peft") is None:
        raise LongrollError("`lora_rank` needs peft: pip install 'longroll[lora]'.")


def adapter_bytes(model: nn.Module, rank: int) -> int:
    """Return the bytes of the weights of adapters of a rank."""
    linear = [
        m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and not name.endswith(tuple(_READ_BARE))
    ]
    return 4 * rank * sum(m.in_features + m.out_features for m in linear)


def check_adapters(lm: RecurrentLM, rank: int) -> None:
    """Refuse adapters that a saved model would lack, adapters of a rank on top of others, and none on 8 bits.

    Raises:
        LongrollError: with what to do instead.
    """
    if lm.int8 and not (rank or lm.adapted is not None):
        raise LongrollError(
            f"`dtype` int8: {lm.name} trains by adapters alone: give `lora_rank`, such as 16."
        )
    if getattr(lm.model, "_hf_peft_config_loaded", False) and lm.adapted is None:
        raise LongrollError(
            "The model holds adapters that transformers put there, which would be saved without it: open "
            "their folder with longroll.load, or wrap the model with peft."
        )
    if rank:
        check_peft()
    if lm.adapted is not None and rank:
        raise LongrollError("`lora_rank`: the model has adapters already; leave it out, or merge them first.")


def lean(model: Any) -> Any:
    """Return `model`, whose plain linear adapters have the forward below; doing it twice is harmless."""
    if hasattr(model, "peft_config"):
        from peft.tuners.lora.layer import Linear

        for module in model.modules():
            if type(module) is Linear:
                replace_forward(module, functools.partial(_forward, module))
    return model


def _forward(layer: Any, original: Callable[..., Tensor], x: Tensor, *others: Any, **named: Any) -> Tensor:
    name = _only_adapter(layer)
    if name is None or others or named:
        return original(x, *others, **named)
    first, second = layer.lora_A[name], layer.lora_B[name]
    if x.dtype != first.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return original(x)
    result: Tensor = layer.base_layer(x)
    found: Tensor = result + second(first(layer.lora_dropout[name](x)) * layer.scaling[name])
    return found.to(result.dtype)


def _only_adapter(layer: Any) -> str | None:
    """Return the adapter of a layer that applies one, of the plain kind; else None."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged or active[0] in layer.lora_variant:
        return None
    return active[0] if layer.lora_B[active[0]].bias is None else None  # the scale multiplies a bias too
