"""Replacement of the forward of a module."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn


def replace_forward(module: nn.Module, replacement: Callable) -> None:
    """Let `replacement(original, ...)` run in the place of a module's forward; doing it twice is harmless.

    accelerate's hooks (`device_map`, `dispatch_model`), whether they come before or after, stay around it. A
    forward that somebody else has replaced stays.
    """
    place = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    original = getattr(module, place)
    own = getattr(original, "__func__", None) is type(module).forward
    if own:
        setattr(module, place, functools.partial(replacement, original))
