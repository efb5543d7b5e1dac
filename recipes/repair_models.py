"""Models of recipes/repair.py: language models whose recurrent state hardly forgets at first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
)

from longroll.families.fla_models.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from longroll.families.fla_models.gla import GLAConfig, GLAForCausalLM

SLOW = (0.001, 0.1)  # decay rates A; the official initialisation draws them from (1, 16)
_GATE = 6.0  # GLA's bias of the decay: log sigmoid(6) / 16 = -.00015 a token


@dataclass(frozen=True)
class Plan:
    """A model and its training from scratch."""

    build: Callable[[Plan, int], PreTrainedModel]
    width: int
    layers: int
    rate: float
    """Peak of the learning rate."""
    tokens: float
    """Tokens of training, in millions."""
    state: int = 128
    length: int = 256
    """T."""
    rows: int = 64
    """Rows of a step."""
    frozen: tuple[str, ...] = ()
    """Ends of the names of parameters that are not trained before the repair."""
    screen: str = "short"
    """Which arms are run: a name in `repair_arms.SCREENS`."""
    longest: int = 256
    """Positions of the long texts, in T."""
    graphs: bool = True
    """Whether a step can be a CUDA graph."""


def official_mamba2(plan: Plan, vocabulary: int) -> PreTrainedModel:
    """Mamba-2, its decay rates A drawn from (1, 16): a model that holds."""
    model = mamba2(plan, vocabulary)
    for name, rates in model.named_parameters():
        if name.endswith("A_log"):
            rates.data.uniform_(1, 16).log_()
    return model


def mamba2(plan: Plan, vocabulary: int) -> PreTrainedModel:
    """Mamba-2, its decay rates A drawn from `SLOW`."""
    width = plan.width
    config = Mamba2Config(
        **_common(plan, vocabulary),
        state_size=plan.state,
        head_dim=min(64, width),
        num_heads=2 * width // min(64, width),
        n_groups=1,
        expand=2,
        chunk_size=128,
    )
    return _slow(Mamba2ForCausalLM(config))


def slow_granite(plan: Plan, vocabulary: int) -> PreTrainedModel:
    """A hybrid whose one layer of attention is the fourth, its decay rates A from .0001 to .01."""
    return _slow(granite(plan, vocabulary, attention=(3,)), 0.0001, 0.01)


def granite(plan: Plan, vocabulary: int, attention: Sequence[int] = ()) -> PreTrainedModel:
    """A hybrid in the shape of Granite 4: a layer in four is attention without positions, or those named."""
    width = plan.width
    attention = attention or range(2, plan.layers, 4)
    kinds = ["attention" if layer in attention else "mamba" for layer in range(plan.layers)]
    config = GraniteMoeHybridConfig(
        **_common(plan, vocabulary),
        layer_types=kinds,
        position_embedding_type="nope",
        intermediate_size=width,
        shared_intermediate_size=2 * width,
        num_local_experts=0,
        num_experts_per_tok=0,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 128),
        mamba_n_heads=2 * width // min(64, width),
        mamba_d_head=min(64, width),
        mamba_d_state=plan.state,
        mamba_n_groups=1,
        mamba_chunk_size=128,
    )
    return _slow(GraniteMoeHybridForCausalLM(config))


def slow_gla(plan: Plan, vocabulary: int) -> PreTrainedModel:
    """GLA, whose decays are log sigmoid(...) / 1024 a token, not / 16: e^-.0007 at first."""
    config = GLAConfig(
        **_common(plan, vocabulary),
        num_heads=max(1, plan.width // 128),
        hidden_ratio=4,
        gate_logit_normalizer=1024,
    )
    return GLAForCausalLM(config)


def gla(plan: Plan, vocabulary: int) -> PreTrainedModel:
    """GLA, all of whose key channels start with decays of e^-.00015 a token that no input changes."""
    width = plan.width
    config = GLAConfig(**_common(plan, vocabulary), num_heads=max(1, width // 128), hidden_ratio=4)
    model = GLAForCausalLM(config)
    for name, module in model.named_modules():
        if name.endswith("gk_proj"):
            torch.nn.init.zeros_(module[1].weight)
            torch.nn.init.constant_(module[1].bias, _GATE)
    return model


def gated_deltanet(plan: Plan, vocabulary: int) -> PreTrainedModel:
    """Gated DeltaNet, its decay rates A drawn from `SLOW`."""
    width = plan.width
    config = GatedDeltaNetConfig(
        **_common(plan, vocabulary),
        num_heads=max(1, width // 128),
        head_dim=min(96, width // 2),
        expand_v=2.0,
        hidden_ratio=4,
    )
    return _slow(GatedDeltaNetForCausalLM(config))


def _common(plan: Plan, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": plan.width,
        "num_hidden_layers": plan.layers,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _slow(model: PreTrainedModel, low: float = SLOW[0], high: float = SLOW[1]) -> PreTrainedModel:
    for name, rates in model.named_parameters():
        if name.endswith("A_log"):
            rates.data.uniform_(low, high).log_()
    return model


PLANS = {
    "mamba2-22m": Plan(mamba2, 512, 8, rate=2e-3, tokens=50, screen="full"),
    "mamba2-103m": Plan(mamba2, 768, 24, rate=1e-3, tokens=50),
    "gla-36m": Plan(gla, 512, 8, rate=1e-3, tokens=40, frozen=("gk_proj.1.weight", "gk_proj.1.bias")),
    "granite-33m": Plan(granite, 512, 8, rate=2e-3, tokens=40, longest=64, graphs=False),
    "gdn-40m": Plan(gated_deltanet, 512, 8, rate=1e-3, tokens=40, screen="brief"),
    "gla-36m-free": Plan(gla, 512, 8, rate=1e-3, tokens=40),
    "gla-36m-slow": Plan(slow_gla, 512, 8, rate=1e-3, tokens=25),
    "gla-36m-t128": Plan(slow_gla, 512, 8, rate=1e-3, tokens=20, length=128, rows=128),
    "gla-36m-bias": Plan(gla, 512, 8, rate=1e-3, tokens=25, frozen=("gk_proj.1.weight",), screen="gates"),
    "granite-33m-slow": Plan(slow_granite, 512, 8, rate=2e-3, tokens=15, length=128, rows=128, longest=64,
                             graphs=False),
    "granite-33m-frozen": Plan(granite, 512, 8, rate=2e-3, tokens=40, longest=64, graphs=False,
                               frozen=("A_log", "dt_bias")),
    "mamba2-103m-30m": Plan(mamba2, 768, 24, rate=1e-3, tokens=30),
    "mamba2-22m-holds": Plan(official_mamba2, 512, 8, rate=2e-3, tokens=40, screen="brief"),
    "mamba2-6m": Plan(mamba2, 256, 4, rate=3e-3, tokens=20, screen="few"),
    "mamba2-22m-t128": Plan(mamba2, 512, 8, rate=2e-3, tokens=40, length=128, rows=128, screen="brief"),
    "mamba2-22m-n64": Plan(mamba2, 512, 8, rate=2e-3, tokens=40, state=64, screen="brief"),
    "mamba2-22m-n256": Plan(mamba2, 512, 8, rate=2e-3, tokens=40, state=256, screen="brief"),
    "tiny": Plan(mamba2, 64, 2, rate=3e-3, tokens=0.02, state=16, length=128, rows=4, longest=16,
                 screen="full"),
    "tiny-gla": Plan(gla, 64, 2, rate=3e-3, tokens=0.02, length=128, rows=4, longest=16,
                     frozen=("gk_proj.1.weight", "gk_proj.1.bias")),
    "tiny-gla-slow": Plan(slow_gla, 64, 2, rate=3e-3, tokens=0.02, length=128, rows=4, longest=16),
    "tiny-gla-bias": Plan(gla, 64, 2, rate=3e-3, tokens=0.02, length=128, rows=4, longest=16,
                          frozen=("gk_proj.1.weight",)),
    "tiny-hybrid-slow": Plan(slow_granite, 64, 4, rate=3e-3, tokens=0.02, state=16, length=128, rows=4,
                             longest=16, graphs=False),
    "tiny-hybrid": Plan(granite, 64, 4, rate=3e-3, tokens=0.02, state=16, length=128, rows=4, longest=16,
                        graphs=False),
}  # fmt: skip
"""By name; the number is the size, the `tiny` ones try the script."""
