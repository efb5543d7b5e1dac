"""xLSTM of transformers: matrix memory C, normalizer n, and the exponent m that both were divided by.

transformers hands out C / exp(m), n / exp(m) and m (xLSTM, arXiv 2405.04517). The sizes of the first two say
nothing without the third, so here the state is C, n and m: what is noised or fitted is the memory itself, and
m, which only keeps numbers small, hardly matters to what is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longroll.families._family import Family
from longroll.families._replace import replace_forward
from longroll.state import RecurrentState, StateKey


class XlstmState:
    """Transformers' xLSTMCache: `rnn_state[layer]` is what a layer starts from; `[i].copy_` keeps its end.

    Args:
        initial: the state to start from, or None for the zero state.
        zeros: makes the zero state of a layer.
        dtype: the dtype of what a layer starts from.
    """

    def __init__(
        self, initial: RecurrentState | None, zeros: Callable[[], list[Tensor]], dtype: torch.dtype
    ) -> None:
        self.initial = initial if initial is not None else RecurrentState({})
        self.rnn_state = _Layers(self.initial, zeros, dtype)

    def final(self, tokens: int) -> RecurrentState:
        """Return the state after this forward, on the graph. `tokens` is how many were read."""
        state = {
            StateKey(layer, "recurrent", slot): tensor
            for layer, scaled in self.rnn_state.scaled.items()
            for slot, tensor in enumerate(_true(*scaled))
        }
        return RecurrentState(state, seen=self.initial.seen + tokens)


class _Layers:
    """Layer -> C / exp(m), n / exp(m) and m, made when first asked for."""

    def __init__(
        self, initial: RecurrentState, zeros: Callable[[], list[Tensor]], dtype: torch.dtype
    ) -> None:
        self.initial, self.zeros, self.dtype = initial, zeros, dtype
        self.scaled: dict[int, list[Tensor]] = {}

    def __getitem__(self, layer: int) -> _Layer:
        if layer not in self.scaled:
            given = [self.initial.get(StateKey(layer, "recurrent", slot)) for slot in range(3)]
            start = [zero if t is None else t for t, zero in zip(given, self.zeros(), strict=True)]
            self.scaled[layer] = [t.to(self.dtype) for t in _scaled(*start)]
        return _Layer(self.scaled[layer])


class _Layer(tuple):
    """Its items as they are now, also for a recompute later; indexed, the places to leave new ones in."""

    places: list

    def __new__(cls, places: list) -> _Layer:
        layer = super().__new__(cls, places)
        layer.places = places
        return layer

    def __getitem__(self, slot):
        return _Place(self.places, slot)


class _Place:
    def __init__(self, places: list, slot: int) -> None:
        self.places, self.slot = places, slot

    def copy_(self, tensor: Tensor) -> None:
        self.places[self.slot] = tensor  # where transformers' own overwrites what backward still needs


def _scaled(memory: Tensor, normalizer: Tensor, exponent: Tensor) -> list[Tensor]:
    return [memory * torch.exp(-exponent).unsqueeze(-1), normalizer * torch.exp(-exponent), exponent]


def _true(memory: Tensor, normalizer: Tensor, exponent: Tensor) -> list[Tensor]:
    dtype = torch.promote_types(memory.dtype, torch.float32)  # exp(m) is up to e^15, too much for float16
    memory, normalizer, exponent = memory.to(dtype), normalizer.to(dtype), exponent.to(dtype)
    return [memory * exponent.exp().unsqueeze(-1), normalizer * exponent.exp(), exponent]


def _at_any_token(original: Callable, *args: Any, **kwargs: Any) -> Any:
    return original(*args, **({"mode": "inference"} | kwargs))


class Xlstm(Family):
    """xLSTM."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Let the layers stop at any token: `mode = "train"` in a config needs chunks, and gives no state."""
        super().prepare(model)
        for block in model.base_model.blocks:  # type: ignore[union-attr]
            replace_forward(block.mlstm_layer.mlstm_backend, _at_any_token)

    def cache(self, model: PreTrainedModel, input_ids: Tensor, state: RecurrentState | None) -> XlstmState:
        """Return the container that starts a forward from `state`."""
        config = model.config
        rows, heads = len(input_ids), config.num_heads
        keys, values = (
            int(config.hidden_size * factor) // heads
            for factor in (config.qk_dim_factor, config.v_dim_factor)
        )
        wide = torch.promote_types(model.dtype, torch.float32)

        def zeros() -> list[Tensor]:
            shapes = (keys, values), (keys,), (1,)
            return [torch.zeros(rows, heads, *s, dtype=wide, device=input_ids.device) for s in shapes]

        # upstream's chunked kernel multiplies the state with keys and values of the model's dtype
        chunked = input_ids.shape[1] >= config.chunk_size
        return XlstmState(state, zeros, model.dtype if chunked else wide)
