"""BlinkDL's RWKV `.pth` files: RWKV-7 ("x070") and RWKV-6 ("x060"), of any vocabulary.

A file is a state dict and no config: version and sizes follow from the tensors. Names and formulas:
github.com/BlinkDL/RWKV-LM, `RWKV-v7/rwkv_v7_demo.py` and `RWKV-v5/rwkv_v6_demo.py`; how they map to fla's:
github.com/fla-org/flash-linear-attention, `utils/convert_from_rwkv7.py` and `convert_from_rwkv6.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from longroll.checkpoint import Checkpoint
from longroll.errors import LongrollError
from longroll.families.fla_models.rwkv6 import RWKV6Config, RWKV6ForCausalLM
from longroll.families.fla_models.rwkv7 import RWKV7Config, RWKV7ForCausalLM
from longroll.families.original_mamba import as_stored, read_weights

_RENAMES = [
    (r"^emb\.", "model.embeddings."),
    (r"^ln_out\.", "model.norm."),
    (r"^head\.", "lm_head."),
    (r"^blocks\.", "model.layers."),
    (r"\.ln0\.", ".pre_norm."),
    (r"\.ln1\.", ".attn_norm."),
    (r"\.ln2\.", ".ffn_norm."),
    (r"\.att\.", ".attn."),
    (r"\.attn\.ln_x\.", ".attn.g_norm."),
    (r"\.attn\.output\.", ".attn.o_proj."),
    (r"\.attn\.receptance\.", ".attn.r_proj."),
    (r"\.attn\.key\.", ".attn.k_proj."),
    (r"\.attn\.value\.", ".attn.v_proj."),
    (r"\.attn\.gate\.", ".attn.g_proj."),
]
_RENAMES_7 = [
    (r"\.([wavg])0$", r".\1_lora.lora.2.bias"),
    (r"\.([wavg])1$", r".\1_lora.lora.0.weight"),
    (r"\.([wavg])2$", r".\1_lora.lora.2.weight"),
]
_RENAMES_6 = [
    (r"\.attn\.([rkvg]_proj)\.", r".attn.\1.linear."),
    (r"\.ffn\.(key|receptance)\.", r".ffn.\1.linear."),
    (r"\.ffn\.time_maa_k$", ".ffn.key.mu"),
    (r"\.ffn\.time_maa_r$", ".ffn.receptance.mu"),
    (r"\.time_maa_x$", ".x_proj.0.mu"),
    (r"\.time_maa_w1$", ".x_proj.0.linear.weight"),
    (r"\.time_maa_w2$", ".x_proj.2.weight"),
    (r"\.time_decay$", ".w_proj.linear.lora.2.bias"),
    (r"\.time_decay_w1$", ".w_proj.linear.lora.0.weight"),
    (r"\.time_decay_w2$", ".w_proj.linear.lora.2.weight"),
    (r"\.time_faaaa$", ".bonus"),
]
_TRANSPOSED = re.compile(r"\.[wavg][12]$|_w[12]$")  # of the form x @ w, where nn.Linear has x @ w.T
_UNUSED = re.compile(r"blocks\.0\.att\.v[012]")
"""What files of RWKV-7 hold without use: the first layer gives values and mixes none in."""
_FILE_ORDER, _FLA_ORDER = "wkvrg", "rwkvg"  # of RWKV-6's five token shifts


def is_rwkv_file(name: str) -> bool:
    """Return whether a name is that of a `.pth` file."""
    return name.endswith(".pth")


def load_rwkv(path: Path, *, dtype: torch.dtype | str) -> tuple[PreTrainedModel, Checkpoint]:
    """Open a `.pth` file as `RWKV7ForCausalLM` or `RWKV6ForCausalLM`.

    Raises:
        LongrollError: for a file that is missing, cannot be read or holds more than tensors, is of another
            version of RWKV, or has weights missing or left over.
    """
    if not path.is_file():
        raise LongrollError(f"{path} does not exist: check the path of the .pth file.")
    weights = read_weights(path)
    try:
        if "blocks.0.att.r_k" in weights:
            model = _empty(RWKV7ForCausalLM, RWKV7Config(**_sizes(path, weights), **_sizes_7(weights)))
            weights = _translate(_without_first_values(weights), _RENAMES + _RENAMES_7)
        elif "blocks.0.att.time_maa_w2" in weights:
            model = _empty(RWKV6ForCausalLM, RWKV6Config(**_sizes(path, weights), **_sizes_6(weights)))
            weights = _translate(_in_our_order(weights), _RENAMES + _RENAMES_6)
        else:
            raise LongrollError(f"{path} is neither RWKV-7 (x070) nor RWKV-6 (x060): no other can be opened.")
    except (KeyError, ValueError, IndexError) as error:  # a tensor that is not there, or of too few axes
        raise LongrollError(f"{path} is not a whole RWKV checkpoint: {error!r}.") from None
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or extra:
        raise LongrollError(f"{path} is of an unknown kind: missing {missing[:3]}, extra {extra[:3]}.")
    for name, like in expected.items():
        if weights[name].squeeze().shape != like.squeeze().shape:  # (C,) and (1, 1, C) are the same
            shapes = f"{tuple(weights[name].shape)}, expected {tuple(like.shape)}"
            raise LongrollError(f"{path} does not fit together: {name} has shape {shapes}.")
        weights[name] = weights[name].reshape(like.shape).contiguous()
    model.load_state_dict(weights, assign=True)
    own = weights["lm_head.weight"].dtype  # some hold decays in float32
    model.to(own if isinstance(dtype, str) else dtype)  # type: ignore[arg-type]
    return model, Checkpoint(path, own, "rwkv")


def to_rwkv(model: PreTrainedModel, file: Path) -> dict[str, Tensor]:
    """Return the weights of `model` on the CPU, under the names, in the shapes and dtypes of a `.pth` file.

    Args:
        model: what `load_rwkv` made of `file`, trained since.
        file: the original.
    """
    renames = _RENAMES + (_RENAMES_7 if isinstance(model, RWKV7ForCausalLM) else _RENAMES_6)
    order = [_FLA_ORDER.index(shift) for shift in _FILE_ORDER]
    ours, made = model.state_dict(), {}
    for name, like in read_weights(file).items():
        if _UNUSED.fullmatch(name):
            made[name] = like
        elif bias := re.fullmatch(r"(.*\.att\.)time_maa_([rwkvg])", name):
            shifts = ours[_rename(bias[1] + "x_bias", renames)]
            made[name] = as_stored(shifts[_FLA_ORDER.index(bias[2])], like)
        else:
            tensor = ours[_rename(name, renames)]
            if _TRANSPOSED.search(name):
                tensor = tensor.t()
            if name.endswith(".att.time_maa_w1"):
                tensor = tensor.unflatten(1, (5, -1))[:, order].flatten(1)
            elif name.endswith(".att.time_maa_w2"):
                tensor = tensor.unflatten(0, (5, -1))[order]
            made[name] = as_stored(tensor, like)
    return made


def _empty(model_class: type[PreTrainedModel], config: RWKV7Config | RWKV6Config) -> PreTrainedModel:
    with no_init_weights(), torch.device("meta"):
        return model_class(config)


def _sizes(path: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return config fields of both versions."""
    vocab_size, hidden = weights["emb.weight"].shape
    length = re.search(r"ctx(\d+)", path.name)
    layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "intermediate_size": weights["blocks.0.ffn.key.weight"].shape[0],
        "norm_first": "blocks.0.ln0.weight" in weights,
        "group_norm_eps": 64e-5,  # whatever the head size
        "max_position_embeddings": None,
        "train_length": int(length[1]) if length else None,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _sizes_7(weights: dict[str, Tensor]) -> dict[str, Any]:
    heads, size = weights["blocks.0.att.r_k"].shape
    v1 = weights.get("blocks.1.att.v1", weights["blocks.0.att.a1"])  # a single layer has none
    return {
        "num_heads": heads,
        "head_dim": size,
        "decay_low_rank_dim": weights["blocks.0.att.w1"].shape[1],
        "gate_low_rank_dim": weights["blocks.0.att.g1"].shape[1],
        "a_low_rank_dim": weights["blocks.0.att.a1"].shape[1],
        "v_low_rank_dim": v1.shape[1],
        "fuse_norm": False,  # so that keys have unit length to the last bit
    }


def _sizes_6(weights: dict[str, Tensor]) -> dict[str, Any]:
    heads, size = weights["blocks.0.att.time_faaaa"].shape
    expansion = heads * size / weights["emb.weight"].shape[1]
    return {
        "num_heads": heads,
        "expand_k": expansion,
        "expand_v": expansion,
        "proj_low_rank_dim": weights["blocks.0.att.time_maa_w2"].shape[1],
        "gate_low_rank_dim": weights["blocks.0.att.time_decay_w1"].shape[1],
    }


def _without_first_values(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in weights.items() if not _UNUSED.fullmatch(name)}


def _in_our_order(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put RWKV-6's five token shifts in fla's order, and their biases into one tensor."""
    order = [_FILE_ORDER.index(shift) for shift in _FLA_ORDER]
    ordered = {}
    for name, tensor in weights.items():
        if name.endswith(".att.time_maa_w1"):  # (C, 5 * rank)
            tensor = tensor.unflatten(1, (5, -1))[:, order].flatten(1)
        elif name.endswith(".att.time_maa_w2"):  # (5, rank, C)
            tensor = tensor[order].flatten(0, 1)
        elif re.search(r"\.att\.time_maa_[rwkvg]$", name):
            tensor = torch.stack([weights[name[:-1] + shift].flatten() for shift in _FLA_ORDER])
            name = name.replace("time_maa_" + name[-1], "x_bias")
        ordered[name] = tensor
    return ordered


def _translate(weights: dict[str, Tensor], renames: list[tuple[str, str]]) -> dict[str, Tensor]:
    translated = {}
    for name, tensor in weights.items():
        if _TRANSPOSED.search(name):
            tensor = tensor.t()
        translated[_rename(name, renames)] = tensor
    return translated


def _rename(name: str, renames: list[tuple[str, str]]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name
