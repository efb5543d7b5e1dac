"""From hidden states to logits, where that is more than the output embedding: as each `*ForCausalLM` does."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def plain(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return the output embedding alone."""
    head = model.get_output_embeddings()
    return head(hidden.to(head.weight.dtype))


def falcon_h1(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return times `lm_head_multiplier`."""
    return plain(model, hidden) * model.config.lm_head_multiplier


def granite(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return over `logits_scaling`."""
    return plain(model, hidden) / model.config.logits_scaling


def recurrent_gemma(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return capped softly at `logits_soft_cap`."""
    cap = model.config.logits_soft_cap
    return torch.tanh(plain(model, hidden) / cap) * cap


def xlstm(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return capped softly at `output_logit_soft_cap`, in float32."""
    cap = model.config.output_logit_soft_cap
    return cap * torch.tanh(plain(model, hidden).float() / cap)


def inkling(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return the head of hidden states over `logits_mup_width_multiplier`; without the padding of the
    vocabulary.
    """
    logits = plain(model, hidden / model.config.logits_mup_width_multiplier)
    return logits[..., : model.config.unpadded_vocab_size]


def inkling2(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return capped softly at `final_logit_softcapping`; without the padding of the vocabulary."""
    logits = model.logit_softcap(plain(model, hidden).float())  # type: ignore[operator]
    return logits[..., : model.config.unpadded_vocab_size]
