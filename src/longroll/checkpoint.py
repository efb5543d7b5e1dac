"""The files of a checkpoint: which tensors they hold, in what precision, and which of them a model leaves."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

_INDEXED = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|(^|\.)position_ids|(attn|attention)\.(masked_)?bias)$")
"""What older versions of transformers saved and every version computes."""


class Stored(NamedTuple):
    """A tensor of a file, without its numbers."""

    file: Path
    dtype: torch.dtype | None
    """None: no floating-point format of torch's that models are trained in."""
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """Where a model was read from."""

    folder: Path
    """The folder, or the file."""
    dtype: torch.dtype | None
    """That of most of its numbers; None where they are quantised."""
    layout: str = "transformers"
    """`transformers`, `state-spaces` or `rwkv`: whose names and files."""
    unused: tuple[str, ...] = ()
    """Tensors of the files that the model's class does not hold (multi-token prediction, towers)."""

    def unused_tensors(self) -> dict[str, Tensor]:
        """Return what a model saved in the place of this one would lose."""
        return read_tensors(self.folder, self.unused)


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers would read the weights of `folder` from."""
    for name in _INDEXED:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [
                folder / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))
            ]
    return []


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return every tensor in the weights of `folder`, by the files' own names."""
    found = {}
    for file in weight_files(folder):
        if file.suffix == ".bin":
            for name, tensor in load_pickle(file).items():
                if isinstance(tensor, Tensor):
                    found[name] = Stored(
                        file, tensor.dtype if tensor.is_floating_point() else None, tensor.numel()
                    )
            continue
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                part = tensors.get_slice(name)
                size = 1
                for axis in part.get_shape():
                    size *= axis
                found[name] = Stored(file, _DTYPES.get(part.get_dtype()), size)
    return found


def load_pickle(file: Path) -> dict[str, Any]:
    """Return a `.bin` file's tensors, mapped where the format allows it; nothing else is unpickled."""
    tensors: dict[str, Any]
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # written before torch 1.6
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    return tensors


def common_dtype(stored: Iterable[Stored]) -> torch.dtype | None:
    """Return the dtype of most numbers."""
    counts: Counter[torch.dtype | None] = Counter()
    for tensor in stored:
        counts[tensor.dtype] += tensor.size
    return counts.most_common(1)[0][0] if counts else None


def read_tensors(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Return some of the tensors of `folder`, on the CPU."""
    wanted, found = set(names), {}
    for file in weight_files(folder) if wanted else ():
        if file.suffix == ".bin":
            found.update({name: t for name, t in load_pickle(file).items() if name in wanted})
            continue
        with safe_open(file, framework="pt") as tensors:
            found.update({name: tensors.get_tensor(name) for name in wanted & set(tensors.keys())})
    return found


def unused_names(stored: Iterable[str], model: Any, unexpected: Iterable[str]) -> tuple[str, ...]:
    """Return names in the files of tensors that `model` was read without.

    Args:
        stored: the files' names.
        model: what transformers made of them.
        unexpected: what it reports as unexpected, which leaves out the names that the class ignores.
    """
    patterns = "|".join(f"({pattern})" for pattern in model._keys_to_ignore_on_load_unexpected or ())
    ignored = re.compile(patterns) if patterns else None
    held, unexpected = set(model.state_dict()), set(unexpected)
    layers = {layer[0] for name in held if (layer := re.match(r".*?\.layers\.\d+\.", name))}
    found = []
    for name in stored:
        layer = re.match(r".*?\.layers\.\d+\.", name)
        skipped = ignored is not None and ignored.search(name) and name not in held
        # files name each expert of a layer, where the model holds them as one
        lost = name in unexpected or (skipped and not (layer and layer[0] in layers))
        if lost and not _BUFFERS.search(name):
            found.append(name)
    return tuple(sorted(found))
