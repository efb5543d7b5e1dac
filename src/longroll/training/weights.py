"""The weights of a run: which of them weight decay shrinks, which set how fast a state is forgotten."""

from __future__ import annotations

import re

from torch import nn
from transformers.pytorch_utils import Conv1D

DECAYS = (
    *("A_log", "dt_bias", "dt_proj.bias", "dt_proj_bias"),  # Mamba, Zamba, Gated DeltaNet, KDA
    *("gk_proj.1.bias", "w_lora.lora.2.bias", "w_proj.linear.lora.2.bias"),  # GLA, RWKV-7, RWKV-6
    *("time_decay", "recurrent_param", "fgate_preact.bias"),  # RWKV-4, RecurrentGemma, xLSTM
)
"""How the parameters end that set how fast a state is forgotten."""

_NO_MATRIX = re.compile(r"(^|\.)(A_log|D|bonus|r_k|scale|query|\w+_ape|time_\w+)$")
"""Parameters of two axes and more that multiply or add elementwise, or are what others are compared with."""


def projects(model: nn.Module) -> set[str]:
    """Names of the parameters that are matrices: linear layers, experts, embeddings, adapters.

    The rest scale, shift or mix channels one by one: decay rates, D, norms, biases, convolutions, RWKV's
    mixing vectors, and what mamba-ssm marks `_no_weight_decay`.
    """
    found = set()
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        convolution = "conv" in type(owner).__name__.lower() and not isinstance(owner, Conv1D)
        if convolution or getattr(parameter, "_no_weight_decay", False):
            continue
        if "bias" in leaf or _NO_MATRIX.search(name):
            continue
        axes = sum(size > 1 for size in parameter.shape)
        if axes > 1 or isinstance(owner, nn.Linear | nn.Embedding | Conv1D):
            found.add(name)
    return found
