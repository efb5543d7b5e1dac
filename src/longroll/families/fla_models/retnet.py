"""RetNet (arXiv 2307.08621): S_t = a S_{t-1} + k_t v_t^T, a fixed decay for every head, rotary positions."""

from __future__ import annotations

from torch import Tensor
from transformers.activations import ACT2FN

from longroll import ops
from longroll.families.fla_models.cache import LayerState
from longroll.families.fla_models.decoder import Block, CausalLM, Decoder, FlaConfig
from longroll.families.fla_models.layers import GatedHeads, rotary, turn


class RetNetConfig(FlaConfig):
    """fla's `RetNetConfig`; as there, `use_short_conv` is without effect."""

    model_type = "retnet"

    hidden_ratio: float | None = 2
    expand_k: float = 1.0
    expand_v: float = 2.0
    num_heads: int = 8
    num_kv_heads: int | None = None
    feature_map: str | None = None
    use_short_conv: bool = False
    conv_size: int = 4
    use_output_gate: bool = True
    elementwise_affine: bool = True


class MultiScaleRetention(GatedHeads):
    """fla/layers/multiscale_retention.py.

    Only the distance between a query and a key matters, so the state is kept turned to where the next token
    is position 0, where fla's grows an absolute position: the state says all, and a state that is passed
    on, averaged or drawn means the same wherever it is used.
    """

    def __init__(self, config: RetNetConfig, layer: int) -> None:
        super().__init__(config, conv=None, activations=ACT2FN)

    def forward(self, x: Tensor, state: LayerState) -> Tensor:
        """Return (B, T, hidden) -> (B, T, hidden)."""
        q, k, v = self.qkv(x, state)
        q, k = q.unflatten(-1, (-1, self.k_size)), k.unflatten(-1, (-1, self.k_size))
        if self.feature_map is not None:
            q, k = self.feature_map(q), self.feature_map(k)
        q, k = rotary(q), rotary(k).repeat_interleave(self.groups, dim=-2)
        v = self.grouped(v, self.v_size)
        o, final = ops.retention(q, k, v, initial_state=state.read("recurrent"), output_final_state=True)
        assert final is not None
        state.keep("recurrent", turn(final.mT, -x.shape[1]).mT)
        return self.output(o, x)


class RetNetBlock(Block):
    """A block of RetNet."""

    mixer = MultiScaleRetention


class RetNetModel(Decoder):
    """fla's `RetNetModel`."""

    config_class = RetNetConfig
    block = RetNetBlock


class RetNetForCausalLM(CausalLM):
    """fla's `RetNetForCausalLM`."""

    config_class = RetNetConfig
    decoder = RetNetModel
