"""Training steps replayed as CUDA graphs: a small model on a fast GPU waits for Python otherwise."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from longroll.model import RecurrentLM
from longroll.state import RecurrentState


class GraphedLM:
    """A `RecurrentLM` in training whose forward and backward are each one CUDA graph.

    Captured at the first call; every later call must have the shape of the first. The final state is off the
    graph of autograd, as interventions want it. Recurrences read an explicit zero state for None.

    Args:
        lm: a model on a CUDA device, in training mode, without attention (its KV would change shape).
        dtype: autocast to it; None computes in the weights' precision.
    """

    def __init__(self, lm: RecurrentLM, *, dtype: torch.dtype | None = None) -> None:
        self.lm, self.dtype = lm, dtype
        self._step: nn.Module | None = None

    def __call__(
        self, input_ids: Tensor, state: RecurrentState | None = None
    ) -> tuple[Tensor, RecurrentState]:
        """Logits (B, T, V) and the final state; both are overwritten by the next call but one."""
        if self._step is None:
            self._capture(input_ids)
        packs = self._zero if state is None else self._layout.pack(state)
        logits, *final = self._step(input_ids, *packs)  # type: ignore[misc]
        seen = (0 if state is None else state.seen) + input_ids.shape[1]
        return logits, self._layout.unpack([t.clone() for t in final], seen=seen)

    def _capture(self, input_ids: Tensor) -> None:
        zero = self.lm.zero_state(len(input_ids))
        self._layout = _Layout(zero)
        self._zero = self._layout.pack(zero)
        step = _Step(self.lm, self._layout, self.dtype)
        with torch.autocast("cuda", enabled=False):  # a graph cannot hold on to autocast's copies of weights
            self._step = torch.cuda.make_graphed_callables(  # type: ignore[assignment]
                step, (input_ids.clone(), *self._zero), allow_unused_input=True
            )


class _Layout:
    """State tensors of one shape, stacked: a graph copies each of its inputs by itself."""

    def __init__(self, state: RecurrentState) -> None:
        self.groups = state.alike()
        self.dtypes = {key: t.dtype for key, t in state.items()}

    def pack(self, state: RecurrentState) -> list[Tensor]:
        return [torch.stack([state[key].to(self.dtypes[key]) for key in keys]) for keys in self.groups]

    def unpack(self, packs: Iterable[Tensor], *, seen: int = 0) -> RecurrentState:
        groups = zip(self.groups, packs, strict=True)
        return RecurrentState(
            {key: t for keys, pack in groups for key, t in zip(keys, pack.unbind(), strict=True)}, seen=seen
        )


class _Step(nn.Module):
    """The forward over plain tensors."""

    def __init__(self, lm: RecurrentLM, layout: _Layout, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.lm, self.layout, self.dtype = lm, layout, dtype

    def forward(self, input_ids: Tensor, *packs: Tensor) -> tuple[Tensor, ...]:
        enabled = self.dtype is not None
        with torch.autocast("cuda", self.dtype, enabled=enabled, cache_enabled=False):
            logits, final = self.lm(input_ids, self.layout.unpack(packs))
        return (logits, *self.layout.pack(final.detach()))
