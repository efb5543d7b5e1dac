"""What RWKV-6 and RWKV-7 share: LayerNorm, token shifts, and a channel mix in the place of an MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from longroll.families.fla_models.decoder import CausalLM, FlaConfig, mixer_of, norm_of


class RWKVConfig(FlaConfig):
    """The fields that both have, with fla's defaults, and one that fla lacks."""

    hidden_act: str = "sqrelu"
    norm_first: bool = True
    norm_bias: bool = True
    norm_eps: float = 1e-5
    group_norm_eps: float | None = None
    """Epsilon of the norm after the recurrence; None is fla's. BlinkDL's is 64e-5 at every size."""


class RWKVBlock(GradientCheckpointingLayer):
    """Time mix and channel mix, each behind its norm."""

    _can_checkpoint_with_cache = True  # as Block
    time_mix: type[nn.Module]
    channel_mix: type[nn.Module]

    def __init__(self, config: RWKVConfig, layer: int) -> None:
        super().__init__()
        self.layer_idx = layer
        self.pre_norm = norm_of(config) if config.norm_first and layer == 0 else nn.Identity()
        self.attn_norm = norm_of(config)
        self.attn = mixer_of(config, layer, self.time_mix)
        self.ffn_norm = norm_of(config)
        self.ffn = self.channel_mix(config, layer)


class RWKVCausalLM(CausalLM):
    """A decoder with a head that starts larger than others'."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.lm_head:
            spread = max(1, self.config.vocab_size / self.config.hidden_size)
            init.orthogonal_(module.weight, gain=0.5 * spread**0.5)


def places(like: Tensor, *, stop: float | None = None) -> Tensor:
    """Return where each channel of `like` (C,) stands, from 0 to 1 (excluded), or to `stop`, for initial
    weights.
    """
    count = len(like)
    last = (count - 1) / count if stop is None else stop
    return torch.linspace(0, last, count, device=like.device)


def channel_mix_size(config: RWKVConfig, default_ratio: float) -> int:
    """Return inner size of the channel mix: a multiple of 32."""
    if config.intermediate_size is not None:
        return config.intermediate_size
    ratio = default_ratio if config.hidden_ratio is None else config.hidden_ratio
    return 32 * -(-int(config.hidden_size * ratio) // 32)


class GroupNorm(nn.GroupNorm):
    """A norm for every head."""

    def forward(self, o: Tensor) -> Tensor:
        """Return (B, T, H, V) -> (B, T, H * V)."""
        flat = o.flatten(-2)
        return super().forward(flat.flatten(0, 1)).view(flat.shape)
