"""Weights and tokens that are the same on every machine: what layouts.json was made with."""

import zlib

import torch
from torch import Tensor, nn


def noise(name: str, count: int) -> Tensor:
    """Numbers in [-.5, .5) that look like noise, float64 (count,)."""
    seed = zlib.crc32(name.encode()) % 1000
    values = torch.sin(torch.arange(count, dtype=torch.float64) * 12.9898 + seed) * 43758.5453
    return values - values.floor() - 0.5


@torch.no_grad()
def plant(model: nn.Module) -> None:
    """Overwrite every weight; norms stay near 1."""
    for name, parameter in model.named_parameters():
        values = noise(name, parameter.numel()).view(parameter.shape)
        if parameter.ndim > 1:
            parameter.copy_(values * 0.6)
        else:
            parameter.copy_(values + (1.0 if "norm" in name else 0.0))


def text(vocab_size: int, length: int) -> Tensor:
    """Token ids (2, length)."""
    return ((noise("text", 2 * length) + 0.5) * vocab_size).long().view(2, length)
