"""GLA, DeltaNet, Gated DeltaNet, RetNet, RWKV-6 and RWKV-7 of fla checkpoints, in plain PyTorch.

Parameters and configs are fla 0.6.0's (github.com/fla-org/flash-linear-attention), so its checkpoints load
here and what is saved here loads there; neither fla nor Triton is needed. Where both are, on a GPU, the
recurrences run on fla's kernels (`ops/fla_kernels.py`), and four families more on its classes (`native.py`).
"""

from __future__ import annotations

import importlib

from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from longroll.errors import LongrollError
from longroll.families.architectures import FAMILIES, Family
from longroll.families.fla_models.cache import FlaCache
from longroll.families.fla_models.decoder import CausalLM
from longroll.families.fla_models.delta_net import DeltaNetForCausalLM
from longroll.families.fla_models.gated_deltanet import GatedDeltaNetForCausalLM
from longroll.families.fla_models.gla import GLAForCausalLM
from longroll.families.fla_models.native import NATIVE
from longroll.families.fla_models.retnet import RetNetForCausalLM
from longroll.families.fla_models.rwkv6 import RWKV6ForCausalLM
from longroll.families.fla_models.rwkv7 import RWKV7ForCausalLM
from longroll.state import RecurrentState

_RECURRENCES: dict[str, type[CausalLM]] = {  # by the op that runs them
    "gla": GLAForCausalLM,
    "delta_rule": DeltaNetForCausalLM,
    "gated_delta_rule": GatedDeltaNetForCausalLM,
    "retention": RetNetForCausalLM,
    "rwkv6": RWKV6ForCausalLM,
    "rwkv7": RWKV7ForCausalLM,
}
MODELS: dict[str, type[CausalLM]] = {model.model_type(): model for model in _RECURRENCES.values()}


class FlaFamily(Family):
    """Models that take and give a `FlaCache`."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Refuse fla's own classes, which take another cache; ours need no preparation."""
        if not isinstance(model, CausalLM):
            raise LongrollError(
                f"{type(model).__module__}.{type(model).__name__} is not longroll's class for "
                f"{model.config.model_type}: open the checkpoint with longroll.load."
            )

    def cache(self, model: PreTrainedModel, input_ids: Tensor, state: RecurrentState | None) -> FlaCache:
        """Return the cache that starts a forward from `state`."""
        return FlaCache(state)


def model_class(model_type: str | None) -> type[PreTrainedModel] | None:
    """Return the class that runs a `model_type` on this machine; None where the Auto classes find it.

    fla, once imported, puts its own classes into the Auto classes for what ours and transformers' run too
    (its Mambas take no state with more than one token).

    Raises:
        LongrollError: for a family of fla's own classes where fla or a GPU is missing.
    """
    if model_type in MODELS:
        return MODELS[model_type]
    if model_type in NATIVE:
        return NATIVE[model_type].model_class()
    if model_type is None:
        return None
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if name is not None and CONFIG_MAPPING[model_type].__module__.startswith("transformers."):
        return None
    name = name or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)  # GLM-5-Next has no other
    if name is None:
        return None
    module = importlib.import_module(f"transformers.models.{model_type_to_module_name(model_type)}")
    return getattr(module, name)


def _register() -> None:
    FAMILIES.update(NATIVE)
    for kind, model in _RECURRENCES.items():
        model_type = model.model_type()
        FAMILIES[model_type] = FlaFamily(
            kind, op=kind, reference="fla 0.6.0's logits", masks_padding=kind != "retention"
        )
        if model_type not in CONFIG_MAPPING:  # fla registers its own when it is imported
            AutoConfig.register(model_type, model.config_class)
            AutoModel.register(model.config_class, model.decoder)
            AutoModelForCausalLM.register(model.config_class, model)


_register()
