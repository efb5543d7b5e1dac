"""The state of a forward, read in one place and written in another, so that a forward is pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from longroll.blocks import Blocks
from longroll.families._finals import Finals
from longroll.families._padding import Padding, still
from longroll.state import Part, RecurrentState, StateKey


class FlaCache:
    """Reads `initial`, collects `final()`; the recompute of gradient checkpointing does the same once more.

    Recurrent states are K-first, (B, H, K, V), where fla's own cache is V-first for some families.

    Args:
        initial: the state to start from; None is the zero state.
    """

    padding: Padding | None = None
    """Padding on the right, which is kept out of the state; None: there is none."""

    def __init__(self, initial: RecurrentState | None = None) -> None:
        self.initial = initial if initial is not None else RecurrentState({})
        self._final = Finals()

    def final(self, tokens: int) -> RecurrentState:
        """Return the state after this forward, on the graph. `tokens` is how many were read."""
        return RecurrentState(self._final.take(), seen=self.initial.seen + tokens)

    def keep(self, key: StateKey, tensor: Tensor | Blocks) -> None:
        """Leave a tensor in the final state."""
        self._final[key] = tensor

    def get_seq_length(self) -> int:
        """Return tokens read before this forward."""
        return self.initial.seen


class LayerState:
    """One layer's part of a cache: what it starts from and what it leaves; without a cache, nothing."""

    def __init__(self, cache: FlaCache | None, layer: int) -> None:
        self._cache, self._layer = cache, layer
        self.seen = 0 if cache is None else cache.initial.seen
        self.padding = None if cache is None else cache.padding

    def read(self, part: Part, slot: int = 0) -> Tensor | None:
        """Return the initial tensor; None is zero."""
        return None if self._cache is None else self._cache.initial.get(StateKey(self._layer, part, slot))

    def blocks(self, slot: int) -> Blocks | None:
        """Return the initial keys or values in the blocks that hold them; None where there are none."""
        return (
            None
            if self._cache is None
            else self._cache.initial.blocks(StateKey(self._layer, "attention", slot))
        )

    def keep(self, part: Part, tensor: Tensor | Blocks, slot: int = 0) -> None:
        """Leave the final tensor, on the graph."""
        if self._cache is not None:
            self._cache.keep(StateKey(self._layer, part, slot), tensor)

    def run(self, recurrence: Callable[..., Any], *inputs: Tensor, **options: Any) -> Tensor:
        """Run one of `longroll.ops` from the recurrent state, and keep the final one."""
        initial = self.read("recurrent")
        inputs = still(recurrence.__name__, inputs, self.padding)
        o, final = recurrence(*inputs, initial_state=initial, output_final_state=True, **options)
        self.keep("recurrent", final)
        return o
