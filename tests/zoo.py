"""Tiny random models of every family, with weights large enough that the past matters."""

import os
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longroll.model import RecurrentLM
from longroll.state import RecurrentState

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # also for the processes that tests start
torch.set_num_threads(1)  # a pytest worker is one of several

VOCAB = 64

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_hidden_layers": 2,
}
_MAMBA2 = _BASE | {"num_heads": 4, "head_dim": 16, "state_size": 8, "chunk_size": 16}
_ATTENTION = _BASE | {"intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", _BASE | {"state_size": 8}),
    "falcon_mamba": ("falcon_mamba", _BASE | {"state_size": 8}),
    "mamba2": ("mamba2", _MAMBA2 | {"n_groups": 1}),
    "mamba2_groups": ("mamba2", _MAMBA2 | {"n_groups": 2}),
    "gpt2": ("gpt2", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "llama": ("llama", _ATTENTION | {"num_key_value_heads": 2}),
    "qwen2": ("qwen2", _ATTENTION | {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", _ATTENTION | {"num_key_value_heads": 2, "head_dim": 8}),
    "gpt_neox": ("gpt_neox", _ATTENTION),
}
RECURRENT = ["mamba", "falcon_mamba", "mamba2", "mamba2_groups"]
CONTROLS = [name for name in CONFIGS if name not in RECURRENT]


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """A model in eval mode; larger projections and slower decays than at initialisation, so state counts."""
    model_type, entries = CONFIGS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(entries | config)))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "conv" not in parameter_name and "A_log" not in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.08)
    return model.to(dtype).eval()


def lm_of(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> RecurrentLM:
    """The same, opened by longroll."""
    return RecurrentLM(build(name, seed, dtype, **config))


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random ids (rows, length)."""
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_state(lm: RecurrentLM, rows: int, seed: int = 0, scale: float = 1.0) -> RecurrentState:
    """Gaussian noise in the shapes of the model's recurrent and conv state."""
    generator = torch.Generator().manual_seed(seed)
    return lm.zero_state(rows).map(lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype) * scale)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Largest difference, relative to the largest number expected."""
    difference = ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    assert difference <= tolerance, f"{what}: {difference:.1e} > {tolerance:.0e}"


def assert_same_state(actual: RecurrentState, expected: RecurrentState, tolerance: float = 0.0) -> None:
    """The same keys, `seen` and, within the tolerance, numbers; 0: bit for bit."""
    assert actual.keys() == expected.keys()
    assert actual.seen == expected.seen
    for key in expected:
        if tolerance:
            assert_close(actual[key], expected[key], tolerance, str(key))
        else:
            assert torch.equal(actual[key], expected[key]), str(key)
