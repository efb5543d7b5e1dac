"""Original state-spaces checkpoints (`config.json` + `pytorch_model.bin`), Mamba-1 and Mamba-2.

Layout: github.com/state-spaces/mamba, `mamba_ssm/models/config_mamba.py` and `mixer_seq_simple.py`. The
weights go into transformers' classes, whose mixers keep the same parameter names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig, PreTrainedConfig, PreTrainedModel

from longroll.errors import LongrollError

_EMBEDDINGS = "backbone.embeddings.weight"
_DEFAULTS: dict[str, dict[str, Any]] = {
    "Mamba1": {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto"},
    "Mamba2": {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1, "chunk_size": 256},
}
_WITHOUT_EFFECT = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init"}
_WITHOUT_EFFECT |= {"use_fast_path", "use_mem_eff_path", "chunk_size"}  # on a forward with trained weights


def is_original(config: dict[str, Any]) -> bool:
    """Whether this `config.json` is a state-spaces one rather than transformers'."""
    return "model_type" not in config and {"d_model", "n_layer"} <= config.keys()


def load_original(folder: Path, *, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load an original checkpoint into transformers' `MambaForCausalLM` or `Mamba2ForCausalLM`.

    Raises:
        LongrollError: for a file that cannot be read or holds more than tensors, attention or MLP layers,
            settings without a counterpart in transformers, and weights that do not fit.
    """
    source = json.loads((folder / "config.json").read_text())
    weights_file = folder / "pytorch_model.bin"
    if not weights_file.is_file():
        raise LongrollError(f"{folder} has an original state-spaces config.json but no pytorch_model.bin.")
    weights = {_rename(name): tensor for name, tensor in read_weights(weights_file).items()}
    if _EMBEDDINGS not in weights:
        raise LongrollError(f"{weights_file} does not fit its config.json: missing {[_EMBEDDINGS]}.")
    vocab_size = weights[_EMBEDDINGS].shape[0]  # padded beyond the config's vocab_size
    model = AutoModelForCausalLM.from_config(_config(source, vocab_size, folder))
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
        weights["lm_head.weight"] = weights[_EMBEDDINGS]
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # sizes
        raise LongrollError(f"{weights_file} does not fit its config.json: {error}") from None
    if missing or unexpected:
        raise LongrollError(
            f"{weights_file} does not fit its config.json: missing {missing[:3]}, extra {unexpected[:3]}."
        )
    return model.to(next(iter(weights.values())).dtype if dtype == "auto" else dtype)


def read_weights(weights_file: Path) -> dict[str, torch.Tensor]:
    """Read a state dict; a pickle that holds anything else is refused with a LongrollError."""
    try:
        return torch.load(weights_file, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated file, and a pickle that would run code, come up here
        raise LongrollError(f"{weights_file} cannot be read as plain weights: {error}") from None


def _rename(name: str) -> str:
    return name.replace("backbone.embedding.", "backbone.embeddings.")


def _config(source: dict[str, Any], vocab_size: int, folder: Path) -> PreTrainedConfig:
    ssm = dict(source.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    if source.get("attn_layer_idx") or source.get("d_intermediate"):
        raise LongrollError(f"{folder}: attention and MLP layers of original checkpoints are not supported.")
    if not source.get("rms_norm", True):
        raise LongrollError(f"{folder}: rms_norm = false (LayerNorm) has no counterpart in transformers.")
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": source["d_model"],
        "num_hidden_layers": source["n_layer"],
        "residual_in_fp32": source.get("residual_in_fp32", True),
        "tie_word_embeddings": source.get("tie_embeddings", True),
        "layer_norm_epsilon": 1e-5,
        # the GPT-NeoX tokenizer of these checkpoints: one <|endoftext|> for all
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    defaults = _DEFAULTS.get(layer, {})
    unknown = sorted(ssm.keys() - defaults.keys() - _WITHOUT_EFFECT)
    if defaults and unknown:
        raise LongrollError(f"{folder}: ssm_cfg {unknown} has no counterpart in transformers.")
    ssm = defaults | ssm
    if layer == "Mamba1":
        return MambaConfig(
            **common,
            state_size=ssm["d_state"],
            conv_kernel=ssm["d_conv"],
            expand=ssm["expand"],
            time_step_rank=ssm["dt_rank"],
        )
    if layer == "Mamba2":
        return Mamba2Config(
            **common,
            state_size=ssm["d_state"],
            conv_kernel=ssm["d_conv"],
            expand=ssm["expand"],
            head_dim=ssm["headdim"],
            num_heads=ssm["expand"] * source["d_model"] // ssm["headdim"],
            n_groups=ssm["ngroups"],
            chunk_size=ssm["chunk_size"],
        )
    raise LongrollError(f"{folder}: ssm_cfg.layer is {layer!r}; known are 'Mamba1' and 'Mamba2'.")
