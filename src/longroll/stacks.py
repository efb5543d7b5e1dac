"""Tensors that are alike, stacked: on a GPU one launch for a stack, rather than one for each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")


class Stacks(Generic[Key]):
    """Packs mappings of tensors with the same keys into stacks (K, ...), and takes stacks apart.

    Args:
        groups: keys whose tensors are alike in shape, dtype and device; a stack holds those of one group.
    """

    def __init__(self, groups: Iterable[Sequence[Key]]) -> None:
        self.groups = [list(keys) for keys in groups]

    def view(self, tensors: Mapping[Key, Tensor]) -> Iterator[Tensor]:
        """Return the stacks, to be read only: the memory of `tensors` where it is one stack already."""
        for keys in self.groups:
            group = [tensors[key] for key in keys]
            yield _whole(group) if _is_whole(group) else torch.stack(group)

    def copy(self, tensors: Mapping[Key, Tensor], out: Iterable[Tensor] | None = None) -> list[Tensor]:
        """Return the stacks in memory of their own, off the graph; written into the stacks `out` where
        given.
        """
        groups = [[tensors[key] for key in keys] for keys in self.groups]
        stacks = list(out) if out is not None else [g[0].new_empty(len(g), *g[0].shape) for g in groups]
        for stack, group in zip(stacks, groups, strict=True):
            torch._foreach_copy_(list(stack.unbind()), group)  # on a GPU faster than torch.stack
        return stacks

    def split(self, stacks: Iterable[Tensor]) -> dict[Key, Tensor]:
        """Return the tensors of each stack (K, ...) under their keys, as views."""
        groups = zip(self.groups, stacks, strict=True)
        return {key: t for keys, stack in groups for key, t in zip(keys, stack.unbind(), strict=True)}


def _is_whole(tensors: list[Tensor]) -> bool:
    """Return whether the tensors lie one behind the other, as `split` leaves the parts of a stack."""
    memory, start = tensors[0].untyped_storage().data_ptr(), tensors[0].storage_offset()
    size = tensors[0].numel()
    return all(
        (t.untyped_storage().data_ptr(), t.storage_offset()) == (memory, start + i * size)
        and t.is_contiguous()
        and not t.requires_grad
        for i, t in enumerate(tensors)
    )


def _whole(tensors: list[Tensor]) -> Tensor:
    """Return the stack of which the tensors are the parts."""
    first = tensors[0]
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))
