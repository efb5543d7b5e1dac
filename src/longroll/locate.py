"""Find a checkpoint before anything of it is loaded: its folder, config, code, dtype and device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from longroll.checkpoint import weight_files
from longroll.errors import LongrollError, first_line, named
from longroll.families import known_family
from longroll.history import BESIDE

SPECIMEN = Path(__file__).parent / "assets" / "specimen"
"""The small model inside the package that breaks past its training length."""


def source_of(path_or_hub_id: str | Path) -> str:
    """Return the path of what lies here, "specimen" among it; else the name, which is the hub's."""
    name = str(path_or_hub_id)
    place = SPECIMEN if name == "specimen" else Path(name)
    return str(place) if place.exists() else name


def local_folder(source: str, *, only_config: bool = False) -> Path:
    """Return the folder of a checkpoint, downloaded where `source` is the hub's.

    Args:
        source: a folder or hub id.
        only_config: leave pickled weights out of the download.

    Raises:
        LongrollError: for a path that is not a folder, and a name that the hub does not give.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise LongrollError(f"{source} is not a model folder: check the path.")
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "adapter_config.json", BESIDE] + ([] if only_config else ["pytorch_model.bin"])
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:
        raise LongrollError(
            f"{source} is neither a folder here nor available from the hub ({type(error).__name__}). Check "
            "the name and the network, or name a local folder."
        ) from None


def read_config(source: str) -> dict[str, Any]:
    """Return the entries of the config.json of a checkpoint.

    Raises:
        LongrollError: for a checkpoint without one, and a file that is no JSON object.
    """
    path = local_folder(source, only_config=True) / "config.json"
    if not path.is_file():
        raise LongrollError(f"{source} has no config.json: name a folder that holds a model.")
    return _json_object(path)


def base_of_adapter(source: str) -> str | None:
    """Return what a PEFT folder adapts; None for a folder of any other kind.

    Raises:
        LongrollError: for a folder that holds an adapter and whole weights, of which one would be ignored.
    """
    folder = local_folder(source, only_config=True)
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    if weight_files(folder):
        raise LongrollError(
            f"{source} holds whole weights and an adapter: remove {file.name} to read the weights alone, or "
            "the weights to read the adapter on its base."
        )
    base = _json_object(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise LongrollError(
            f"{file} names no base_model_name_or_path: merge the adapter, and name the result."
        )
    if base == source:
        raise LongrollError(f"{file} names itself as its base_model_name_or_path: name the model it adapts.")
    return base


def load_code(source: str, config: dict[str, Any], *, trusted: bool) -> None:
    """Import the class that comes with a checkpoint, whose module may register a family.

    Args:
        source: the checkpoint.
        config: its config.
        trusted: whether its code may run.

    Raises:
        LongrollError: for code that fails, and for a model type that only code which may not run could open.
    """
    if not trusted:
        model_type = config.get("model_type")
        if config.get("auto_map") and known_family(model_type) is None:
            raise LongrollError(
                f"{source}: the model type {model_type!r} comes with its own code. Run it by "
                "`trust_remote_code`."
            )
        return
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    reference = (config.get("auto_map") or {}).get("AutoModelForCausalLM")
    if reference is not None:
        try:
            get_class_from_dynamic_module(reference, source)
        except Exception as error:
            raise LongrollError(
                f"{source}: its code cannot be loaded ({reference}): {named(error)}"
            ) from error


def entry_of(config: dict[str, Any], *names: str) -> Any:
    """Return the first of several entries that is there and says something; else None."""
    return next((config[name] for name in names if config.get(name)), None)


def default_device() -> str:
    """Return the type of the device that is used where none is named: cuda, else xpu, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.xpu.is_available():
        return "xpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_of(device: str | int | torch.device, argument: str = "device") -> torch.device:
    """Return a device that tensors can lie on; `argument` named it.

    Raises:
        LongrollError: for a device that cannot be used here.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        why = first_line(error).rstrip(".")
        raise LongrollError(f"`{argument}` {device} cannot be used here: {why}. Try cpu.") from None


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of a name.

    Raises:
        LongrollError: for a name that is not a dtype of torch in which models are held.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise LongrollError(f"`dtype` {name} is not a torch dtype: try float32, bfloat16 or float16.")
    if not found.is_floating_point or found.itemsize < 2:
        raise LongrollError(f"`dtype` {name} holds no model: try bfloat16, float32, float16 or int8.")
    return found


def _json_object(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise LongrollError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise LongrollError(f"{path} holds no model's config: it must be a JSON object.")
    return config
