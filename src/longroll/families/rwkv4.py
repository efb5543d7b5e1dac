"""RWKV-4 of transformers: its state travels as five tensors that the model indexes by layer.

The recurrence is a weighted mean of all past values: a value comes in with weight `exp(key)`, which decays
by `exp(-exp(time_decay))` a step (RWKV, arXiv 2305.13048). transformers keeps numerator, denominator and
the exponent that both were divided by: neither zeros nor noise there would be a state. Here the state is
(mean, weight): the mean of the past values, and log(1 + sum of the weights); both are 0 where nothing was
read, and of a size that can be fitted and noised. A negative weight counts as none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.rwkv import modeling_rwkv

from longroll.families._dispatch import Start, clear_handoffs, install, recurrent_handoff
from longroll.families._family import Family
from longroll.families._finals import Finals
from longroll.families._spread import device_of_part
from longroll.state import RecurrentState, StateKey

_FEED_FORWARD_SHIFT, _ATTENTION_SHIFT, _NUMERATOR, _DENOMINATOR, _EXPONENT = range(5)  # transformers' order


class Rwkv4State:
    """In place of a list of five: `[slot][:, :, layer]` reads the initial state, and keeps what is assigned.

    No list, which accelerate would take apart to make its tensors float32.

    Args:
        initial: the state to start from, or None for the zero state.
        zeros: makes a zero token shift of a layer, (B, hidden), in the model's dtype, on the layer's device.
        tokens: how many will be read.
    """

    def __init__(self, initial: RecurrentState | None, zeros: Callable[[int], Tensor], tokens: int) -> None:
        self.initial = initial if initial is not None else RecurrentState({})
        self.zeros = zeros
        # upstream broadcasts a single token's (B, 1, hidden) against (B, hidden), mixing rows
        self.shift_shape = (-1, 1) if tokens == 1 else (-1,)
        self._final = Finals()
        clear_handoffs()
        self._slots = [_Slot(self, slot) for slot in range(5)]

    def __getitem__(self, slot):
        return self._slots[slot]  # or a slice of them

    def final(self, tokens: int) -> RecurrentState:
        """Return the state after this forward, on the graph. `tokens` is how many were read."""
        clear_handoffs()
        return RecurrentState(self._final.take(), seen=self.initial.seen + tokens)

    def read(self, slot: int, layer: int) -> Tensor:
        """Return what the model finds at the start."""
        if slot <= _ATTENTION_SHIFT:
            shift = self.initial.get(StateKey(layer, "conv", slot))
            shift = self.zeros(layer) if shift is None else shift
            return shift.unflatten(0, self.shift_shape)
        mean, weight = (self.initial.get(StateKey(layer, "recurrent", i)) for i in (0, 1))
        recurrent_handoff.set((Start((mean, weight)),))
        return self.zeros(layer)  # not read: the recurrence takes its state from the handoff

    def write(self, slot: int, layer: int, tensor: Tensor) -> None:
        """Take the final state that the model leaves; for the recurrence, (mean, weight, nothing)."""
        if slot <= _ATTENTION_SHIFT:
            self._final[StateKey(layer, "conv", slot)] = tensor.clone()  # a view would keep all inputs
        elif slot < _EXPONENT:
            self._final[StateKey(layer, "recurrent", slot - _NUMERATOR)] = tensor


class _Slot:
    def __init__(self, state: Rwkv4State, slot: int) -> None:
        self.state, self.slot = state, slot

    def __getitem__(self, index: tuple) -> Tensor:
        return self.state.read(self.slot, index[-1])

    def __setitem__(self, index: tuple, tensor: Tensor) -> None:
        self.state.write(self.slot, index[-1], tensor)


def wkv(
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: object = None,
    return_state: bool = False,
    *,
    initial_state: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, tuple[Tensor, Tensor, None]]:
    """RWKV-4's recurrence, in transformers' place and with its arguments; linear in time, also backward.

    Args:
        time_decay: (D,), the log of the decay rate.
        time_first: (D,), added to the key of the current token.
        key: (B, T, D), log weights.
        value: (B, T, D).
        state: ignored, as is `return_state`: transformers' own.
        return_state: ignored.
        initial_state: mean and weight, (B, D) each; None is zero.

    Returns:
        The outputs (B, T, D) in value's dtype, and the final mean and weight (B, D) in float32 or wider.
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    keys, values = key.to(dtype).unbind(1), value.to(dtype).unbind(1)
    decay, first = -time_decay.to(dtype).exp(), time_first.to(dtype)
    zero = torch.zeros_like(keys[0])
    mean, weight = (zero if t is None else t.to(dtype) for t in initial_state)
    weight = weight.clamp_min(0)
    denominator = -torch.expm1(-weight)  # times exp(exponent): exp(weight) - 1
    numerator = mean * denominator
    exponent = torch.where(weight > 0, weight, -1e30)
    outputs = []
    for k, v in zip(keys, values, strict=True):
        largest = torch.maximum(exponent, k + first)
        past, now = (exponent - largest).exp(), (k + first - largest).exp()
        outputs.append((past * numerator + now * v) / (past * denominator + now))
        largest = torch.maximum(exponent + decay, k)
        past, now = (exponent + decay - largest).exp(), (k - largest).exp()
        numerator, denominator = past * numerator + now * v, past * denominator + now
        exponent = largest
    final = numerator / denominator, F.softplus(exponent + denominator.log()), None
    return torch.stack(outputs, dim=1).to(value.dtype), final


class Rwkv4(Family):
    """RWKV-4."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Put `wkv` in place, and keep transformers from rescaling the weights."""
        super().prepare(model)
        install(modeling_rwkv, "rwkv_linear_attention", wkv, recurrent_handoff)
        keep_weights(model)

    def cache(self, model: PreTrainedModel, input_ids: Tensor, state: RecurrentState | None) -> Rwkv4State:
        """Return the list that starts a forward from `state`."""

        blocks: Any = model.base_model.blocks

        def zeros(layer: int) -> Tensor:
            size = len(input_ids), model.config.hidden_size
            return torch.zeros(size, dtype=model.dtype, device=device_of_part(blocks[layer]))

        return Rwkv4State(state, zeros, input_ids.shape[1])


def keep_weights(model: PreTrainedModel) -> None:
    """Keep upstream from halving the weights of every `rescale_every` layers in eval mode, in place.

    It does so for float16, at the first forward, and what is saved afterwards is wrong: the next one to load
    it halves it again.
    """
    backbone: Any = model.base_model
    if backbone.layers_are_rescaled:
        backbone.train()._rescale_layers()
        backbone.train(model.training)
    backbone._rescale_layers = lambda: None
