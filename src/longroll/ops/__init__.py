"""Recurrences on `(inputs, initial_state) -> (outputs, final_state)`, differentiable in both."""

from longroll.ops.delta_rule import delta_rule
from longroll.ops.gated_delta_rule import gated_delta_rule
from longroll.ops.gla import gla
from longroll.ops.kda import kda
from longroll.ops.retention import retention
from longroll.ops.rwkv6 import rwkv6
from longroll.ops.rwkv7 import rwkv7
from longroll.ops.selective_scan import selective_scan
from longroll.ops.short_conv import short_conv
from longroll.ops.ssd import ssd

__all__ = [
    "delta_rule",
    "gated_delta_rule",
    "gla",
    "kda",
    "retention",
    "rwkv6",
    "rwkv7",
    "selective_scan",
    "short_conv",
    "ssd",
]
