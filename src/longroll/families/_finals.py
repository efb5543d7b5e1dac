"""What layers leave at the end of a forward, until it is taken."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from longroll.state import StateKey


class Finals(dict[StateKey, Any]):
    """The final state of a forward, tensor by tensor; once it was taken, nothing more is kept.

    Gradient checkpointing runs layers again during backward. What they leave then hangs on the graph of the
    second run, and would keep the activations of every layer in memory until backward ends.
    """

    taken = False

    def take(self) -> dict[StateKey, Any]:
        """Return what layers left, and keep nothing from here on."""
        found = dict(self)
        self.taken = True
        self.clear()
        return found

    def __setitem__(self, key: StateKey, tensor: Any) -> None:
        if not self.taken:
            super().__setitem__(key, tensor)

    def update(self, pairs: Iterable[tuple[StateKey, Any]]) -> None:  # type: ignore[override]
        """Keep several."""
        for key, tensor in pairs:
            self[key] = tensor
