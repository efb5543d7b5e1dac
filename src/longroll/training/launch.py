"""What a launcher or a loader asks for that a run with a state cannot do: refused in one line, by name."""

from __future__ import annotations

import os
from typing import Any

from longroll.errors import LongrollError

_SWITCHES = {
    "ACCELERATE_USE_DEEPSPEED": "no run with a state under DeepSpeed (ZeRO-2, ZeRO-3) has been seen",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM splits layers, and their states, over processes",
}
_SIZES = {
    "TP": "tensor parallelism splits a layer's heads, and their states, over processes",
    "CP": "context parallelism splits a sequence over processes, which then has no single initial state",
    "SP": "sequence parallelism splits a sequence over processes, which then has no single initial state",
    "DP_REPLICATE": "hybrid sharding has not been seen with states",
}
"""The sizes of accelerate's ParallelismConfig that must be 1."""


def check_launcher() -> None:
    """Refuse what accelerate's launcher set in the environment.

    Raises:
        LongrollError: naming DeepSpeed, Megatron-LM, or the kind of parallelism.
    """
    for switch, why in _SWITCHES.items():
        if os.environ.get(switch, "").lower() in ("1", "true", "yes"):
            raise LongrollError(f"{switch}: {why}: shard by FSDP2 (`fsdp`), or train by DDP.")
    for kind, why in _SIZES.items():
        name = f"PARALLELISM_CONFIG_{kind}_SIZE"
        if os.environ.get(name, "1") not in ("", "1"):
            raise LongrollError(f"{name} {os.environ[name]}: {why}: spread rows by DDP or FSDP2 (`fsdp`).")


def check_placement(model: Any) -> None:
    """Refuse a model whose weights lie on several devices or processes already.

    Raises:
        LongrollError: naming what spread them: tensor parallelism, a pipeline over devices.
    """
    places = getattr(model, "hf_device_map", None) or {}
    if len(set(places.values())) > 1:
        raise LongrollError(
            "`device_map` lays the layers, and their states, over several devices (a pipeline): load it "
            "on one, and spread rows by DDP or weights by FSDP2 (`fsdp`)."
        )
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise LongrollError(
            "The model's weights are spread over processes already (tensor parallelism by `tp_plan`, or "
            "`distributed_config`): load it whole, and shard it by FSDP2 (`fsdp`)."
        )
