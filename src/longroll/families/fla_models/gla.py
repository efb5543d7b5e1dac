"""Gated Linear Attention (arXiv 2312.06635): S_t = diag(a_t) S_{t-1} + k_t v_t^T, one decay for each
channel.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from longroll import ops
from longroll.families.fla_models.cache import LayerState
from longroll.families.fla_models.decoder import Block, CausalLM, Decoder, FlaConfig
from longroll.families.fla_models.layers import ACTIVATIONS, GatedHeads

GATE_RANK, GATE_NORMALIZER = 16, 16


class GLAConfig(FlaConfig):
    """fla's `GLAConfig`."""

    model_type = "gla"

    expand_k: float = 0.5
    expand_v: float = 1.0
    num_heads: int = 4
    num_kv_heads: int | None = None
    feature_map: str | None = None
    use_short_conv: bool = False
    conv_size: int = 4
    use_output_gate: bool = True
    clamp_min: float | None = None
    elementwise_affine: bool = True
    use_gk: bool = True
    use_gv: bool = False


class GatedLinearAttention(GatedHeads):
    """fla/layers/gla.py."""

    def __init__(self, config: GLAConfig, layer: int) -> None:
        conv = config.conv_size if config.use_short_conv else None
        super().__init__(config, conv=conv, activations=ACTIVATIONS)
        self.clamp_min = config.clamp_min
        self.gk_proj = nn.Sequential(
            nn.Linear(config.hidden_size, GATE_RANK, bias=False),
            nn.Linear(GATE_RANK, config.num_heads // self.groups * self.k_size),
        )

    def forward(self, x: Tensor, state: LayerState) -> Tensor:
        """Return (B, T, hidden) -> (B, T, hidden)."""
        q, k, v = self.qkv(x, state)
        q = q.unflatten(-1, (-1, self.k_size))
        k, v = self.grouped(k, self.k_size), self.grouped(v, self.v_size)
        g = F.logsigmoid(self.grouped(self.gk_proj(x), self.k_size)) / GATE_NORMALIZER
        if self.clamp_min is not None:
            g = g.clamp_min(self.clamp_min)
        if self.feature_map is not None:
            q, k = self.feature_map(q), self.feature_map(k)
        return self.output(state.run(ops.gla, q, k, v, g), x)


class GLABlock(Block):
    """A block of GLA."""

    mixer = GatedLinearAttention


class GLAModel(Decoder):
    """fla's `GLAModel`."""

    config_class = GLAConfig
    block = GLABlock


class GLAForCausalLM(CausalLM):
    """fla's `GLAForCausalLM`."""

    config_class = GLAConfig
    decoder = GLAModel
