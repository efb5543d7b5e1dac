"""A model whose layers lie on several devices, by accelerate: what a layer remembers stays where it lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
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
        place: Any = device_map
        check_tied(model, place)
        dispatch_model(model, device_map, skip_keys=model._skip_keys_device_placement)
    except LongrollError:
        raise
    except Exception as error:  # unknown devices and modules, parts without a place
        raise LongrollError(f"`device_map` {device_map} cannot be followed: {named(error)}") from error


def check_tied(model: PreTrainedModel, device_map: dict[str, Any]) -> None:
    """Refuse a map that places parameters that are one tensor on several devices.

    Raises:
        LongrollError: with the parameters.
    """
    from accelerate.utils import find_tied_parameters

    for group in find_tied_parameters(model):
        places = {str(_entry(device_map, name)) for name in group}
        if len(places) > 1:
            names = " and ".join(sorted(group))
            raise LongrollError(
                f"`device_map`: {names} are one tensor and cannot lie on {' and '.join(sorted(places))}: "
                "give them one device."
            )


def _entry(device_map: dict[str, Any], name: str) -> Any:
    """Return where a map places a parameter: the entry of the nearest part that has one."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return device_map.get(name)


def device_of_part(part: nn.Module) -> torch.device:
    """Return where a part of a model computes, which under accelerate's hooks may run elsewhere."""
    place = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
    if place is None:
        return next(part.parameters()).device
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
