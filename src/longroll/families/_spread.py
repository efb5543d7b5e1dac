"""A model whose layers lie on several devices, by accelerate: what a layer remembers stays where it lies."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from longroll.errors import LongrollError, named

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""The device maps that accelerate makes itself."""


def spread(model: PreTrainedModel, device_map: str | dict[str, Any]) -> None:
    """Place the parts of `model` by `device_map`; a model that `from_pretrained` placed stays as it is.

    Raises:
        LongrollError: for a `device_map` that accelerate cannot follow.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    if getattr(model, "hf_device_map", None) is not None:
        return
    whole = {"no_split_module_classes": list(model._no_split_modules or ())}
    try:
        if device_map == "sequential":
            device_map = infer_auto_device_map(model, **whole)
        elif device_map in STRATEGIES:
            memory = get_balanced_memory(model, low_zero=device_map == "balanced_low_0", **whole)
            device_map = infer_auto_device_map(model, memory, **whole)
        elif isinstance(device_map, str):
            device_map = {"": device_map}
        dispatch_model(model, device_map, skip_keys=model._skip_keys_device_placement)
    except Exception as error:  # unknown devices and modules, parts without a place
        raise LongrollError(f"`device_map` {device_map} cannot be followed: {named(error)}") from error
