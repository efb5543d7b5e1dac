"""One functional cache for every architecture that speaks transformers' linear-attention cache API.

transformers' own cache writes with `copy_` into the tensors that it hands out, which breaks or falsifies
gradients, and raises for models without attention (shared/docs/transformers.md, a and b). This one reads the
initial state from one place and assigns the final one to another, so that a forward is pure, differentiable,
and the second forward of gradient checkpointing reads the same initial state again.

What can be a zero state and what cannot: tensors of the parts `recurrent` and `conv` are float, zero where
nothing was read, and may be noised. All else that a layer remembers (keys and values, token ids, values that
start at a bias) is context: it goes under `attention`, rolls out, and a new sequence starts without it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from longroll.blocks import Blocks, own_memory
from longroll.errors import LongrollError
from longroll.families._dispatch import (
    Start,
    attention_handoff,
    clear_handoffs,
    conv_handoff,
    recurrent_handoff,
)
from longroll.families._finals import Finals
from longroll.families._padding import Padding
from longroll.state import Part, RecurrentState, StateKey

_KEYS, _VALUES, _INDEXER, _OTHER = range(4)  # slots of the part `attention`; _OTHER and above: + state_idx


def _after(inputs: Tensor, tail: Tensor | None, width: int) -> Tensor:
    """Return inputs (batch, channels, time) after the tail, or after zeros."""
    return F.pad(inputs, (width, 0)) if tail is None else torch.cat([tail.to(inputs.dtype), inputs], dim=-1)


def _last(inputs: Tensor, tail: Tensor | None, width: int, padding: Padding | None) -> Tensor:
    """Return the last `width` of them, in memory of their own: a view would keep all inputs."""
    if padding is not None:
        if inputs.ndim == 2:  # token ids
            tail = None if tail is None else tail.unsqueeze(1)
            return padding.last_inputs(inputs.unsqueeze(-1), width, tail).squeeze(1)
        return padding.last_inputs(inputs.mT, width, tail)
    if inputs.shape[-1] >= width:
        return inputs[..., -width:].clone()
    return _after(inputs, tail, width)[..., -width:]


class StateCache(DynamicCache):
    """A cache for one forward: reads `initial`, collects `final()`.

    Args:
        config: the model's config.
        initial: the state to start from, or None for the zero state.
        owns_recurrence: the mixers' scan and conv functions are longroll's (`families/_dispatch.py`):
            they `take` their state.
        scans: how many scans a layer runs one after another, each with its share (axis 1) of the state; None
            is one, with the whole state.
        reads_tail: mixers prepend the conv tail themselves, and read it by `get_conv_state` for that.
        context: what the layers call recurrent state is context.
        in_blocks: attention layers read earlier keys and values in the blocks that hold them, without a
            gradient (`attention_in_blocks`).
    """

    padding: Padding | None = None
    """Padding on the right, which is kept out of the state; None: there is none."""

    def __init__(
        self,
        config: PreTrainedConfig,
        initial: RecurrentState | None,
        *,
        owns_recurrence: bool = False,
        scans: int | None = None,
        reads_tail: bool = False,
        context: bool = False,
        in_blocks: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.initial = initial if initial is not None else RecurrentState({})
        self.owns_recurrence = owns_recurrence
        self.scans = scans
        self.reads_tail = reads_tail
        self.context = context
        self.in_blocks = in_blocks
        self.room: dict[torch.device, float] = {}
        """Bytes that layers on a GPU may keep for a faster backward, once the first one has asked."""
        self._final = Finals()
        clear_handoffs()
        self._place_indexer()

    def final(self, tokens: int) -> RecurrentState:
        """Return the state after this forward, on the graph. `tokens` is how many were read."""
        clear_handoffs()
        return RecurrentState(self._final.take(), seen=self.initial.seen + tokens)

    def _read(self, key: StateKey) -> Tensor | None:
        tensor = self.initial.get(key)
        return None if tensor is None else tensor.clone()  # one-token paths write into what they read

    # ---- longroll's own mixers

    def start(self, layer_idx: int, part: Part) -> Tensor | None:
        """Return what a layer starts from."""
        return self.initial.get(StateKey(layer_idx, part))

    def keep(self, layer_idx: int, part: Part, tensor: Tensor) -> None:
        """Keep what a layer ends with."""
        self._final[StateKey(layer_idx, part)] = tensor

    # ---- recurrences

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the initial recurrent state; handed to longroll's op directly where that runs."""
        key = self._recurrent(layer_idx, state_idx)
        if not self.owns_recurrence:
            return self._read(key)
        state = self.initial.get(key)
        scans = self.scans or 1
        states = state.unbind(1) if self.scans and state is not None else (state,) * scans
        recurrent_handoff.set(tuple(Start(s, self.padding) for s in states))
        return None

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_
    ) -> Tensor:
        """Keep the final recurrent state."""
        self._final[self._recurrent(layer_idx, state_idx)] = recurrent_states
        return recurrent_states

    def _recurrent(self, layer: int, slot: int) -> StateKey:
        return (
            StateKey(layer, "attention", _OTHER + slot)
            if self.context
            else StateKey(layer, "recurrent", slot)
        )

    # ---- short convolutions

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return none, so that mixers go the multi-token way always; the tail where they prepend it
        themselves.
        """
        if not self.reads_tail:
            return None
        tail = self._read(StateKey(layer_idx, "conv", state_idx))
        return self._read(StateKey(layer_idx, "attention", _OTHER + state_idx)) if tail is None else tail

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return yes, which is the other thing that keeps mixers off their one-token path."""
        return True

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
        if not conv_states.is_floating_point():  # token ids
            key = StateKey(layer_idx, "attention", _OTHER + state_idx)
        tail = self.initial.get(key)
        self._final[key] = _last(conv_states, tail, width, self.padding)
        if self.owns_recurrence and state_idx == 0:  # further convolutions are not of the recurrence
            conv_handoff.set((Start(tail),))
            return conv_states
        return _after(conv_states, tail, width)

    # ---- attention

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_, **__
    ) -> tuple[Tensor, Tensor]:
        """Keep keys and values (batch, heads, tokens, head size) after the initial ones; return them all.

        A layer with a sliding window keeps what the next token can see. Where layers read in blocks, the
        initial ones are left for them, and the new ones returned.
        """
        layer: Any = self.layers[layer_idx]
        new, keys = (key_states, value_states), _keys_and_values(layer_idx)
        past = [self.initial.blocks(key) for key in keys]
        if self._in_blocks(layer_idx):
            self._final.update(zip(keys, map(Blocks.after, past, new), strict=True))
            if past[0] is not None and past[1] is not None:
                if attention_handoff.get():
                    raise LongrollError(
                        f"Layer {layer_idx}: attention before it has read no keys and values."
                    )
                pairs = tuple(zip(past[0].pieces, past[1].pieces, strict=True))
                attention_handoff.set((Start(pairs),))
            return new
        window = getattr(layer, "sliding_window", None)
        whole = []
        for key, blocks, states in zip(keys, past, new, strict=True):
            grown = states if blocks is None else Blocks(*blocks.pieces, states).whole()
            if window is not None:
                kept = grown[..., max(0, grown.shape[-2] - window + 1) :, :]
                self._final[key] = own_memory(kept)
            else:
                self._final[key] = grown if torch.is_grad_enabled() else Blocks.after(blocks, states)
            whole.append(grown)
        layer.keys, layer.is_initialized = whole[0].detach(), True  # GLM-5-Next's indexer counts them
        return whole[0], whole[1]

    def _in_blocks(self, layer_idx: int) -> bool:
        return self.in_blocks and getattr(self.layers[layer_idx], "sliding_window", None) is None

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Return append the keys (batch, tokens, size) by which sparse attention chooses what to read."""
        key = StateKey(layer_idx, "attention", _INDEXER)
        if key in self.initial:
            indexer_key_states = torch.cat([self.initial[key], indexer_key_states], dim=1)
        self._final[key] = indexer_key_states
        return indexer_key_states

    def _place_indexer(self) -> None:
        """Tell sparse attention the positions of the keys in the initial state: those read before."""
        for index, layer in enumerate(self.layers):
            key = StateKey(index, "attention", _INDEXER)
            if hasattr(layer, "indexer_position_ids") and key in self.initial:
                keys = self.initial[key]
                positions = torch.arange(keys.shape[1], device=keys.device)
                layer.indexer_position_ids = positions.expand(3, keys.shape[0], -1)  # rotary axes first
                return  # transformers keeps them on the first such layer, for all

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return tokens read before this forward; transformers' own raises for models without attention."""
        return self.initial.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return length and offset of the keys that the attention mask of a layer covers."""
        keys = self.initial.blocks(StateKey(layer_idx, "attention", _KEYS))
        past = 0 if keys is None or self._in_blocks(layer_idx) else keys.shape[-2]
        return past + query_length, self.initial.seen - past


def _keys_and_values(layer: int) -> tuple[StateKey, StateKey]:
    return StateKey(layer, "attention", _KEYS), StateKey(layer, "attention", _VALUES)
