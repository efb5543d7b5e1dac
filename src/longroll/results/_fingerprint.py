"""Short hashes that tell models and texts of one name apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}  # by size


def fingerprint(lm: nn.Module) -> str:
    """Tell models of one name apart: a hash of the sum and the first numbers of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in lm.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            bits = tensor.detach().flatten().view(_INTEGERS[tensor.element_size()])
            total = bits.sum(dtype=torch.int64).item()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {total}".encode())
            digest.update(bits[:64].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint_of_arrays(arrays: Iterable[Any]) -> str:
    """Tell arrays of numbers apart: a hash of their types, shapes and contents."""
    digest = hashlib.sha256()
    for array in map(np.asarray, arrays):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]
