"""Rotary positions of attention (RoPE): which frequencies a model turns its keys by, and their scaling.

A model that reads past its training length T gives attention relative positions that it was never trained on.
Scaling brings the positions up to F T back into range, at the cost of resolution:

- `linear` divides every position by F (Chen et al. 2023, arXiv 2306.15595);
- `ntk` raises the base of the frequencies by F^(d / (d - 2)), so that the slowest pair of d turns F times
  slower and the fastest one as before (bloc97 2023; Peng et al. 2023, section 3.1);
- `yarn` divides the slow frequencies only, and sharpens attention (Peng et al. 2023, arXiv 2309.00071).

transformers computes the frequencies from `rope_parameters` of the config, so a scaled model is one whose
config says so, and loads everywhere.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longroll.errors import LongrollError, first_line
from longroll.families.fla_models.layers import Attention
from longroll.history import history

KINDS = ("linear", "ntk", "yarn")
MOST = 2.0**20
"""The largest factor."""
_SET = ("inv_freq", "original_inv_freq", "attention_scaling", "rope_type", "max_seq_len_cached")


@dataclass(frozen=True)
class RopeScaling:
    """A kind of scaling and its factor F: positions to F T come back into the range of training."""

    kind: str
    factor: float

    @classmethod
    def parse(cls, text: str) -> RopeScaling:
        """Read `yarn:4`.

        Raises:
            LongrollError: for another kind, and a factor that is not above 1 or above `MOST`.
        """
        kind, _, factor = text.partition(":")
        with contextlib.suppress(ValueError):
            if kind in KINDS and 1 < float(factor) <= MOST:
                return cls(kind, float(factor))
        raise LongrollError(
            f"`rope_scaling` {text}: give one of {', '.join(KINDS)} and a factor above 1, at most "
            f"{MOST:,.0f}, as yarn:4."
        )

    def __str__(self) -> str:
        return f"{self.kind}:{self.factor:g}"


def rope_frequencies(model: PreTrainedModel) -> Tensor | None:
    """Return radians a position of each pair of dimensions, (d / 2,) float64; None without rotary
    positions.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            exponents = torch.arange(0, module.size, 2, dtype=torch.float64) / module.size
            return 1.0 / module.base**exponents
    found = _rotary_modules(model)
    return found[0].inv_freq.detach().double().cpu() if found else None


def check_scalable(model: PreTrainedModel) -> None:
    """Refuse a model whose rotary positions cannot be scaled.

    Raises:
        LongrollError: for attention without rotary positions, positions that are scaled already, and
            positions that differ between kinds of layers.
    """
    name = model.config.model_type
    before = [run.get("rope_scaling") for run in history(model.config)]  # ntk leaves no other mark
    if any(before):
        done = ", ".join(str(scaling) for scaling in before if scaling)
        raise LongrollError(
            f"The rotary positions of this {name} are scaled already ({done}, by post-training): leave "
            "`rope_scaling` out, or begin from the model before."
        )
    if any(isinstance(module, Attention) for module in model.modules()):
        return
    found = _rotary_modules(model)
    several = any(
        name.endswith("_inv_freq") and not name.endswith(".original_inv_freq")
        for name, _ in model.named_buffers()
    )
    if several and not found:
        raise LongrollError(
            f"{name} has different rotary positions for different layers, which `rope_scaling` does not "
            "scale: leave it out."
        )
    if not found:
        raise LongrollError(
            f"{name} has no attention that reads a RoPE config, so its positions cannot be scaled: leave "
            "`rope_scaling` out."
        )
    kind = found[0].config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise LongrollError(
            f"The rotary positions of this {name} are scaled already ({kind}): leave `rope_scaling` out."
        )


def scale_rope(model: PreTrainedModel, scaling: RopeScaling, train_length: int) -> None:
    """Scale the rotary positions of `model` and say so in its config.

    Args:
        model: changed in place.
        scaling: kind and factor.
        train_length: T, up to which attention was trained.

    Raises:
        LongrollError: see `check_scalable`; and for fla's hybrids, whose config has a base and no scaling, if
            `scaling` is not ntk.
    """
    check_scalable(model)
    attention = [module for module in model.modules() if isinstance(module, Attention)]
    if attention:
        if scaling.kind != "ntk":
            raise LongrollError(
                f"`rope_scaling` {scaling}: the config of {model.config.model_type} has no word for it; it "
                f"has one for ntk:{scaling.factor:g}."
            )
        for module in attention:
            module.base = _raised(module.base, module.size, scaling.factor)
        model.config.attn = model.config.attn | {"rope_theta": attention[0].base}
        return
    modules = _rotary_modules(model)
    config, size = modules[0].config, 2 * len(modules[0].inv_freq)
    scaled = copy.copy(config)
    scaled.rope_parameters = config.rope_parameters | _entries(
        scaling, config.rope_parameters["rope_theta"], size, train_length
    )
    scaled.max_position_embeddings = round(scaling.factor * train_length)
    for module in modules:
        try:
            fresh = type(module)(scaled)
        except ValueError as error:  # RecurrentGemma's takes no kind but the default
            raise LongrollError(
                f"`rope_scaling` {scaling} cannot be had of {config.model_type}: {first_line(error)}"
            ) from error
        for name in _SET:
            if hasattr(fresh, name):
                value = getattr(fresh, name)
                setattr(
                    module, name, value.to(module.inv_freq.device) if isinstance(value, Tensor) else value
                )
    for name in ("rope_parameters", "max_position_embeddings"):
        setattr(config, name, getattr(scaled, name))


@contextlib.contextmanager
def scaled_rope(model: PreTrainedModel, scaling: RopeScaling, train_length: int) -> Iterator[None]:
    """`scale_rope` for the length of a with block."""
    attention = [module for module in model.modules() if isinstance(module, Attention)]
    modules = _rotary_modules(model)
    config = modules[0].config if modules else model.config
    held: list[tuple[Any, str, Any]] = [(module, "base", module.base) for module in attention]
    held += [(m, name, getattr(m, name)) for m in modules for name in _SET if hasattr(m, name)]
    kept = ("rope_parameters", "max_position_embeddings", "attn")
    held += [(config, name, getattr(config, name)) for name in kept if hasattr(config, name)]
    try:
        scale_rope(model, scaling, train_length)
        yield
    finally:
        for owner, name, value in held:
            setattr(owner, name, value)


def turn_keys(keys: Tensor, shift: Tensor | int, frequencies: Tensor) -> Tensor:
    """Move keys (..., tokens, D) by `shift` positions, one number or one for each token.

    The first 2 x len(frequencies) dimensions are turned, pairs being (i, i + half), as transformers and fla
    lay them out. Angles are float64.
    """
    angles = torch.as_tensor(shift, device=keys.device).double()[..., None] * frequencies.to(keys.device)
    cos, sin = angles.cos().to(keys.dtype), angles.sin().to(keys.dtype)
    half = len(frequencies)
    first, second, rest = keys.split((half, half, keys.shape[-1] - 2 * half), dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _rotary_modules(model: PreTrainedModel) -> list[Any]:
    """Return the modules of the text model that turn positions into angles by the config's
    `rope_parameters`.
    """
    text = model.config.get_text_config()
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "inv_freq", None), Tensor)
        and getattr(module, "config", None) is text
        and getattr(text, "rope_parameters", None)
    ]


def _entries(scaling: RopeScaling, base: float, size: int, train_length: int) -> dict[str, Any]:
    """Return the entries of `rope_parameters`, in transformers' words."""
    if scaling.kind == "ntk":  # transformers has only one that depends on the length read
        return {"rope_type": "default", "rope_theta": _raised(base, size, scaling.factor)}
    entries: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    return entries | ({"original_max_position_embeddings": train_length} if scaling.kind == "yarn" else {})


def _raised(base: float, size: int, factor: float) -> float:
    if size < 4:
        raise LongrollError(f"`rope_scaling` ntk: keys that turn {size} dimensions have one frequency only.")
    return base * factor ** (size / (size - 2))
