"""Read what a checkpoint is without its weights: its config, their dtype, where they would go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from longroll.errors import LongrollError, named
from longroll.families import family_of, is_original, is_rwkv_file, load_rwkv, model_class
from longroll.families.original_mamba import original_config
from longroll.locate import (
    base_of_adapter,
    device_of,
    dtype_of,
    entry_of,
    load_code,
    local_folder,
    read_config,
    source_of,
)

_MANY = 1 << 40  # above it no entry of a config is a size
_DEEPEST = 4096
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def outline(
    path_or_hub_id: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedConfig, torch.dtype, torch.device]:
    """Return the config of a checkpoint, the dtype that its weights would have, and their device.

    Args:
        path_or_hub_id: as `longroll.load` takes it; a `.pth` file of RWKV, without a config, is read.
        device: default: a GPU if there is one.
        dtype: default: float32 on a CPU, the checkpoint's own on a GPU; for "int8" that of the rest.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        LongrollError: for a missing or broken config, sizes that no model has, and an unknown architecture.
    """
    place = device_of(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = _config_of(source_of(path_or_hub_id), trust_remote_code)
    own = entry_of(vars(config), "dtype", "torch_dtype")
    if dtype not in (None, "auto", "int8"):
        chosen = dtype_of(str(dtype))
    elif place.type == "cpu" and dtype != "auto":
        chosen = torch.float32
    else:
        chosen = own if isinstance(own, torch.dtype) else dtype_of(str(own)) if own else torch.float32
    return config, chosen, place


def _config_of(source: str, trust_remote_code: bool) -> PreTrainedConfig:
    if is_rwkv_file(source):
        return load_rwkv(Path(source), dtype=torch.float32)[0].config
    if (base := base_of_adapter(source)) is not None:
        return _config_of(base, trust_remote_code)
    entries = read_config(source)
    check_entries(entries, source)
    if is_original(entries):
        return original_config(local_folder(source, only_config=True))
    model_type = entries.get("model_type")
    load_code(source, entries, trusted=trust_remote_code)
    family_of(model_type)
    found = model_class(model_type)
    try:
        if found is not None and found.config_class is not None:
            own: PreTrainedConfig = found.config_class.from_pretrained(source)
            return own
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        return config
    except Exception as error:  # entries of the wrong kind
        raise LongrollError(f"{source}: no model has this config.json: {named(error)}") from None


def check_entries(config: dict[str, Any], source: str) -> None:
    """Refuse a config whose numbers are no sizes, before anything is made of it.

    Raises:
        LongrollError: naming the entry.
    """
    for name, value in entries_of(config):
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        deep = "layer" in name and value > _DEEPEST
        if name in _DEPTHS and value < 1:
            raise LongrollError(f"{source}: {name} {value} leaves no layer: correct its config.json.")
        if deep or abs(value) > _MANY:
            raise LongrollError(f"{source}: {name} {value:,} is no size of a model: correct its config.json.")


def entries_of(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield names and values of a config, nested ones too."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from entries_of(value, str(key))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from entries_of(value, name)
    else:
        yield name, config
