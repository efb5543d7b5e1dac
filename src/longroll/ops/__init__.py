"""Recurrences on `(inputs, initial_state) -> (outputs, final_state)`, differentiable in both."""

from longroll.ops.selective_scan import selective_scan
from longroll.ops.short_conv import short_conv
from longroll.ops.ssd import ssd

__all__ = ["selective_scan", "short_conv", "ssd"]
