"""Heads of a state: the one view of them that measures and readings share.

A state has heads where axis 1 holds a matrix each, (B, H, P, N). Where axis 1 holds channels with a vector
each (Mamba-1) or a number each (RWKV-4, RG-LRU), the layer counts as one head: a channel alone has too few
numbers to tell whether it has left a range.
"""

from __future__ import annotations

import torch
from torch import Tensor


def has_heads(tensor: Tensor) -> bool:
    """Return whether axis 1 of a state (B, ...) holds heads, rather than the channels of one."""
    return tensor.ndim > 3


def heads_of(tensor: Tensor) -> Tensor:
    """View a state (B, ...) as matrices (B, heads, P, N): without heads, one matrix (D, N) for the layer."""
    if has_heads(tensor):
        return tensor.flatten(3)
    channels, size = (*tensor.shape[1:], 1, 1)[:2]
    return tensor.reshape(len(tensor), 1, channels, size)


def channels_of(tensor: Tensor) -> Tensor:
    """View a state (B, ...) as (B, H, numbers): axis 1 holds heads or channels, as in `RecurrentLayer`."""
    heads = heads_of(tensor)
    return heads.flatten(2) if has_heads(tensor) else heads[:, 0]


def head_norms(tensor: Tensor) -> Tensor:
    """Return euclidean norm of each head of a state (B, ...), (B, heads), in float32 or wider."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norms: Tensor = heads_of(tensor).flatten(2).to(dtype).norm(dim=2)
    return norms


def scale_heads(tensor: Tensor, factor: Tensor) -> Tensor:
    """Multiply the heads of a state (B, ...) by `factor`: (B, heads), or () for all."""
    return (heads_of(tensor) * factor[..., None, None]).reshape(tensor.shape)


def choose_heads(mask: Tensor, tensor: Tensor, other: Tensor) -> Tensor:
    """Take the heads of state `tensor` (B, ...) where `mask` (B, heads) is true, of `other` elsewhere."""
    chosen = torch.where(mask[..., None, None], heads_of(tensor), heads_of(other))
    return chosen.reshape(tensor.shape)
