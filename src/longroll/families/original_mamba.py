"""Original state-spaces checkpoints (`config.json` + `pytorch_model.bin`), Mamba-1 and Mamba-2.

Layout: github.com/state-spaces/mamba, `mamba_ssm/models/config_mamba.py` and `mixer_seq_simple.py`. The
weights go into transformers' classes, whose mixers keep the same parameter names.
"""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from longroll.checkpoint import Checkpoint, Stored, common_dtype
from longroll.errors import LongrollError, first_line

_EMBEDDINGS = "backbone.embeddings.weight"
_DEFAULTS: dict[str, dict[str, Any]] = {
    "Mamba1": {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto"},
    "Mamba2": {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1, "chunk_size": 256},
}
_WITHOUT_EFFECT = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init"}
_WITHOUT_EFFECT |= {"use_fast_path", "use_mem_eff_path", "chunk_size"}  # on a forward with trained weights


def is_original(config: dict[str, Any]) -> bool:
    """Return whether this `config.json` is a state-spaces one rather than transformers'."""
    return "model_type" not in config and {"d_model", "n_layer"} <= config.keys()


def load_original(folder: Path, *, dtype: torch.dtype | str) -> tuple[PreTrainedModel, Checkpoint]:
    """Load an original checkpoint into transformers' `MambaForCausalLM` or `Mamba2ForCausalLM`.

    The sizes in the config are held to the tensors of the file before any memory is taken for them.

    Raises:
        LongrollError: for a file that cannot be read or holds more than tensors, attention or MLP layers,
            settings without a counterpart in transformers, sizes that are none, and weights that do not fit.
    """
    source = json.loads((folder / "config.json").read_text())
    weights_file = folder / "pytorch_model.bin"
    if not weights_file.is_file():
        raise LongrollError(f"{folder} has an original state-spaces config.json but no pytorch_model.bin.")
    weights = {_rename(name): tensor for name, tensor in read_weights(weights_file).items()}
    _check_sizes(source, weights, weights_file)
    vocab_size = weights[_EMBEDDINGS].shape[0]  # padded beyond the config's vocab_size
    try:
        config = _config(source, vocab_size, folder)
        with no_init_weights(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except LongrollError:
        raise
    except Exception as error:  # sizes that no tensor has, or that do not divide each other
        raise LongrollError(f"{folder}: no model has this config.json: {first_line(error)}") from None
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights[_EMBEDDINGS]
    _check_shapes(model, weights, weights_file)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    own = common_dtype(Stored(weights_file, t.dtype, t.numel()) for t in weights.values())
    model.to(own if dtype == "auto" else dtype)
    return model, Checkpoint(folder, own, "state-spaces")


def original_config(folder: Path) -> PreTrainedConfig:
    """Return transformers' config of an original checkpoint by its `config.json` alone.

    Raises:
        LongrollError: for settings without a counterpart in transformers, and sizes that are none.
    """
    source = json.loads((folder / "config.json").read_text())
    sizes = {name: source.get(name) for name in ("d_model", "n_layer", "vocab_size")}
    multiple = source.get("pad_vocab_size_multiple", 8)
    for name, value in (sizes | {"pad_vocab_size_multiple": multiple}).items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise LongrollError(f"{folder}: {name} must be a whole number above 0, not {value!r}.")
    try:
        return _config(source, -(-source["vocab_size"] // multiple) * multiple, folder)
    except LongrollError:
        raise
    except Exception as error:
        raise LongrollError(f"{folder}: no model has this config.json: {first_line(error)}") from None


def to_state_spaces(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Return the weights of `model` on the CPU, under the names and in the dtypes of the checkpoint in
    `folder`.

    Args:
        model: what `load_original` made of `folder`, trained since.
        folder: the original checkpoint.
    """
    ours, made = model.state_dict(), {}
    for name, like in read_weights(folder / "pytorch_model.bin").items():
        made[name] = as_stored(ours[_rename(name)], like)
    if model.config.tie_word_embeddings and "lm_head.weight" in made:  # once in the file, under both names
        made["lm_head.weight"] = made["backbone.embedding.weight"]
    return made


def as_stored(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a copy of `tensor` on the CPU in the shape and dtype of `like`, without the storage around
    it.
    """
    return tensor.reshape(like.shape).to("cpu", like.dtype).clone(memory_format=torch.contiguous_format)


def read_weights(weights_file: Path) -> dict[str, Tensor]:
    """Read a state dict; a file that holds anything else is refused with a LongrollError."""
    try:
        weights = torch.load(weights_file, map_location="cpu", weights_only=True)
    except UnpicklingError:  # whose message asks to run the code in the file
        raise LongrollError(
            f"{weights_file} cannot be read as plain weights: it is damaged, or holds more than tensors."
        ) from None
    except Exception as error:  # a truncated file
        raise LongrollError(f"{weights_file} cannot be read as plain weights: {first_line(error)}") from None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.is_floating_point()
        for name, tensor in weights.items()
    ):
        raise LongrollError(f"{weights_file} must hold a state dict: names and floating-point tensors.")
    return weights


def _check_sizes(source: dict[str, Any], weights: dict[str, Tensor], file: Path) -> None:
    """Refuse numbers of the config that are no sizes, and a width and depth that are not the file's."""
    ssm = source.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise LongrollError(f"{file.parent}: ssm_cfg must be an object, not {ssm!r}.")
    sizes = {name: source[name] for name in ("d_model", "n_layer")}
    names = {name for defaults in _DEFAULTS.values() for name in defaults}
    sizes |= {f"ssm_cfg.{name}": ssm[name] for name in names & ssm.keys()}
    for name, value in sizes.items():
        auto = name == "ssm_cfg.dt_rank" and value == "auto"
        if not auto and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise LongrollError(f"{file.parent}: {name} must be a whole number above 0, not {value!r}.")
    if _EMBEDDINGS not in weights or weights[_EMBEDDINGS].ndim != 2:
        raise LongrollError(f"{file} does not fit its config.json: missing {[_EMBEDDINGS]}.")
    layers = {name.split(".")[2] for name in weights if name.startswith("backbone.layers.")}
    found = {"d_model": weights[_EMBEDDINGS].shape[1], "n_layer": len(layers)}
    for name, size in found.items():
        if source[name] != size:
            raise LongrollError(
                f"{file} does not fit its config.json: {name} is {source[name]} there and {size} in the file."
            )


def _check_shapes(model: PreTrainedModel, weights: dict[str, Tensor], file: Path) -> None:
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or extra:
        raise LongrollError(f"{file} does not fit its config.json: missing {missing[:3]}, extra {extra[:3]}.")
    for name, like in expected.items():
        if weights[name].shape != like.shape:
            raise LongrollError(
                f"{file} does not fit its config.json: {name} is {tuple(weights[name].shape)} in the file "
                f"and {tuple(like.shape)} by the config."
            )


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
    defaults = _DEFAULTS.get(str(layer), {})
    unknown = sorted(ssm.keys() - defaults.keys() - _WITHOUT_EFFECT)
    if defaults and unknown:
        raise LongrollError(f"{folder}: ssm_cfg {unknown} has no counterpart in transformers.")
    ssm = defaults | ssm
    if layer == "Mamba2" and source["d_model"] * ssm["expand"] % ssm["headdim"]:
        raise LongrollError(f"{folder}: ssm_cfg.headdim {ssm['headdim']} does not divide expand x d_model.")
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
