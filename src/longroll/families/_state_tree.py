"""The state of a plain module, a tree of tensors, as a `RecurrentState` and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # JAX's trees: tuples, lists, dicts, named tuples, and own classes

from longroll.errors import LongrollError
from longroll.state import Part, RecurrentState, StateKey

LONE = "state"
"""Path of a state that is one tensor."""


@dataclass(frozen=True)
class Leaf:
    """One tensor of the tree, and where it goes."""

    path: str
    """Keys and indices from the root, joined by dots: `h`, `0.conv`."""
    batch_axis: int
    part: Part
    shape: tuple[int, ...]
    """Shape without the batch axis."""
    dtype: torch.dtype | None
    """None: that of the module's weights."""
    keys: tuple[StateKey, ...]
    """One; with a batch axis above 0 one for each index of axis 0, which counts layers (as in nn.GRU)."""

    def split(self, tensor: Tensor) -> dict[StateKey, Tensor]:
        """Return the tensors of a `RecurrentState`, batch first, with at least one axis more."""
        if self.batch_axis == 0:
            return {self.keys[0]: tensor.unsqueeze(1) if tensor.ndim == 1 else tensor}
        layers = tensor.movedim(self.batch_axis, 1).unbind(0)
        return {
            key: layer.unsqueeze(1) if layer.ndim == 1 else layer
            for key, layer in zip(self.keys, layers, strict=True)
        }

    def join(self, state: Mapping[StateKey, Tensor], rows: int, dtype: torch.dtype, device: Any) -> Tensor:
        """Invert `split`; tensors that are not in `state` are zero."""
        shape = self.shape[1:] if self.batch_axis else self.shape
        layers = [
            state[key].reshape(rows, *shape)
            if key in state
            else torch.zeros(rows, *shape, dtype=self.dtype or dtype, device=device)
            for key in self.keys
        ]
        if self.batch_axis == 0:
            return layers[0]
        return torch.stack(layers).movedim(1, self.batch_axis).contiguous()

    def __str__(self) -> str:
        layers = sorted({key.layer for key in self.keys})
        where = f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
        shape = list(map(str, self.shape))
        shape.insert(self.batch_axis, "batch")
        return f"{self.path}: ({', '.join(shape)}), {self.part}, {where}"


@dataclass(frozen=True)
class StateTree:
    """How a module lays its state out: seen in forwards of different batch sizes, or declared."""

    spec: Any
    leaves: tuple[Leaf, ...]

    def __deepcopy__(self, memo: dict) -> StateTree:
        """Nothing in it changes."""
        return self

    def flatten(self, tree: Any, rows: int) -> dict[StateKey, Tensor]:
        """Return the tensors of a state that the module returned.

        Raises:
            LongrollError: for a state that is not laid out as the first one was.
        """
        found = named_leaves(tree)
        expected = {leaf.path: leaf.batch_axis for leaf in self.leaves}
        if found.keys() != expected.keys():
            raise LongrollError(
                f"forward returns a state of {', '.join(found)}, which was one of {', '.join(expected)}."
            )
        tensors: dict[StateKey, Tensor] = {}
        for leaf in self.leaves:
            shape = list(leaf.shape)
            shape.insert(leaf.batch_axis, rows)
            tensor = found[leaf.path]
            if list(tensor.shape) != shape:
                raise LongrollError(
                    f"forward returns {leaf.path} of shape {tuple(tensor.shape)} for {rows} rows, not "
                    f"{tuple(shape)}: the shape of a state depends on the batch alone."
                )
            tensors |= leaf.split(tensor)
        return tensors

    def unflatten(
        self, state: RecurrentState | None, rows: int, dtype: torch.dtype, device: torch.device
    ) -> Any:
        """Return the state as the module takes it; None for the zero state. Parts that are missing are
        zero.
        """
        if not state:
            return None
        known = {key for leaf in self.leaves for key in leaf.keys}
        if strange := sorted(str(key) for key in state if key not in known):
            raise LongrollError(f"the state holds {', '.join(strange)}, which the module does not have.")
        return pytree.tree_unflatten(
            [leaf.join(state, rows, dtype, device) for leaf in self.leaves], self.spec
        )

    def path_of(self, key: StateKey) -> str:
        """Return the module's own name of a state tensor."""
        return next(leaf.path for leaf in self.leaves if key in leaf.keys)

    def __str__(self) -> str:
        return "; ".join(map(str, self.leaves))


def named_leaves(tree: Any) -> dict[str, Tensor]:
    """Return the tensors of a tree by path.

    Raises:
        LongrollError: for a leaf that is not a tensor, and for a state without leaves.
    """
    pairs, _ = pytree.tree_flatten_with_path(tree)
    found = {".".join(map(_name, path)) or LONE: leaf for path, leaf in pairs}
    if len(found) < len(pairs):
        raise LongrollError(f"tensors of the state have one name: {', '.join(found)}.")
    for path, leaf in found.items():
        if isinstance(leaf, Tensor) and leaf.is_complex():
            raise LongrollError(f"{path} is complex: return torch.view_as_real of it, real numbers only.")
        if not isinstance(leaf, Tensor):
            raise LongrollError(
                f"forward returns {type(leaf).__name__} as {path}: a state is a tensor, or a tuple, list or "
                "dict of tensors."
            )
    if not found:
        raise LongrollError("forward returns a state without tensors.")
    return found


def _name(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def batch_axes(
    seen: Mapping[int, Mapping[str, Tensor]], declared: int | Mapping[str, int] | None
) -> dict[str, int]:
    """Return the batch axis of each leaf: declared, or the axis that has the size of the batch in each of
    `seen`.

    Args:
        seen: batch size -> the leaves of the final state, for two or more batch sizes.
        declared: the declared axis, for all leaves, or by path.

    Raises:
        LongrollError: for an axis that cannot be determined, and a declared one that is not the batch's.
    """
    paths = list(next(iter(seen.values())))
    given = dict.fromkeys(paths, declared) if isinstance(declared, int) else dict(declared or {})
    check_paths("batch_axis", given, paths)
    axes: dict[str, int] = {}
    for path in paths:
        shapes = {rows: tuple(leaves[path].shape) for rows, leaves in seen.items()}
        dimensions = {len(shape) for shape in shapes.values()}
        likely = [
            axis
            for axis in range(min(dimensions))
            if len(dimensions) == 1 and all(shape[axis] == rows for rows, shape in shapes.items())
        ]
        said = ", ".join(f"{shape} for {rows} rows" for rows, shape in shapes.items())
        axis = given.get(path)
        if axis is not None:
            axis = axis + min(dimensions) if axis < 0 else axis
            if axis not in likely:
                raise LongrollError(f"batch_axis {given[path]} of {path}: its shape is {said}.")
        elif len(likely) == 1:
            axis = likely[0]
        elif likely:
            raise LongrollError(
                f"{path} has shape {said}: more than one axis may be the batch. Set batch_axis={{{path!r}: "
                f"{likely[0]}}}, or another of {likely}."
            )
        else:
            raise LongrollError(
                f"{path} has shape {said}: no axis is the batch. A state has an axis for its rows; reshape "
                "it inside forward."
            )
        axes[path] = axis
    return axes


def keys_of(
    axes: Mapping[str, int], parts: Mapping[str, Part], examples: Mapping[str, Tensor]
) -> dict[str, tuple[StateKey, ...]]:
    """Return the keys of each leaf, given its batch axis, its part and an example of it.

    A leaf whose batch axis is not 0 holds a layer at each index of axis 0, as in nn.GRU. For the others the
    layer is the first index of a list or tuple on the way to it.
    """
    slots: Counter[tuple[int, Part]] = Counter()
    found: dict[str, tuple[StateKey, ...]] = {}
    for path, axis in axes.items():
        part = parts[path]
        index = next((int(name) for name in path.split(".") if name.isdigit()), 0)
        keys = []
        for layer in range(len(examples[path])) if axis else [index]:
            keys.append(StateKey(layer, part, slots[layer, part]))
            slots[layer, part] += 1
        found[path] = tuple(keys)
    return found


def check_paths(argument: str, given: Mapping[str, Any], paths: list[str]) -> None:
    """Raise a LongrollError for a path that the state does not have."""
    for path in given:
        if path not in paths:
            raise LongrollError(f"{argument}: the state has no {path!r}; it has {', '.join(paths)}.")
