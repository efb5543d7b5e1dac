"""What made a result: command, versions, seed, device, date and duration."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longroll import ranks

_PACKAGES = (
    "longroll", "torch", "transformers", "accelerate", "peft",
    "triton", "flash-linear-attention", "mamba-ssm", "causal-conv1d",
)  # fmt: skip


def provenance(
    lm: nn.Module | None = None, *, seed: int, seconds: float, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Return everything needed to make a result again: command, versions, seed, device, date, duration.

    `device` is where it was made; with a model, the model's.
    """
    device = next(lm.parameters()).device if lm is not None else torch.device(device)
    return {
        "command": _command(),
        "versions": {"python": platform.python_version(), **package_versions()},
        "seed": seed,
        "device": _name_of(device),
        "threads": torch.get_num_threads(),
        "processes": ranks.world_size(),
        "dtype": None if lm is None else _dtype_name(lm),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
    }


def _dtype_name(lm: nn.Module) -> str:
    if getattr(lm, "int8", False):
        return "int8"
    return str(next(lm.parameters()).dtype).removeprefix("torch.")


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor() if device.type in ("cpu", "meta") else f"{device.type}, {_processor()}"


def _command() -> str:
    """Return the command line of this process, as one types it in the working directory."""
    if not sys.argv or not sys.argv[0]:
        return ""
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        program = ["python", "-m", script.parent.name]
    elif script.suffix == ".py":
        here = script.absolute().is_relative_to(Path.cwd())
        program = ["python", str(script.absolute().relative_to(Path.cwd()) if here else script.name)]
    else:
        program = [script.name]
    return shlex.join([*program, *sys.argv[1:]])


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on, where they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"
