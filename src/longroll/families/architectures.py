"""The architectures of transformers that longroll opens: one row each."""

from __future__ import annotations

from dataclasses import replace

from longroll.families import _heads
from longroll.families._family import Family
from longroll.families.minimax import Minimax
from longroll.families.mlstm import Xlstm
from longroll.families.recurrent_gemma import RecurrentGemma
from longroll.families.rwkv4 import Rwkv4

_CONTROL = Family("attention", masks_padding=True, blocks=True)
_MAMBA2_HYBRID = Family("mamba2", op="ssd", masks_padding=True, blocks=True)
_GATED_DELTA_HYBRID = Family("gated_delta_rule", op="gated_delta_rule", masks_padding=True, blocks=True)
_KDA_HYBRID = Family("kda", op="kda", masks_padding=True)
_CONV_HYBRID = Family("conv", kernel="causal_conv1d.causal_conv1d_fn", masks_padding=True)

FAMILIES: dict[str, Family] = {
    "mamba": Family("mamba", "cache_params", op="selective_scan", masks_padding=True),
    "falcon_mamba": Family("mamba", "cache_params", op="selective_scan", masks_padding=True),
    "mamba2": Family("mamba2", "cache_params", op="ssd", masks_padding=True),
    "jamba": Family("mamba", op="selective_scan", masks_padding=True, blocks=True),
    "zamba": Family("mamba", op="selective_scan", scans="n_mamba_heads", masks_padding=True, blocks=True),
    "bamba": _MAMBA2_HYBRID,
    "falcon_h1": replace(_MAMBA2_HYBRID, head=_heads.falcon_h1),
    "granitemoehybrid": replace(_MAMBA2_HYBRID, head=_heads.granite),
    "nemotron_h": _MAMBA2_HYBRID,
    "zamba2": _MAMBA2_HYBRID,
    "qwen3_next": _GATED_DELTA_HYBRID,
    "qwen3_5": _GATED_DELTA_HYBRID,
    "qwen3_5_text": _GATED_DELTA_HYBRID,
    "qwen3_5_moe": _GATED_DELTA_HYBRID,
    "qwen3_5_moe_text": _GATED_DELTA_HYBRID,
    "qwen4_exp": replace(_GATED_DELTA_HYBRID, reads_tail=True, blocks=False),
    "qwen4_exp_text": replace(_GATED_DELTA_HYBRID, reads_tail=True, blocks=False),
    "olmo_hybrid": _GATED_DELTA_HYBRID,
    "kimi_linear": _KDA_HYBRID,
    "bailing_hybrid": _KDA_HYBRID,
    "glm5_next": _KDA_HYBRID,
    "minimax": Minimax("lightning", op="retention", blocks=True),
    "recurrent_gemma": RecurrentGemma(
        "rg_lru", op="linear_scan", head=_heads.recurrent_gemma, masks_padding=True
    ),
    "xlstm": Xlstm("mlstm", "cache_params", head=_heads.xlstm),
    "rwkv": Rwkv4("rwkv4", "state", op="wkv"),
    "zaya": Family("conv", reads_tail=True),
    "lfm2": replace(_CONV_HYBRID, blocks=True),
    "lfm2_moe": replace(_CONV_HYBRID, blocks=True),
    "lfm3": replace(_CONV_HYBRID, blocks=True),
    "inkling_text": replace(_CONV_HYBRID, head=_heads.inkling),
    "inkling2_text": replace(_CONV_HYBRID, head=_heads.inkling2),
    "gpt2": replace(_CONTROL, learned_positions="n_positions"),
    "gpt_neox": _CONTROL,
    "llama": _CONTROL,
    "qwen2": _CONTROL,
    "qwen3": _CONTROL,
}

__all__ = ["FAMILIES", "Family"]
