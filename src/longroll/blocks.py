"""Tensors that grow along time, kept as the pieces in which they came."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

JOINED = 4096
"""Positions below which a piece is joined with the next one, so that single tokens make no piece each."""


class Blocks:
    """A tensor (batch, ..., time, size) as pieces of its time axis; immutable.

    Growing copies no piece but a last one of fewer than `JOINED` positions: reading n positions in chunks of
    c copies n * max(1, JOINED / c) of them in all, where one tensor would be copied whole for every chunk.

    Args:
        pieces: at least one, equal in all axes but time.
    """

    AXIS = -2

    def __init__(self, *pieces: Tensor) -> None:
        self.pieces = pieces

    @classmethod
    def after(cls, blocks: Blocks | None, new: Tensor) -> Blocks:
        """Return blocks, if any, and the positions of `new` after them."""
        return cls(own_memory(new)) if blocks is None else blocks._grown(new)

    def _grown(self, new: Tensor) -> Blocks:
        last = self.pieces[-1]
        if last.shape[self.AXIS] < JOINED:
            return Blocks(*self.pieces[:-1], torch.cat([last, new], dim=self.AXIS))
        return Blocks(*self.pieces, own_memory(new))

    def whole(self) -> Tensor:
        """Return one tensor; a copy where there is more than one piece."""
        return self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces, dim=self.AXIS)

    def map(self, function: Callable[[Tensor], Tensor]) -> Blocks:
        """Apply a function that treats positions alike to every piece."""
        return Blocks(*map(function, self.pieces))

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor."""
        shape = list(self.pieces[0].shape)
        shape[self.AXIS] = sum(piece.shape[self.AXIS] for piece in self.pieces)
        return torch.Size(shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the whole tensor."""
        return functools.reduce(torch.promote_types, (piece.dtype for piece in self.pieces))

    @property
    def device(self) -> torch.device:
        """Device of every piece."""
        return self.pieces[0].device


def own_memory(tensor: Tensor) -> Tensor:
    """Return `tensor`, copied where it is a part of a larger one, which it would keep in memory."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
