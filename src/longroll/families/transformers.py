"""The architectures of transformers that longroll opens: one row each."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longroll.errors import LongrollError
from longroll.families._cache import StateCache
from longroll.families._dispatch import own_recurrence
from longroll.state import RecurrentState


@dataclass(frozen=True)
class Family:
    """How one `model_type` of transformers takes and gives its state."""

    kind: str
    """What a layer's recurrence is called: `mamba`, `mamba2`, or `attention` for the control."""
    cache_argument: str
    """The forward argument that takes the cache."""
    takes_positions: bool = False
    """Position ids go in explicitly: some default to starting at 0 whatever the cache holds."""
    owns_recurrence: bool = False
    """Longroll's op runs in the place of transformers' (see `_dispatch`)."""
    learned_positions: str | None = None
    """The config entry that bounds the positions the model has embeddings for."""

    @property
    def recurrent(self) -> bool:
        """Whether there is a state for an intervention to choose."""
        return self.kind != "attention"

    def prepare(self, model: PreTrainedModel) -> None:
        """Make `model` ready to take a state: once, after loading."""
        if self.owns_recurrence:
            own_recurrence(_modeling(model))
        for module in model.modules():
            if hasattr(module, "_can_checkpoint_with_cache"):
                # StateCache is idempotent: a recompute reads what the forward read
                module._can_checkpoint_with_cache = True  # type: ignore[assignment]

    def inputs(self, model: PreTrainedModel, input_ids: Tensor, state: RecurrentState | None) -> dict:
        """Forward arguments that start from `state`; their `cache_argument` holds the cache."""
        cache = StateCache(model.config, state, owns_recurrence=self.owns_recurrence)
        # use_cache stays False: the cache is written all the same, and gradient checkpointing lets it be
        arguments = {"input_ids": input_ids, self.cache_argument: cache, "use_cache": False}
        if self.takes_positions:
            first, tokens = cache.initial.seen, input_ids.shape[1]
            self._check_positions(model, first + tokens)
            positions = torch.arange(first, first + tokens, device=input_ids.device)
            arguments["position_ids"] = positions.expand(input_ids.shape[0], -1)
        return arguments

    def _check_positions(self, model: PreTrainedModel, stop: int) -> None:
        limit = getattr(model.config, self.learned_positions) if self.learned_positions else None
        if limit is not None and stop > limit:
            raise LongrollError(
                f"{model.config.model_type} has embeddings for {limit} positions and was asked for {stop}: "
                f"evaluate it with --length {limit} or less."
            )


def _modeling(model: PreTrainedModel) -> ModuleType:
    return importlib.import_module(type(model).__module__)


_CONTROL = Family("attention", "past_key_values", takes_positions=True)

FAMILIES: dict[str, Family] = {
    "mamba": Family("mamba", "cache_params", owns_recurrence=True),
    "falcon_mamba": Family("mamba", "cache_params", owns_recurrence=True),
    "mamba2": Family("mamba2", "cache_params", owns_recurrence=True),
    "gpt2": Family("attention", "past_key_values", takes_positions=True, learned_positions="n_positions"),
    "gpt_neox": _CONTROL,
    "llama": _CONTROL,
    "qwen2": _CONTROL,
    "qwen3": _CONTROL,
}


def family_of(model_type: str | None) -> Family:
    """The row for a `model_type`.

    Raises:
        LongrollError: for an architecture that is not in the table.
    """
    if model_type not in FAMILIES:
        raise LongrollError(
            f"model_type {model_type!r} is not one longroll can open yet; it opens: {', '.join(FAMILIES)}, "
            "and original state-spaces checkpoints."
        )
    return FAMILIES[model_type]
