"""Tiny random models of every family, on which the laws are tried: in the tests and by `longroll doctor`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longroll.families.fla_models import model_class

VOCAB = 64

_LINEAR, _FULL = "linear_attention", "full_attention"
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_hidden_layers": 2,
}
_MAMBA2 = _BASE | {"num_heads": 4, "head_dim": 16, "state_size": 8, "chunk_size": 16}
_WIDE = _BASE | {"intermediate_size": 64, "num_attention_heads": 4}
_ATTENTION = _WIDE | {"max_position_embeddings": 512}
_MAMBA2_HYBRID = _WIDE | {
    "num_key_value_heads": 2,
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
    "mamba_n_groups": 1,
}
_GRANITE = _MAMBA2_HYBRID | {
    "shared_intermediate_size": 64,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "logits_scaling": 3.0,
    "position_embedding_type": "rope",
}
_JAMBA = _WIDE | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
_NEMOTRON = _WIDE | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 16,
}
_ZAMBA = _WIDE | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "layers_block_type": [_LINEAR, "hybrid", "hybrid"],
    "mamba_d_state": 8,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GATED_DELTA = (
    _WIDE
    | _EXPERTS
    | {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,  # the least that GPU kernels take
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
    }
)
_THREE = {"num_hidden_layers": 3, "layer_types": [_LINEAR, _FULL, _LINEAR]}
_TWO = {"layer_types": [_LINEAR, _LINEAR]}
_KDA = _WIDE | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_EYES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
_MINIMAX = _WIDE | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "block_size": 16,
}
_RECURRENT_GEMMA = _WIDE | {
    "num_hidden_layers": 3,
    "lru_width": 48,
    "attention_window_size": 8,
    "block_types": ["recurrent", "attention"],
}
_XLSTM = _BASE | {"num_heads": 4, "chunk_size": 16, "autocast_kernel_dtype": "float32"}
_ZAYA = _WIDE | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "moe_intermediate_size": 32,
    "router_hidden_size": 16,
}
_CONV = _WIDE | {"num_hidden_layers": 3, "num_key_value_heads": 2, "layer_types": ["conv", _FULL, "conv"]}
_INKLING = _WIDE | {
    "vocab_size": VOCAB + 4,
    "unpadded_vocab_size": VOCAB,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 32,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}

_FLA = _BASE | {"hidden_size": 64, "intermediate_size": 64, "num_heads": 2}
_FLA_ATTENTION = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 9}

_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_GPT2 |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0)

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", _BASE | {"state_size": 8}),
    "falcon_mamba": ("falcon_mamba", _BASE | {"state_size": 8}),
    "mamba2": ("mamba2", _MAMBA2 | {"n_groups": 1}),
    "mamba2_groups": ("mamba2", _MAMBA2 | {"n_groups": 2}),
    "jamba": ("jamba", _JAMBA),
    "zamba": ("zamba", _ZAMBA | {"mamba_dt_rank": 4, "n_mamba_heads": 2}),
    "zamba_one_scan": ("zamba", _ZAMBA | {"mamba_dt_rank": 4, "n_mamba_heads": 1}),
    "bamba": ("bamba", _MAMBA2_HYBRID | {"num_hidden_layers": 3, "attn_layer_indices": [1]}),
    "bamba_recurrent": ("bamba", _MAMBA2_HYBRID | {"attn_layer_indices": []}),
    "falcon_h1": ("falcon_h1", _MAMBA2_HYBRID | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5}),
    "granitemoehybrid": ("granitemoehybrid", _GRANITE | _THREE),
    "granitemoehybrid_recurrent": ("granitemoehybrid", _GRANITE | _TWO),
    "nemotron_h": ("nemotron_h", _NEMOTRON | {"layers_block_type": [_LINEAR, "mlp", _FULL, _LINEAR]}),
    "nemotron_h_recurrent": ("nemotron_h", _NEMOTRON | {"layers_block_type": [_LINEAR, "mlp", _LINEAR]}),
    "zamba2": ("zamba2", _ZAMBA | {"n_mamba_heads": 4, "mamba_ngroups": 1, "use_mem_rope": True}),
    "qwen3_next": ("qwen3_next", _GATED_DELTA | _THREE),
    "qwen3_next_recurrent": ("qwen3_next", _GATED_DELTA | _TWO),
    "qwen3_5": ("qwen3_5_text", _GATED_DELTA | _THREE),
    "qwen3_5_recurrent": ("qwen3_5_text", _GATED_DELTA | _TWO),
    "qwen3_5_moe": ("qwen3_5_moe_text", _GATED_DELTA | _THREE),
    "qwen4_exp": (
        "qwen4_exp_text",
        _GATED_DELTA
        | _THREE
        | {
            "hc_count": 2,
            "hc_lowrank": 8,
            "ple_layer_ids": [1],
            "ple_embed_dim": 32,
            "heads_per_ngram": 2,
            "ngram_vocab_size_base": 97,
            "make_ngram_vocab_size_divisible_by": 8,
            "split_ngram_parts": 1,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
        },
    ),
    "olmo_hybrid": ("olmo_hybrid", _GATED_DELTA | _THREE | {"linear_num_value_heads": 2}),
    "kimi_linear": ("kimi_linear", _KDA | _THREE),
    "kimi_linear_recurrent": ("kimi_linear", _KDA | _TWO),
    "bailing_hybrid": (
        "bailing_hybrid",
        _KDA
        | _THREE
        | {
            "head_dim": 8,
            "mlp_layer_types": ["dense", "dense", "sparse"],
            "n_group": 2,
            "topk_group": 1,
            "num_mtp_layers": 0,
        },
    ),
    "glm5_next": (
        "glm5_next",
        _KDA
        | {
            "num_hidden_layers": 3,
            "layer_types": [_LINEAR, "indexed_attention", _LINEAR],
            "mlp_layer_types": ["dense", "dense", "sparse"],
            "indexer_types": ["full", "full", "full"],
            "qk_rope_head_dim": 0,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "q_lora_rank": 16,
            "index_n_heads": 16,  # of few all scores are often 0, and pools tie
            "index_head_dim": 8,
            "index_topk": 8,
            "index_kpool": 4,
            "hc_mult": 2,
            "vision_config": _EYES,
        },
    ),
    "minimax": ("minimax", _MINIMAX | {"layer_types": [_LINEAR, _FULL]}),
    "recurrent_gemma": ("recurrent_gemma", _RECURRENT_GEMMA),
    "xlstm": ("xlstm", _XLSTM),
    "rwkv": ("rwkv", _BASE | {"context_length": 128}),
    "zaya": ("zaya", _ZAYA),
    "lfm2": ("lfm2", _CONV | {"block_multiple_of": 8}),
    "lfm2_moe": ("lfm2_moe", _CONV | _EXPERTS | {"num_dense_layers": 1}),
    "lfm3": ("lfm3", _CONV | {"head_dim": 8}),
    "inkling": ("inkling_text", _INKLING | {"mlp_layer_types": ["dense", "sparse"]}),
    "inkling2": ("inkling2_text", _INKLING | {"n_layers_per_attn_res_block": 1}),
    "gla": ("gla", _FLA),
    "gla_hybrid": ("gla", _FLA | {"num_kv_heads": 1, "use_short_conv": True, "attn": _FLA_ATTENTION}),
    "delta_net": ("delta_net", _FLA),
    "gated_deltanet": ("gated_deltanet", _FLA | {"head_dim": 16, "num_v_heads": 4}),
    "retnet": ("retnet", _FLA),
    "rwkv6": ("rwkv6", _FLA | {"proj_low_rank_dim": 8, "gate_low_rank_dim": 8}),
    "rwkv7": ("rwkv7", _FLA | {"head_dim": 16}),
    "gpt2": ("gpt2", _GPT2),
    "llama": ("llama", _ATTENTION | {"num_key_value_heads": 2}),
    "qwen2": ("qwen2", _ATTENTION | {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", _ATTENTION | {"num_key_value_heads": 2, "head_dim": 8}),
    "gpt_neox": ("gpt_neox", _ATTENTION),
}
"""Name -> `model_type` and config; several of one family where its kinds of model differ."""

ON_GPU: dict[str, tuple[str, dict[str, Any]]] = {
    "kda": ("kda", _FLA | {"head_dim": 32}),
    "hgrn2": ("hgrn2", _FLA | {"expand_ratio": 32}),
    "hgrn2_conv": ("hgrn2", _FLA | {"expand_ratio": 32, "use_short_conv": True}),
    "gsa": ("gsa", _FLA | {"num_slots": 16}),
    "comba": ("comba", _FLA | {"head_dim": 32, "expand_v": 1.0}),
}
"""The same of families that nothing runs on a CPU."""


def every_expert(name: str) -> dict[str, Any]:
    """Return config entries by which a model asks all its experts: the choice of a few flips on a
    rounding.
    """
    _, entries = (CONFIGS | ON_GPU)[name]
    experts = entries.get("num_experts") or entries.get("num_local_experts")
    groups = {"topk_group": entries["n_group"]} if "n_group" in entries else {}
    return {"num_experts_per_tok": experts, **groups} if experts else {}


def from_config(model_type: str, entries: dict[str, Any]) -> PreTrainedModel:
    """Return a model of a family with these entries in its config, initialised as upstream does."""
    found = model_class(model_type)
    if found is None:
        built: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **entries))
        return built
    assert found.config_class is not None
    return found(found.config_class(**entries))


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """Return a model in eval mode; larger projections and slower decays than at initialisation, so state
    counts.
    """
    model_type, entries = (CONFIGS | ON_GPU)[name]
    torch.manual_seed(seed)
    model: Any = from_config(model_type, entries | config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(".temp"):  # zaya's keys are scaled by it, from 0 on
                parameter.add_(1)
            if parameter_name.endswith("linear_attn.A_log") or (name in ON_GPU and "A_log" in parameter_name):
                # of the gated delta rule
                parameter.sub_(4)
            if parameter.ndim >= 2 and "A_log" not in parameter_name:
                if "conv" not in parameter_name:
                    scale = 1 if "x_proj_weight" in parameter_name else 0.08  # zamba's starts at 0
                    parameter.add_(torch.randn_like(parameter) * scale)
                elif parameter.std() < 0.05:  # some start so small that next to nothing gets past
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # transformers' default multiplies no float64
    model.to(dtype)
    if dtype.itemsize < 4:  # as `from_pretrained` loads them
        for parameter_name, parameter in model.named_parameters():
            if any(kept in parameter_name for kept in model._keep_in_fp32_modules_strict or ()):
                parameter.data = parameter.data.float()
    ready: PreTrainedModel = model.eval()
    return ready
