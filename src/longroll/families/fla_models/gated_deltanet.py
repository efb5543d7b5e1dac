"""Gated DeltaNet (arXiv 2412.06464): S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from longroll import ops
from longroll.families.fla_models.cache import LayerState
from longroll.families.fla_models.decoder import Block, CausalLM, Decoder, FlaConfig
from longroll.families.fla_models.layers import QKV, GatedRMSNorm, RMSNorm, l2_norm, unsupported


class GatedDeltaNetConfig(FlaConfig):
    """fla's `GatedDeltaNetConfig`."""

    model_type = "gated_deltanet"

    num_hidden_layers: int = 21
    expand_v: float = 2.0
    head_dim: int = 256
    num_heads: int = 6
    num_v_heads: int | None = None
    use_gate: bool = True
    output_gate_activation: str = "swish"
    use_short_conv: bool = True
    conv_size: int = 4
    allow_neg_eigval: bool = False


class GatedDeltaNet(QKV):
    """fla/layers/gated_deltanet.py."""

    def __init__(self, config: GatedDeltaNetConfig, layer: int) -> None:
        if config.output_gate_activation not in ("swish", "silu", "sigmoid"):
            raise unsupported(config, "output_gate_activation", "known are swish, silu, sigmoid")
        hidden, heads, v_heads = config.hidden_size, config.num_heads, config.num_v_heads or config.num_heads
        self_v = config.head_dim * config.expand_v
        if not math.isclose(self_v, round(self_v)):
            raise unsupported(config, "expand_v", f"heads would have size {self_v}")
        if v_heads % heads:
            raise unsupported(config, "num_v_heads", f"it must be a multiple of num_heads = {heads}")
        value_dim = v_heads * round(self_v)
        super().__init__(
            hidden,
            (heads * config.head_dim, heads * config.head_dim, value_dim),
            config.conv_size if config.use_short_conv else None,
        )
        self.k_size, self.v_size, self.groups = config.head_dim, round(self_v), v_heads // heads
        self.beta_range = 2.0 if config.allow_neg_eigval else 1.0
        self.a_proj = nn.Linear(hidden, v_heads, bias=False)
        self.b_proj = nn.Linear(hidden, v_heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(v_heads))
        self.dt_bias = nn.Parameter(torch.zeros(v_heads))
        self.g_proj = nn.Linear(hidden, value_dim, bias=False) if config.use_gate else None
        self.o_norm: nn.Module
        if config.use_gate:
            self.o_norm = GatedRMSNorm(
                self.v_size, eps=config.norm_eps, activation=config.output_gate_activation
            )
        else:
            self.o_norm = RMSNorm(self.v_size, eps=config.norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden, bias=False)

    def forward(self, x: Tensor, state: LayerState) -> Tensor:
        """Return (B, T, hidden) -> (B, T, hidden)."""
        q, k, v = self.qkv(x, state)
        if not self.convolves:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k = (
            l2_norm(t.unflatten(-1, (-1, self.k_size))).repeat_interleave(self.groups, dim=-2) for t in (q, k)
        )
        v = v.unflatten(-1, (-1, self.v_size))
        wide = torch.promote_types(x.dtype, torch.float32)  # fla's kernel makes the decay in float32
        g = -self.A_log.to(wide).exp() * F.softplus(self.a_proj(x).to(wide) + self.dt_bias.to(wide))
        beta = self.b_proj(x).to(wide).sigmoid() * self.beta_range
        o = state.run(ops.gated_delta_rule, q, k, v, g, beta)
        if self.g_proj is None:
            o = self.o_norm(o)
        else:
            o = self.o_norm(o, self.g_proj(x).unflatten(-1, (-1, self.v_size)))
        return self.o_proj(o.flatten(-2))


class GatedDeltaNetBlock(Block):
    """A block of Gated DeltaNet."""

    mixer = GatedDeltaNet


class GatedDeltaNetModel(Decoder):
    """fla's `GatedDeltaNetModel`."""

    config_class = GatedDeltaNetConfig
    block = GatedDeltaNetBlock

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GatedDeltaNet):
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(0, 16).log())
            dt = torch.empty_like(module.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


class GatedDeltaNetForCausalLM(CausalLM):
    """fla's `GatedDeltaNetForCausalLM`."""

    config_class = GatedDeltaNetConfig
    decoder = GatedDeltaNetModel
