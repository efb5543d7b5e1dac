"""DeltaNet (arXiv 2406.06484): S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longroll import ops
from longroll.families.fla_models.cache import LayerState
from longroll.families.fla_models.decoder import Block, CausalLM, Decoder, FlaConfig
from longroll.families.fla_models.layers import QKV, GatedRMSNorm, RMSNorm, head_size, l2_norm, unsupported

_QK_ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "elu": lambda x: torch.where(x >= 0, x + 1, x.clamp_max(0).exp()),
    "identity": lambda x: x,
}


class DeltaNetConfig(FlaConfig):
    """fla's `DeltaNetConfig`."""

    model_type = "delta_net"

    expand_k: float = 1.0
    expand_v: float = 1.0
    num_heads: int = 16
    use_gate: bool = False
    use_short_conv: bool = True
    conv_size: int = 4
    use_beta: bool = True
    allow_neg_eigval: bool = False
    use_output_norm: bool = True
    qk_norm: str = "l2"
    qk_activation: str = "silu"


class DeltaNet(QKV):
    """fla/layers/delta_net.py."""

    def __init__(self, config: DeltaNetConfig, layer: int) -> None:
        if config.qk_activation not in _QK_ACTIVATIONS:
            raise unsupported(config, "qk_activation", f"known are {', '.join(_QK_ACTIVATIONS)}")
        if config.qk_norm not in ("l2", "sum"):
            raise unsupported(config, "qk_norm", "known are l2, sum")
        heads, hidden = config.num_heads, config.hidden_size
        self_k, self_v = head_size(config, "expand_k"), head_size(config, "expand_v")
        in_conv = config.use_short_conv and config.qk_activation == "silu"
        super().__init__(
            hidden,
            (heads * self_k, heads * self_k, heads * self_v),
            config.conv_size if config.use_short_conv else None,
            "silu" if in_conv else None,
        )
        self.k_size, self.v_size = self_k, self_v
        self.qk_activation = _QK_ACTIVATIONS["identity" if in_conv else config.qk_activation]
        self.qk_norm = config.qk_norm
        self.beta_range = 2.0 if config.allow_neg_eigval else 1.0
        self.b_proj = nn.Linear(hidden, heads, bias=False) if config.use_beta else None
        self.g_proj = nn.Linear(hidden, heads * self_v, bias=False) if config.use_gate else None
        norm = GatedRMSNorm if config.use_gate else RMSNorm
        self.o_norm = norm(self_v, eps=config.norm_eps)
        self.o_proj = nn.Linear(heads * self_v, hidden, bias=False)

    def forward(self, x: Tensor, state: LayerState) -> Tensor:
        """Return (B, T, hidden) -> (B, T, hidden)."""
        q, k, v = self.qkv(x, state)
        if not self.convolves:
            v = F.silu(v)
        q, k = (self._normed(self.qk_activation(t).unflatten(-1, (-1, self.k_size))) for t in (q, k))
        v = v.unflatten(-1, (-1, self.v_size))
        beta = torch.ones_like(q[..., 0]) if self.b_proj is None else self.b_proj(x).sigmoid()
        o = state.run(ops.delta_rule, q, k, v, beta * self.beta_range)
        if self.g_proj is None:
            o = self.o_norm(o)
        else:
            o = self.o_norm(o, self.g_proj(x).unflatten(-1, (-1, self.v_size)))
        return self.o_proj(o.flatten(-2))

    def _normed(self, x: Tensor) -> Tensor:
        return l2_norm(x) if self.qk_norm == "l2" else F.normalize(x, p=1, dim=-1, eps=1e-6)


class DeltaNetBlock(Block):
    """A block of DeltaNet."""

    mixer = DeltaNet


class DeltaNetModel(Decoder):
    """fla's `DeltaNetModel`."""

    config_class = DeltaNetConfig
    block = DeltaNetBlock


class DeltaNetForCausalLM(CausalLM):
    """fla's `DeltaNetForCausalLM`."""

    config_class = DeltaNetConfig
    decoder = DeltaNetModel
