"""RWKV-6 (arXiv 2404.05892): S_t = diag(w_t) S_{t-1} + k_t v_t^T, read with a bonus for the token itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from longroll import ops
from longroll.families.fla.cache import FlaCache, LayerState
from longroll.families.fla.decoder import CausalLM, Decoder
from longroll.families.fla.layers import LoRA, activation, head_size, token_shift
from longroll.families.fla.rwkv import GroupNorm, RWKVBlock, RWKVConfig, channel_mix_size


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
    """A linear layer behind a token shift: x + mu * (the input before - x), mu a weight or given."""

    def __init__(self, size_in: int, size_out: int, *, rank: int | None = None, own_mu: bool = False) -> None:
        super().__init__()
        self.linear: nn.Module
        if rank is None:
            self.linear = nn.Linear(size_in, size_out, bias=False)
        else:
            self.linear = LoRA(size_in, size_out, rank, activation=nn.Tanh())
        self.mu = nn.Parameter(torch.zeros(size_in)) if own_mu else None

    def forward(self, x: Tensor, before: Tensor, mu: Tensor | None = None) -> Tensor:
        """(B, T, size_in) -> (B, T, size_out); `before` is what `token_shift` gives."""
        return self.linear(x + before * (self.mu if mu is None else mu))


class RWKV6Attention(nn.Module):
    """fla/layers/rwkv6.py."""

    def __init__(self, config: RWKV6Config, layer: int) -> None:
        super().__init__()
        hidden, self.heads = config.hidden_size, config.num_heads
        self_k, self_v = head_size(config, "expand_k"), head_size(config, "expand_v")
        key_dim, value_dim = self.heads * self_k, self.heads * self_v
        rank = config.proj_low_rank_dim
        self.x_proj = nn.Sequential(
            LerpLinear(hidden, 5 * rank, own_mu=True), nn.Tanh(), nn.Linear(5 * rank, hidden, bias=False)
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
        """(B, T, hidden) -> (B, T, hidden)."""
        before = token_shift(x, state, 0)
        first, _, last = self.x_proj
        inner = first(x, before).tanh().unflatten(-1, (5, -1))  # (B, T, 5, rank)
        mus = torch.einsum("btnr,hnr->nbth", inner, last.weight.unflatten(-1, (5, -1)))
        r, w, k, v, gate = (
            project(x, before, mu + bias)
            for project, mu, bias in zip(
                (self.r_proj, self.w_proj, self.k_proj, self.v_proj, self.g_proj), mus, self.x_bias, strict=True
            )
        )
        r, w, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (r, w, k, v))
        initial = state.read("recurrent")
        o, final = ops.rwkv6(
            r, k, v, -w.exp(), self.bonus, scale=1.0, initial_state=initial, output_final_state=True
        )
        state.keep("recurrent", final)
        return self.o_proj(self.g_norm(o) * F.silu(gate))


class RWKV6FeedForward(nn.Module):
    """The channel mix."""

    def __init__(self, config: RWKV6Config, layer: int) -> None:
        super().__init__()
        hidden, size = config.hidden_size, channel_mix_size(config, 3.5)
        self.key = LerpLinear(hidden, size, own_mu=True)
        self.value = nn.Linear(size, hidden, bias=False)
        self.receptance = LerpLinear(hidden, hidden, own_mu=True)
        self.activation = activation(config, "hidden_act")

    def forward(self, x: Tensor, state: LayerState) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        before = token_shift(x, state, 1)
        return self.receptance(x, before).sigmoid() * self.value(self.activation(self.key(x, before)))


class RWKV6Block(RWKVBlock):
    """A block of RWKV-6."""

    time_mix = RWKV6Attention
    channel_mix = RWKV6FeedForward

    def forward(self, x: Tensor, past_key_values: FlaCache | None = None) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
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
        if isinstance(module, RWKV6Attention):
            for inner in module.modules():
                if isinstance(inner, nn.Linear):
                    init.xavier_uniform_(inner.weight, gain=2**-2.5)
            init.zeros_(module.w_proj.linear.lora[0].weight)
            init.orthogonal_(module.w_proj.linear.lora[2].weight, gain=0.1)


class RWKV6ForCausalLM(CausalLM):
    """fla's `RWKV6ForCausalLM`."""

    config_class = RWKV6Config
    decoder = RWKV6Model
