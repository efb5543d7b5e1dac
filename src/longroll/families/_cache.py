"""One functional cache for every architecture that speaks transformers' linear-attention cache API.

transformers' own cache writes with `copy_` into the tensors that it hands out, which breaks or falsifies
gradients (shared/docs/transformers.md, b). This one reads the initial state from one place and assigns
the final one to another, so that a forward is pure, differentiable, and the second forward of gradient
checkpointing reads the same initial state again.
"""

from __future__ import annotations

from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from longroll.state import Part, RecurrentState, StateKey

# The state that the recurrence about to run starts from: mixers read it from the cache, then call the
# scan without it (transformers' Mamba-1 has no argument for it), so the cache leaves it here.
_Handoff = ContextVar[tuple[Tensor | None] | None]
recurrent_handoff: _Handoff = ContextVar("longroll_recurrent_state", default=None)
conv_handoff: _Handoff = ContextVar("longroll_conv_state", default=None)


def take(handoff: _Handoff) -> tuple[Tensor | None] | None:
    """The initial state left for the op that is about to run, once; None outside a longroll forward."""
    left = handoff.get()
    handoff.set(None)
    return left


def clear_handoffs() -> None:
    """Forget what was left: a forward that died must not hand its state to another model's."""
    recurrent_handoff.set(None)
    conv_handoff.set(None)


class StateCache(DynamicCache):
    """A cache for one forward: reads `initial`, collects `final()`.

    Args:
        config: the model's config.
        initial: the state to start from, or None for the zero state.
        owns_recurrence: the mixers' scan and conv functions are longroll's (`families/_dispatch.py`):
            they `take` their state, and one-token calls go the multi-token way too.
    """

    def __init__(
        self, config: PreTrainedConfig, initial: RecurrentState | None, *, owns_recurrence: bool
    ) -> None:
        super().__init__(config=config)
        self.initial = initial if initial is not None else RecurrentState({})
        self.owns_recurrence = owns_recurrence
        self._final: dict[StateKey, Tensor] = {}
        clear_handoffs()

    def final(self, tokens: int) -> RecurrentState:
        """The state after this forward, on the graph. `tokens` is how many were read."""
        clear_handoffs()
        return RecurrentState(self._final, seen=self.initial.seen + tokens)

    def _read(self, part: Part, layer: int, slot: int) -> Tensor | None:
        tensor = self.initial.get(StateKey(layer, part, slot))
        return None if tensor is None else tensor.clone()  # one-token paths write into what they read

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The initial conv tail; None where longroll's op will prepend it itself."""
        return None if self.owns_recurrence else self._read("conv", layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The initial recurrent state; handed to longroll's op directly where that runs."""
        if not self.owns_recurrence:
            return self._read("recurrent", layer_idx, state_idx)
        recurrent_handoff.set((self.initial.get(StateKey(layer_idx, "recurrent", state_idx)),))
        return None

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_,
    ) -> Tensor:
        """Keep the new tail (batch, channels, conv_kernel_size); return the inputs after the initial tail.

        Where longroll's op runs, the tail is handed to it and the inputs come back as they are.
        """
        width = conv_kernel_size or conv_states.shape[-1]
        key = StateKey(layer_idx, "conv", state_idx)
        tail = self.initial.get(key)
        if tail is None:
            full = F.pad(conv_states, (width, 0))
        else:
            full = torch.cat([tail.to(conv_states.dtype), conv_states], dim=-1)
        self._final[key] = full[..., -width:]
        if not self.owns_recurrence:
            return full
        conv_handoff.set((tail,))
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_
    ) -> Tensor:
        """Keep the final recurrent state."""
        self._final[StateKey(layer_idx, "recurrent", state_idx)] = recurrent_states
        return recurrent_states

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_, **__
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (batch, heads, tokens, head size) to the initial ones; keep the result."""
        keys, values = StateKey(layer_idx, "attention", 0), StateKey(layer_idx, "attention", 1)
        if keys in self.initial:
            key_states = torch.cat([self.initial[keys], key_states], dim=-2)
            value_states = torch.cat([self.initial[values], value_states], dim=-2)
        self._final[keys], self._final[values] = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read before this forward; transformers' own raises for models without attention."""
        return self.initial.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys that the attention mask covers."""
        return self.initial.seen + query_length, 0
