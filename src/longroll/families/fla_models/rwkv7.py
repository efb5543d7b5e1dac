"""RWKV-7 (arXiv 2503.14456): S_t = diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from longroll import ops
from longroll.errors import LongrollError
from longroll.families.fla_models.cache import FlaCache, LayerState
from longroll.families.fla_models.decoder import Decoder
from longroll.families.fla_models.layers import LoRA, activation, l2_norm, token_shift, unsupported
from longroll.families.fla_models.rwkv import (
    GroupNorm,
    RWKVBlock,
    RWKVCausalLM,
    RWKVConfig,
    channel_mix_size,
    places,
)

MIXES = "rwkvag"
SLOWEST = -0.6065306597126334
"""The logarithm of a decay is between this, -exp(-0.5), and 0."""


class RWKV7Config(RWKVConfig):
    """fla's `RWKV7Config`."""

    model_type = "rwkv7"

    hidden_ratio: float | None = 4
    head_dim: int = 64
    num_heads: int | None = None
    value_dim: int | list | None = None
    decay_low_rank_dim: int | None = 64
    gate_low_rank_dim: int | None = 128
    a_low_rank_dim: int | None = 64
    v_low_rank_dim: int | None = 16
    use_l2warp: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Spell out what follows from the other fields, as fla does."""
        super().__post_init__(**kwargs)
        if self.attn is not None:
            raise unsupported(self, "attn", "attention layers are not (nor does fla 0.6 run them)")
        if self.head_dim is None and self.num_heads is None:
            raise LongrollError("rwkv7 needs head_dim or num_heads in its config.")
        if self.num_heads is None:
            self.num_heads = self.hidden_size // self.head_dim
        self.head_dim = self.head_dim or self.hidden_size // self.num_heads
        if self.hidden_size % self.head_dim:
            raise unsupported(self, "head_dim", f"it must divide hidden_size = {self.hidden_size}")
        if not isinstance(self.value_dim, list):
            self.value_dim = [self.value_dim or self.hidden_size] * self.num_hidden_layers
        if set(self.value_dim) != {self.hidden_size}:
            raise unsupported(
                self, "value_dim", "it must be hidden_size (fla 0.6 builds nothing else either)"
            )


class RWKV7Attention(nn.Module):
    """fla/layers/rwkv7.py."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.layer, self.layers = layer, config.num_hidden_layers
        self.size = config.head_dim
        self.heads = hidden // self.size
        self.fuse_norm = config.fuse_norm
        for name in MIXES:
            setattr(self, f"x_{name}", nn.Parameter(torch.zeros(1, 1, hidden)))
        self.k_k = nn.Parameter(torch.zeros(hidden))
        self.k_a = nn.Parameter(torch.zeros(hidden))
        self.r_k = nn.Parameter(torch.zeros(self.heads, self.size))
        self.r_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        rank = _ranks(config)
        self.w_lora = LoRA(hidden, hidden, rank["decay"], activation=nn.Tanh())
        if layer != 0:
            self.v_lora = LoRA(hidden, hidden, rank["v"])
        self.a_lora = LoRA(hidden, hidden, rank["a"])
        self.g_lora = LoRA(hidden, hidden, rank["gate"], bias=False, activation=nn.Sigmoid())
        eps = config.group_norm_eps or self.size * config.norm_eps
        self.g_norm = GroupNorm(self.heads, hidden, eps=eps)

    def forward(self, x: Tensor, v_first: Tensor | None, state: LayerState) -> tuple[Tensor, Tensor]:
        """Return (B, T, hidden), the first layer's values -> (B, T, hidden), the first layer's values."""
        before = token_shift(x, state, 0)
        xr, xw, xk, xv, xa, xg = (x + before * getattr(self, f"x_{name}") for name in MIXES)
        r, k, v = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv)
        w = SLOWEST * self.w_lora(xw).sigmoid()
        if v_first is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, self.v_lora(xv).sigmoid())
        a, gate = self.a_lora(xa).sigmoid(), self.g_lora(xg)
        kk = (k * self.k_k).unflatten(-1, (self.heads, -1))
        kk = l2_norm(kk) if self.fuse_norm else F.normalize(kk, dim=-1)
        k = k + k * (a - 1) * self.k_a
        r, w, k, a, heads_v = (t.unflatten(-1, (self.heads, -1)) for t in (r, w, k, a, v))
        o = state.run(ops.rwkv7, r, w, k, heads_v, -kk, kk * a, lower_bound=SLOWEST)
        now = ((r * k * self.r_k).sum(-1, keepdim=True) * heads_v).flatten(-2)
        return self.o_proj((self.g_norm(o) + now) * gate), v_first

    @torch.no_grad()
    def reset(self) -> None:
        """fla's initial weights, BlinkDL's by origin (RWKV-LM, RWKV-v7/train_temp)."""
        depth, left = self.layer / max(self.layers - 1, 1), 1 - self.layer / self.layers
        place, linear = places(self.k_k), places(self.k_k, stop=1.0) - 0.5
        zigzag = 2 * places(self.k_k[: self.size], stop=1.0).repeat(self.heads) - 1
        zigzag = zigzag * zigzag.abs()
        for name, power in zip(MIXES, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            init.copy_(getattr(self, f"x_{name}"), (1 - place ** (power * left)).view(1, 1, -1))
        init.copy_(self.k_k, 0.71 - linear * 0.1)
        init.constant_(self.k_a, 1.02)
        init.constant_(self.r_k, -0.04)
        for lora in (module.lora for module in self.children() if isinstance(module, LoRA)):
            init.zeros_(lora[0].weight)
            size_out, rank = lora[2].weight.shape
            init.orthogonal_(lora[2].weight, gain=0.1 * max(1, (rank / size_out) ** 0.5))
        init.copy_(self.w_lora.lora[2].bias, -5.5 + 6 * (linear + 0.5) ** (1 + depth**0.3) + zigzag * 2.5)
        init.copy_(self.a_lora.lora[2].bias, -0.19 + zigzag * 0.3 + linear * 0.4)
        if self.layer != 0:
            init.copy_(self.v_lora.lora[2].bias, 0.73 - linear * 0.4)
        init.constant_(self.g_norm.weight, ((self.layer + 1) / self.layers) ** 0.7)
        init.orthogonal_(self.r_proj.weight)
        init.orthogonal_(self.k_proj.weight, gain=0.1)
        init.orthogonal_(self.v_proj.weight)
        init.zeros_(self.o_proj.weight)


def _ranks(config: RWKV7Config) -> dict[str, int]:
    """Return ranks of the LoRAs; what the config leaves out follows from the sizes."""
    root, factor = config.hidden_size**0.5, config.head_dim / 64
    guess = {
        "decay": 2.5 * root * factor,
        "gate": 5 * root,
        "a": 2.5 * root * factor,
        "v": 1.7 * root * factor,
    }
    given = {name: getattr(config, f"{name}_low_rank_dim") for name in guess}
    return {name: given[name] or max(32, round(size / 32) * 32) for name, size in guess.items()}


class RWKV7FeedForward(nn.Module):
    """The channel mix."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        self.left = 1 - layer / config.num_hidden_layers
        size = channel_mix_size(config, 4)
        self.x_k = nn.Parameter(torch.zeros(config.hidden_size))
        self.key = nn.Linear(config.hidden_size, size, bias=False)
        self.value = nn.Linear(size, config.hidden_size, bias=False)
        self.activation = activation(config, "hidden_act")

    def forward(self, x: Tensor, state: LayerState) -> Tensor:
        """Return (B, T, hidden) -> (B, T, hidden)."""
        return self.value(self.activation(self.key(x + token_shift(x, state, 1) * self.x_k)))

    @torch.no_grad()
    def reset(self) -> None:
        """fla's initial weights."""
        init.copy_(self.x_k, 1 - places(self.x_k) ** (self.left**4))
        init.orthogonal_(self.key.weight)
        init.zeros_(self.value.weight)


class RWKV7Block(RWKVBlock):
    """A block of RWKV-7."""

    time_mix = RWKV7Attention
    channel_mix = RWKV7FeedForward

    def forward(
        self, x: Tensor, v_first: Tensor | None, past_key_values: FlaCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (B, T, hidden), the first layer's values -> (B, T, hidden), the first layer's values."""
        state = LayerState(past_key_values, self.layer_idx)
        x = self.pre_norm(x)
        mixed, v_first = self.attn(self.attn_norm(x), v_first, state)
        x = x + mixed
        return x + self.ffn(self.ffn_norm(x), state), v_first


class RWKV7Model(Decoder):
    """fla's `RWKV7Model`."""

    config_class = RWKV7Config
    block = RWKV7Block

    def blocks(self, x: Tensor, cache: FlaCache | None) -> Tensor:
        """Run the blocks; the first one's values go into all."""
        v_first = None
        for layer in self.layers:
            x, v_first = layer(x, v_first, past_key_values=cache)
        return x

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -1e-4, 1e-4)
        elif isinstance(module, RWKV7Attention | RWKV7FeedForward):
            module.reset()


class RWKV7ForCausalLM(RWKVCausalLM):
    """fla's `RWKV7ForCausalLM`."""

    config_class = RWKV7Config
    decoder = RWKV7Model
