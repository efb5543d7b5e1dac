"""MiniMax of transformers, whose lightning attention reads on from a state one token at a time.

Upstream (`MiniMaxLightningAttention.forward`) goes in blocks from the zero state only. The recurrence is
retention with fixed decays, and runs as longroll's op from any state.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.minimax import modeling_minimax
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from longroll import ops
from longroll.families._cache import StateCache
from longroll.families._family import Family
from longroll.families._replace import replace_forward


class Minimax(Family):
    """MiniMax-Text-01 (arXiv 2501.08313)."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Give the lightning attention a forward over longroll's op."""
        super().prepare(model)
        for module in model.modules():
            if isinstance(module, MiniMaxLightningAttention):
                replace_forward(module, functools.partial(_forward, module))


def _forward(
    attention: Any, original, hidden_states: Tensor, position_embeddings=None, attention_mask=None, **kwargs
) -> tuple[Tensor, Tensor]:
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, StateCache):
        return original(hidden_states, position_embeddings, attention_mask, **kwargs)
    qkv = attention.act_fn(attention.qkv_proj(hidden_states))
    qkv = modeling_minimax.apply_mask_to_padding_states(qkv, attention_mask)
    q, k, v = qkv.unflatten(-1, (attention.num_attention_heads, -1)).chunk(3, dim=-1)
    o, final_state = ops.retention(
        q, k, v, 1.0, cache.start(attention.layer_idx, "recurrent"), True, -attention.slope_rate.flatten()
    )
    assert final_state is not None
    cache.keep(attention.layer_idx, "recurrent", final_state)
    o = attention.norm(o.flatten(-2)) * F.sigmoid(attention.output_gate(hidden_states))
    return attention.out_proj(o), final_state
