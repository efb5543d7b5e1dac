"""RecurrentGemma of transformers, whose blocks keep their state on the module and drop part of it.

Upstream (`RecurrentGemmaRecurrentBlock.forward`) convolves several tokens without the tail, keeps the state
in attributes, which serve no gradient and no second batch, and forgets it at position 0. Here it is in the
cache. The first token of a sequence enters unscaled, as upstream's does, but after the state that was
given: the zero state is then no state, and any other enters.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

from longroll.families._cache import StateCache
from longroll.families._family import Family
from longroll.families._padding import Padding
from longroll.families._replace import replace_forward
from longroll.state import RecurrentState


class RecurrentGemma(Family):
    """RecurrentGemma (Griffin, arXiv 2402.19427)."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Give the recurrent blocks a forward that takes its state from a StateCache."""
        super().prepare(model)
        base: Any = model.base_model
        if "normalizer" in base._buffers:  # a number on the CPU goes with tensors of any GPU
            base.normalizer = base._buffers.pop("normalizer").cpu()
            base._non_persistent_buffers_set.discard("normalizer")
        for layer, decoder in enumerate(base.layers):
            block = decoder.temporal_block
            if isinstance(block, RecurrentGemmaRecurrentBlock):
                replace_forward(block, functools.partial(_forward, block, layer))

    def cache(self, model: PreTrainedModel, input_ids: Tensor, state: RecurrentState | None) -> StateCache:
        """Return the cache that starts a forward from `state`."""
        return StateCache(model.config, state)


def _forward(block, layer: int, original, input_states: Tensor, position_ids: Tensor, *args, **kwargs):
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, StateCache):
        return original(input_states, position_ids, *args, **kwargs)
    gate = block.act_fn(block.linear_y(input_states))
    x = block.linear_x(input_states).transpose(1, 2)
    x = cache.update_conv_state(x, layer, conv_kernel_size=block.conv1d_width)
    x = block.conv_1d(x)[..., : x.shape[-1]][..., -input_states.shape[1] :]
    initial = cache.get_recurrent_state(layer)
    x, final = _recurrence(block.rg_lru, x.transpose(1, 2), position_ids, initial, cache.padding)
    cache.update_recurrent_state(final, layer)
    return block.linear_out(x * gate), None


def _recurrence(
    lru, x: Tensor, position_ids: Tensor, initial: Tensor | None, padding: Padding | None
) -> tuple[Tensor, Tensor]:
    """Return upstream's gates around longroll's scan."""
    found = []

    def scan(hidden_states: Tensor, recurrent_gate: Tensor, **_) -> tuple[Tensor, None]:
        if padding is not None:  # it leaves the state as it is
            hidden_states = hidden_states.masked_fill(padding.out(3), 0)
            recurrent_gate = recurrent_gate.masked_fill(padding.out(3), 1)
        outputs, final = linear_scan(hidden_states, recurrent_gate, initial)
        found.append(final)
        return outputs, None

    lru._rnn_scan = scan
    try:
        return lru(x, position_ids), found[0]
    finally:
        del lru._rnn_scan


def linear_scan(x: Tensor, decay: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run `h_t = decay_t h_{t-1} + x_t`, linear in time, also backward.

    Args:
        x: inputs, (B, T, D).
        decay: (B, T, D).
        initial_state: (B, D); None is zero.

    Returns:
        All h, (B, T, D) in x's dtype, and the last, (B, D) in float32 or wider.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    h = x.new_zeros(x.shape[0], x.shape[2], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for now, kept in zip(x.to(dtype).unbind(1), decay.to(dtype).unbind(1), strict=True):
        h = kept * h + now
        outputs.append(h)
    return torch.stack(outputs, dim=1).to(x.dtype), h
