"""The same weights in other people's modules, from the zero state: mamba-ssm's and fla's."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import torch
from torch import nn
from transformers import Mamba2ForCausalLM


def available() -> list[str]:
    """Peers that are installed here."""
    return [name for name, package in (("mamba-ssm", "mamba_ssm"), ("fla", "fla")) if _installed(package)]


def build(name: str, model: nn.Module) -> nn.Module:
    """A peer's module with the weights of transformers' `model`; its forward gives `.logits`."""
    peer = {"mamba-ssm": _mamba_ssm, "fla": _fla}[name](model.config, isinstance(model, Mamba2ForCausalLM))
    known = peer.state_dict()
    renamed = {}
    for key, value in model.state_dict().items():
        key = key if key in known else key.replace("embeddings", "embedding")
        renamed[key] = value
    peer.load_state_dict(renamed)
    return peer


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def module(name: str) -> types.ModuleType:
    """A module of mamba_ssm, past its __init__, which imports Mamba-3, which wants tilelang."""
    if "mamba_ssm" not in sys.modules:
        package = types.ModuleType("mamba_ssm")
        package.__path__ = importlib.util.find_spec("mamba_ssm").submodule_search_locations  # type: ignore
        sys.modules["mamba_ssm"] = package
    return importlib.import_module(name)


def _mamba_ssm(config, second: bool) -> nn.Module:
    models = module("mamba_ssm.models.mixer_seq_simple")
    if sys.modules["mamba_ssm.modules.mamba2"].causal_conv1d_fn is None:
        raise RuntimeError("mamba-ssm is slow without causal_conv1d, which is not installed")
    sizes = {"layer": "Mamba2" if second else "Mamba1", "d_state": config.state_size, "expand": config.expand}
    if second:
        sizes |= {"headdim": config.head_dim, "ngroups": config.n_groups}
    return models.MambaLMHeadModel(
        models.MambaConfig(
            d_model=config.hidden_size,
            n_layer=config.num_hidden_layers,
            vocab_size=config.vocab_size,
            ssm_cfg=sizes,
            tie_embeddings=config.tie_word_embeddings,
        )
    )


def _fla(config, second: bool) -> nn.Module:
    module = importlib.import_module(f"fla.models.{'mamba2' if second else 'mamba'}")
    name = "Mamba2" if second else "Mamba"
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "expand", "tie_word_embeddings")
    sizes = {key: getattr(config, key) for key in same}
    if second:
        sizes |= {"head_dim": config.head_dim, "n_groups": config.n_groups}
    settings = getattr(module, f"{name}Config")(norm_eps=config.layer_norm_epsilon, **sizes)
    return getattr(module, f"{name}ForCausalLM")(settings)


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What any of them gives from the zero state."""
    try:
        return model(ids, use_cache=False).logits
    except TypeError:  # mamba-ssm's has no such argument
        return model(ids).logits
