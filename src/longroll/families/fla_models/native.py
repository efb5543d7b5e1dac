"""Models that only fla's own classes run, on a GPU: KDA, HGRN2, GSA and Comba.

Their states go through fla's layers both ways with gradients, but not through fla's models: those drop the
cache under gradient checkpointing, with one warning, and `use_cache` is off in training. Here the layers get
longroll's cache, and each call passes the flag that makes them use it. fla's loss is not in play: without
labels its models return logits.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longroll.errors import LongrollError
from longroll.families._family import Family
from longroll.families.fla_models.cache import FlaCache
from longroll.ops.fla_kernels import make_ready
from longroll.state import RecurrentState, StateKey


@dataclass(frozen=True)
class NativeFamily(Family):
    """One of fla's model classes."""

    name: str = ""
    """What fla's classes start with."""
    v_first: bool = False
    """fla's layer keeps its state (B, H, V, K); ours is (B, H, K, V)."""
    states: int = 1
    """Recurrent tensors of a layer; GSA's are over keys (B, H, K, M) and over values (B, H, M, V)."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Let the layers take and give states, also under gradient checkpointing."""
        if model.config.attn is not None:
            raise LongrollError(
                f"{model.config.model_type} with attention layers (attn in its config) is not supported."
            )
        for layer in model.base_model.layers:  # type: ignore[union-attr]
            if not layer._can_checkpoint_with_cache:
                # the cache's initial state is only read and its final one only assigned
                layer._can_checkpoint_with_cache = True
                layer.attn.register_forward_pre_hook(_use_cache, with_kwargs=True)
        make_ready()

    def cache(self, model: PreTrainedModel, input_ids: Tensor, state: RecurrentState | None) -> NativeCache:
        """Return the cache that starts a forward from `state`."""
        if input_ids.device.type != "cuda":
            raise LongrollError(f"{model.config.model_type} runs on fla's GPU kernels only: `device` cuda.")
        return NativeCache(self, model.config.num_hidden_layers, state)

    def model_class(self) -> type[PreTrainedModel]:
        """Return fla's class.

        Raises:
            LongrollError: where fla or a GPU is missing.
        """
        missing = [
            f"the package {package}"
            for module, package in (("triton", "triton"), ("fla", "flash-linear-attention"))
            if importlib.util.find_spec(module) is None
        ]
        if not torch.cuda.is_available():
            missing.append("a CUDA GPU")
        if missing:
            raise LongrollError(
                f"{self.kind} models run on fla's classes only: missing {', '.join(missing)}."
            )
        return getattr(importlib.import_module("fla.models"), f"{self.name}ForCausalLM")


class NativeCache(FlaCache):
    """What fla's layers read and update, on top of a `RecurrentState`.

    Args:
        family: how fla's layers lay out their states.
        layers: how many layers the model has.
        initial: the state to start from; None is the zero state.
    """

    def __init__(self, family: NativeFamily, layers: int, initial: RecurrentState | None) -> None:
        super().__init__(initial)
        self._family, self._layers = family, layers

    def __len__(self) -> int:
        return self._layers

    def __getitem__(self, layer: int) -> dict[str, Any]:
        """Return what a layer starts from; None is zero. Convolutions write into theirs, so they get a
        copy.
        """
        states = [
            self._turned(self.initial.get(StateKey(layer, "recurrent", i)))
            for i in range(self._family.states)
        ]
        conv = [self.initial.get(StateKey(layer, "conv", i)) for i in range(3)]
        whole = tuple(states) if all(s is not None for s in states) else None
        return {
            "recurrent_state": whole[0] if whole and len(whole) == 1 else whole,
            "conv_state": tuple(None if tail is None else tail.clone() for tail in conv),
            "attn_state": None,
            "ffn_state": None,
        }

    def update(self, *, layer_idx: int, recurrent_state=None, conv_state=None, **_: Any) -> None:
        """Keep what a layer leaves."""
        states = recurrent_state if isinstance(recurrent_state, tuple | list) else (recurrent_state,)
        for i, state in enumerate(states):
            self.keep(StateKey(layer_idx, "recurrent", i), self._turned(state))
        for i, tail in enumerate(conv_state or ()):
            if tail is not None:
                self.keep(StateKey(layer_idx, "conv", i), tail)

    def _turned(self, state: Tensor | None) -> Any:
        return state.mT if state is not None and self._family.v_first else state


def _use_cache(mixer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Ask a layer for its final state where it was given longroll's cache."""
    if isinstance(kwargs.get("past_key_values"), NativeCache):
        kwargs = kwargs | {"use_cache": True}
    return args, kwargs


NATIVE: dict[str, NativeFamily] = {
    model_type: NativeFamily(
        model_type, kernel=f"fla.{name}ForCausalLM", reference="fla's own logits", name=name, **layout
    )
    for model_type, name, layout in (
        ("kda", "KDA", {"v_first": True}),
        ("hgrn2", "HGRN2", {"v_first": True}),
        ("gsa", "GSA", {"states": 2}),
        ("comba", "Comba", {}),
    )
}
"""`model_type` -> its row."""
