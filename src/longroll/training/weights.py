"""The weights of a run: which of them are matrices, which are decays, and in what precision each is held."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from longroll.errors import LongrollError
from longroll.families.int8 import holds_int8

logger = logging.getLogger("longroll")

WEIGHTS = ("float32", "bf16")
"""How the weights that are trained can be held."""

TRAINABLE = {"all": "all weights", "scales": "all but the matrices", "decays": "the decays"}
"""Which parameters a run can train, in words: all, all but the matrices (`projects`), or `DECAYS`."""

DECAYS = (
    *("A_log", "dt_bias", "dt_proj.bias", "dt_proj_bias"),  # Mamba, Zamba, Gated DeltaNet, KDA
    *("gk_proj.1.bias", "w_lora.lora.2.bias", "w_proj.linear.lora.2.bias"),  # GLA, RWKV-7, RWKV-6
    *("time_decay", "recurrent_param", "fgate_preact.bias"),  # RWKV-4, RecurrentGemma, xLSTM
)
"""How the parameters end that set how fast a state is forgotten."""

_NO_MATRIX = re.compile(r"(^|\.)(A_log|D|bonus|r_k|scale|query|\w+_ape|time_\w+)$")
"""Parameters of two axes and more that multiply or add elementwise, or are what others are compared with."""


def projects(model: nn.Module) -> set[str]:
    """Return names of the parameters that are matrices: linear layers, experts, embeddings, adapters.

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


def train_only(model: nn.Module, what: str) -> list[nn.Parameter]:
    """Freeze what a run does not train, and return the parameters that were frozen by it.

    Raises:
        LongrollError: as `not_trained`.
    """
    frozen = not_trained(model, what)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def not_trained(model: nn.Module, what: str) -> list[nn.Parameter]:
    """Return the parameters that a run has to freeze.

    Args:
        model: its parameters that are frozen already are left out.
        what: one of `TRAINABLE`.

    Raises:
        LongrollError: for another word, and a model of whose parameters none would be trained.
    """
    if what not in TRAINABLE:
        raise LongrollError(f"`trainable` {what} is not one of {', '.join(TRAINABLE)}.")
    open_ = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = projects(model) if what == "scales" else set()
    kept = {name for name in open_ if what != "decays" or name.endswith(DECAYS)} - matrices
    if not kept:
        raise LongrollError(
            f"`trainable` {what}: the model has no such parameter that is not frozen: take all."
        )
    return [p for name, p in open_.items() if name not in kept]


def trained_decays(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of `DECAYS` that are not frozen."""
    return [p for name, p in model.named_parameters() if p.requires_grad and name.endswith(DECAYS)]


def check_decay_speed(speed: float, model: nn.Module, *, frozen: bool = False) -> None:
    """Refuse a decay speed where no decay is trained.

    Args:
        speed: learning rate of the decays as a multiple of the others'.
        model: a transformers model.
        frozen: whether the weights of the model will be frozen, as under new adapters.

    Raises:
        LongrollError: for any speed but 1.
    """
    if speed != 1 and (frozen or not trained_decays(model)):
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise LongrollError(
            f"`decay_speed`: no parameter that is trained sets how fast {kind} forgets; LoRA leaves those as "
            "they are. Leave it out."
        )


def trained_parameters(model: nn.Module, what: str) -> str:
    """Return a sentence that says how many parameters a run trains, and which.

    Args:
        model: after `train_only`, and with its adapters.
        what: one of `TRAINABLE`.
    """
    sizes = {name: (p.numel(), p.requires_grad) for name, p in model.named_parameters()}
    total = sum(size for size, _ in sizes.values())
    trained = sum(size for size, is_trained in sizes.values() if is_trained)
    if trained == total:
        return f"Trains all {total:,} parameters."
    counted = f"Trains {trained:,} of {total:,} parameters"
    if any("lora_" in name for name in sizes):
        return f"{counted}: adapters."
    if what == "scales":
        return (
            f"{counted}: {TRAINABLE[what]}, which repairs the states and teaches no new text; "
            "`trainable` all teaches it."
        )
    return f"{counted}{f': {TRAINABLE[what]}' if what == 'decays' else ''}."


def in_16_bits(parameter: torch.Tensor) -> bool:
    """Return whether a tensor is bfloat16 or float16."""
    return parameter.dtype in (torch.bfloat16, torch.float16)


def widen(model: nn.Module) -> None:
    """Hold parameters that are in 16 bits in float32; the base of adapters, which cast, stays as it is.

    AdamW's updates are smaller than 16 bits can add: 1/256 of a weight in bfloat16, 1/2048 in float16.
    Frozen matrices are widened too: without autocast nothing multiplies them by wider activations.
    """
    whole = not hasattr(model, "peft_config")
    for parameter in model.parameters():
        if in_16_bits(parameter) and (whole or parameter.requires_grad):
            parameter.data = parameter.data.float()


def set_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the matrices in `dtype` and the other parameters, few and small, in float32 or wider."""
    matrices = projects(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            narrow = name in matrices or dtype.itemsize > 4
            parameter.data = parameter.data.to(dtype if narrow else torch.float32)


@contextlib.contextmanager
def precision(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """`set_precision`, undone at the end."""
    wide = {parameter: parameter.data for parameter in model.parameters()}
    try:
        set_precision(model, dtype)
        yield
    finally:
        for parameter, data in wide.items():
            parameter.data = data


def hold_weights(model: nn.Module, args: Any, weights: str) -> torch.dtype | None:
    """Hold what is trained as `weights` says, under autocast where that is narrower than the weights.

    `float32` widens parameters that are in 16 bits; the base of adapters stays as it is. `bf16`
    keeps matrices in bfloat16 and all else in float32.

    Args:
        model: what is trained.
        args: transformers' TrainingArguments, whose `bf16` may be turned on; None: as they are by default.
        weights: one of `WEIGHTS`.

    Returns:
        The 16-bit dtype that the trained matrices had before, None for any other.

    Raises:
        LongrollError: for another word, for bf16 with fp16's gradient scaling, and for a model in 8 bits
            without adapters.
    """
    if weights not in WEIGHTS:
        raise LongrollError(f"`weights` {weights} is not one of {', '.join(WEIGHTS)}.")
    if holds_int8(model) and not hasattr(model, "peft_config"):
        raise LongrollError("`dtype` int8: such a model trains by adapters alone: wrap it with peft's LoRA.")
    before = next((p.dtype for p in model.parameters() if p.requires_grad and in_16_bits(p)), None)
    if weights == "bf16":
        if args is not None and args.fp16:
            raise LongrollError("`weights` bf16 does not go with fp16: leave one of them out.")
        set_precision(model, torch.bfloat16)
        saved = 2 * sum(p.numel() for p in model.parameters() if in_16_bits(p)) / 2**30
        logger.warning(
            "`weights` bf16: updates below 1/256 of a weight are lost in the matrices, so they learn less at "
            "the same learning rate; it saves %.2f GiB of weights, and as much of gradients.",
            saved,
        )
        _autocast(args)
    elif before is not None:
        widen(model)
        if has_bf16(next(model.parameters()).device if args is None else args.device):
            _autocast(args)
    return before


def has_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 faster than float32: GPUs from Ampere on."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _autocast(args: Any) -> None:
    """Set what `TrainingArguments(bf16=True)` sets, where no other precision is asked for."""
    if args is not None and args.mixed_precision == "no":
        args.bf16, args.mixed_precision = True, "bf16"
