"""Adapters on the linear layers of a model."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from longroll.errors import LongrollError
from longroll.model import RecurrentLM

_READ_BARE = ["dt_proj", "out_proj", "x_proj.2"]
"""Projections whose weights the mixers of Mamba and RWKV-6 or their kernels read past any adapter."""


def with_lora(model: Any, rank: int) -> Any:
    """Put adapters of a rank on the linear layers; rank 0 leaves the model as it is."""
    if not rank:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise LongrollError("`lora_rank` needs peft: pip install 'longroll[lora]'.") from None
    linear = {name: id(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    uses = Counter(linear.values())
    shared = [name for name, weight in linear.items() if uses[weight] > 1]  # would merge once for each use
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=_READ_BARE + shared
    )
    return get_peft_model(model, config)


def check_adapters(lm: RecurrentLM, rank: int) -> None:
    """Refuse adapters that a saved model would lack, and adapters of a rank on top of others."""
    if getattr(lm.model, "_hf_peft_config_loaded", False) and lm.adapted is None:
        raise LongrollError(
            "The model holds adapters that transformers put there, which would be saved without it: open "
            "their folder with longroll.load, or wrap the model with peft."
        )
    if lm.adapted is not None and rank:
        raise LongrollError("`lora_rank`: the model has adapters already; leave it out, or merge them first.")
