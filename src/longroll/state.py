"""The state of a recurrent language model: named per-layer tensors, batch first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from longroll.blocks import Blocks
from longroll.files import write_whole
from longroll.stacks import Stacks

Part = Literal["recurrent", "conv", "attention"]


class StateKey(NamedTuple):
    """Which tensor of the state: layer, part, and the slot where a layer keeps several of one part."""

    layer: int
    part: Part
    slot: int = 0

    def __str__(self) -> str:
        return f"{self.layer}.{self.part}.{self.slot}"

    @classmethod
    def parse(cls, text: str) -> StateKey:
        """Read back what `str` wrote."""
        layer, part, slot = text.split(".")
        return cls(int(layer), part, int(slot))  # type: ignore[arg-type]


class RecurrentState(Mapping[StateKey, Tensor]):
    """An immutable collection of state tensors, each `(batch, ...)`.

    Parts: `recurrent` (the hidden state h), `conv` (tails of short convolutions, token shifts) and
    `attention` (KV of hybrids and of the Transformer control). Interventions act on `recurrent`
    and, by option, `conv`; rolling out carries all of them.

    Args:
        tensors: the tensors; axis 0 is the batch, axis 1 of recurrent and conv tensors the head
            (for Mamba-1, whose channels are heads of size one, the channel).
        seen: how many tokens this state has read (position ids and KV masks go on from there).
            Keys and values may come as `Blocks`: they are joined only where somebody asks for the tensor.
        ragged: the rows have read different numbers of tokens, and keys and values were left out: the state
            can start new texts, and cannot go on with these.
    """

    def __init__(
        self, tensors: Mapping[StateKey, Tensor | Blocks], *, seen: int = 0, ragged: bool = False
    ) -> None:
        self._tensors = dict(tensors)
        self.seen = seen
        self.ragged = ragged

    def __getitem__(self, key: StateKey) -> Tensor:
        tensor = self._tensors[key]
        return tensor.whole() if isinstance(tensor, Blocks) else tensor

    def blocks(self, key: StateKey) -> Blocks | None:
        """Return the tensor in the pieces it is kept in; None where there is none."""
        tensor = self._tensors.get(key)
        return Blocks(tensor) if isinstance(tensor, Tensor) else tensor

    def __iter__(self) -> Iterator[StateKey]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{key}: {tuple(t.shape)}" for key, t in self._tensors.items())
        return f"RecurrentState(seen={self.seen}, {shapes})"

    @property
    def batch_size(self) -> int:
        """Rows in the batch; 0 for a state without tensors."""
        return next(iter(self._tensors.values())).shape[0] if self else 0

    def map(self, function: Callable[[Tensor], Tensor]) -> RecurrentState:
        """Apply `function` to every tensor."""
        return RecurrentState(
            {key: function(t) for key, t in self.items()}, seen=self.seen, ragged=self.ragged
        )

    def _map_pieces(self, function: Callable[[Tensor], Tensor]) -> RecurrentState:
        """Return `map` for functions that treat positions alike, which joins no blocks."""
        mapped: dict[StateKey, Tensor | Blocks] = {
            key: t.map(function) if isinstance(t, Blocks) else function(t) for key, t in self._tensors.items()
        }
        return RecurrentState(mapped, seen=self.seen, ragged=self.ragged)

    def changed(self, tensors: Mapping[StateKey, Tensor]) -> RecurrentState:
        """Return the state with some of its tensors replaced; the others are shared, as they are kept."""
        return RecurrentState({**self._tensors, **tensors}, seen=self.seen, ragged=self.ragged)

    def alike(self) -> list[list[StateKey]]:
        """Return the keys, those of one part, shape, dtype and device together."""
        groups: dict[tuple[Part, torch.Size, torch.dtype, torch.device], list[StateKey]] = {}
        for key, tensor in self._tensors.items():
            groups.setdefault((key.part, tensor.shape, tensor.dtype, tensor.device), []).append(key)
        return list(groups.values())

    def map_stacked(self, function: Callable[..., Tensor], *others: RecurrentState) -> RecurrentState:
        """Apply `function` to stacks (K, batch, ...) of tensors that are alike: on a GPU one launch, not K.

        Args:
            function: given the stack of this state and those of the others; returns a stack (K, ...).
            others: states with the same keys.
        """
        stacks = Stacks(self.alike())
        mapped = stacks.split(map(function, *(stacks.view(state) for state in (self, *others))))
        tensors = {key: mapped[key] for key in self}
        return RecurrentState(tensors, seen=self.seen, ragged=self.ragged)

    def detach(self) -> RecurrentState:
        """Cut the graph: the caller's duty between training steps."""
        return self._map_pieces(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> RecurrentState:
        """Move or cast every tensor, as `Tensor.to`."""
        return self._map_pieces(lambda t: t.to(*args, **kwargs))

    def rows(self, index: Tensor | list[int] | slice) -> RecurrentState:
        """Take batch rows by index, mask or slice."""
        return self._map_pieces(lambda t: t[index])

    def part(self, *parts: Part) -> RecurrentState:
        """Keep only these parts, as the state of a fresh sequence (`seen` is 0 without its KV)."""
        kept = {key: t for key, t in self._tensors.items() if key.part in parts}
        if "attention" in parts:
            return RecurrentState(kept, seen=self.seen, ragged=self.ragged)
        return RecurrentState(kept)

    def where(self, mask: Tensor, other: RecurrentState | None = None) -> RecurrentState:
        """Return rows of this state where `mask` (B,) is true, of `other` (default: the zero state)
        elsewhere.
        """

        def choose(stack: Tensor, *others: Tensor) -> Tensor:
            rows = mask.to(stack.device, non_blocking=True).view(1, -1, *[1] * (stack.ndim - 2))
            return torch.where(rows, stack, others[0] if others else torch.zeros_like(stack[:1]))

        if mask.device.type == "cpu":  # reading a mask on a GPU would wait for the GPU
            if len(mask) == self.batch_size and bool(mask.all()):
                return self
            if any(t.is_cuda for t in self.values()):  # pinned, its copy waits for nothing
                mask = mask.pin_memory()
        return self.map_stacked(choose, *(() if other is None else (other,)))

    def named(self) -> dict[str, Tensor]:
        """Return the tensors under string names, as `safetensors` and state dicts want them."""
        return {str(key): t for key, t in self.items()}

    @classmethod
    def from_named(
        cls, tensors: Mapping[str, Tensor], *, seen: int = 0, ragged: bool = False
    ) -> RecurrentState:
        """Inverse of `named`."""
        return cls({StateKey.parse(name): t for name, t in tensors.items()}, seen=seen, ragged=ragged)

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file, bit-exactly, whole or not at all."""
        from safetensors.torch import save

        tensors = {name: t.detach().cpu().contiguous() for name, t in self.named().items()}
        write_whole(path, save(tensors, metadata={"seen": str(self.seen), "ragged": str(self.ragged)}))

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> RecurrentState:
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no __iter__)
            metadata = file.metadata()
            ragged = metadata.get("ragged") == "True"
            return cls.from_named(tensors, seen=int(metadata["seen"]), ragged=ragged)
