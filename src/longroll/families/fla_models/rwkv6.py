"""RWKV-6 (arXiv 2404.05892): S_t = diag(w_t) S_{t-1} + k_t v_t^T, read with a bonus for the token itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from longroll import ops
from longroll.families.fla_models.cache import FlaCache, LayerState
from longroll.families.fla_models.decoder import Decoder
from longroll.families.fla_models.layers import LoRA, activation, head_size, token_shift
from longroll.families.fla_models.rwkv import (
    GroupNorm,
    RWKVBlock,
    RWKVCausalLM,
    RWKVConfig,
    channel_mix_size,
    places,
)


class RWKV6Config(RWKVConfig):
    """fla's `RWKV6Config`."""

    model_type = "rwkv6"

    hidden_ratio: float | None = 3.5
    expand_k: float = 0.5
    expand_v: float = 1.0
    num_heads: int = 4
    proj_low_rank_dim: int = 32
    gate_low_rank_dim: int = 64


class LerpLinear(nn.Module):
    """A linear layer behind a token shift: x + mu * (the input before - x).

    Args:
        size_in, size_out: sizes of the layer.
        rank: the rank of a LoRA in its place.
        power: mu is a weight, at first 1 - (channel / size_in)^power; None: mu is given to `forward`.
    """

    linear: Any
    mu: Any

    def __init__(
        self, size_in: int, size_out: int, *, rank: int | None = None, power: float | None = None
    ) -> None:
        super().__init__()
        if rank is None:
            self.linear = nn.Linear(size_in, size_out, bias=False)
        else:
            self.linear = LoRA(size_in, size_out, rank, activation=nn.Tanh())
        self.power = power
        self.mu = None if power is None else nn.Parameter(torch.zeros(size_in))

    def forward(self, x: Tensor, before: Tensor, mu: Tensor | None = None) -> Tensor:
        """Return (B, T, size_in) -> (B, T, size_out); `before` is what `token_shift` gives."""
        return self.linear(x + before * (self.mu if mu is None else mu))

    @torch.no_grad()
    def reset(self) -> None:
        """Initial mu."""
        if self.power is not None:
            init.copy_(self.mu, 1 - places(self.mu) ** self.power)


class RWKV6Attention(nn.Module):
    """fla/layers/rwkv6.py."""

    x_proj: Any

    def __init__(self, config: RWKV6Config, layer: int) -> None:
        super().__init__()
        self.layer, self.layers = layer, config.num_hidden_layers
        hidden, self.heads = config.hidden_size, config.num_heads
        self_k, self_v = head_size(config, "expand_k"), head_size(config, "expand_v")
        key_dim, value_dim = self.heads * self_k, self.heads * self_v
        rank = config.proj_low_rank_dim
        self.x_proj = nn.Sequential(
            LerpLinear(hidden, 5 * rank, power=1 - layer / self.layers),
            nn.Tanh(),
            nn.Linear(5 * rank, hidden, bias=False),
        )
        self.x_bias = nn.Parameter(torch.zeros(5, hidden))
        self.r_proj = LerpLinear(hidden, key_dim)
        self.w_proj = LerpLinear(hidden, key_dim, rank=config.gate_low_rank_dim)
        self.k_proj = LerpLinear(hidden, key_dim)
        self.v_proj = LerpLinear(hidden, value_dim)
        self.g_proj = LerpLinear(hidden, value_dim)
        self.bonus = nn.Parameter(torch.zeros(self.heads, self_k))
        self.g_norm = GroupNorm(self.heads, value_dim, eps=config.group_norm_eps or config.norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden, bias=False)

    def forward(self, x: Tensor, state: LayerState) -> Tensor:
        """Return (B, T, hidden) -> (B, T, hidden)."""
        before = token_shift(x, state, 0)
        first, _, last = self.x_proj
        inner = first(x, before).tanh().unflatten(-1, (5, -1))  # (B, T, 5, rank)
        mus = torch.einsum("btnr,hnr->nbth", inner, last.weight.unflatten(-1, (5, -1)))
        r, w, k, v, gate = (
            project(x, before, mu + bias)
            for project, mu, bias in zip(
                (self.r_proj, self.w_proj, self.k_proj, self.v_proj, self.g_proj),
                mus,
                self.x_bias,
                strict=True,
            )
        )
        r, w, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (r, w, k, v))
        o = state.run(ops.rwkv6, r, k, v, -w.exp(), self.bonus, scale=1.0)
        return self.o_proj(self.g_norm(o) * F.silu(gate))

    @torch.no_grad()
    def reset(self) -> None:
        """BlinkDL's initial weights (RWKV-LM, RWKV-v5/src/model.py); fla's leave shifts and decays at 0."""
        depth, left = self.layer / max(self.layers - 1, 1), 1 - self.layer / self.layers
        place, height = places(self.x_bias[0]), places(self.bonus.flatten(), stop=1.0)
        shift, half = 1 - place**left, 1 - place ** (0.5 * left)
        first, _, last = self.x_proj
        init.copy_(self.x_bias, torch.stack([half, shift, shift, shift - 0.3 * depth, half]))
        init.zeros_(first.linear.weight)
        init.uniform_(last.weight, -0.01, 0.01)
        inner, _, outer = self.w_proj.linear.lora
        init.zeros_(inner.weight)
        init.uniform_(outer.weight, -0.01, 0.01)
        init.copy_(outer.bias, -6 + 5 * height ** (0.7 + 1.3 * depth))
        zigzag = (torch.arange(len(height), device=height.device) + 1) % 3 - 1
        bonus = depth * (1 - height) + zigzag * 0.1
        init.copy_(self.bonus, bonus.view_as(self.bonus))
        init.constant_(self.g_norm.weight, ((self.layer + 1) / self.layers) ** 0.7)
        for projection, gain in ((self.r_proj, 1), (self.k_proj, 0.1), (self.v_proj, 1), (self.g_proj, 0.1)):
            init.orthogonal_(projection.linear.weight, gain=gain)
        init.zeros_(self.o_proj.weight)


class RWKV6FeedForward(nn.Module):
    """The channel mix."""

    def __init__(self, config: RWKV6Config, layer: int) -> None:
        super().__init__()
        hidden, size = config.hidden_size, channel_mix_size(config, 3.5)
        power = 1 - layer / config.num_hidden_layers
        self.key = LerpLinear(hidden, size, power=power)
        self.value = nn.Linear(size, hidden, bias=False)
        self.receptance = LerpLinear(hidden, hidden, power=power)
        self.activation = activation(config, "hidden_act")

    def forward(self, x: Tensor, state: LayerState) -> Tensor:
        """Return (B, T, hidden) -> (B, T, hidden)."""
        before = token_shift(x, state, 1)
        return self.receptance(x, before).sigmoid() * self.value(self.activation(self.key(x, before)))


class RWKV6Block(RWKVBlock):
    """A block of RWKV-6."""

    time_mix = RWKV6Attention
    channel_mix = RWKV6FeedForward

    def forward(self, x: Tensor, past_key_values: FlaCache | None = None) -> Tensor:
        """Return (B, T, hidden) -> (B, T, hidden)."""
        state = LayerState(past_key_values, self.layer_idx)
        x = self.pre_norm(x)
        x = x + self.attn(self.attn_norm(x), state)
        return x + self.ffn(self.ffn_norm(x), state)


class RWKV6Model(Decoder):
    """fla's `RWKV6Model`."""

    config_class = RWKV6Config
    block = RWKV6Block

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -1e-4, 1e-4)
        elif isinstance(module, RWKV6Attention | LerpLinear):
            module.reset()


class RWKV6ForCausalLM(RWKVCausalLM):
    """fla's `RWKV6ForCausalLM`."""

    config_class = RWKV6Config
    decoder = RWKV6Model
