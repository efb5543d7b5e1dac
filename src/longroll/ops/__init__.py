"""Recurrences on `(inputs, initial_state) -> (outputs, final_state)`, differentiable in both."""

from longroll.ops._delta_rule import delta_rule
from longroll.ops._gated_delta_rule import gated_delta_rule
from longroll.ops._gla import gla
from longroll.ops._kda import kda
from longroll.ops._retention import retention
from longroll.ops._rwkv6 import rwkv6
from longroll.ops._rwkv7 import rwkv7
from longroll.ops._selective_scan import selective_scan
from longroll.ops._short_conv import short_conv
from longroll.ops._ssd import ssd

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
