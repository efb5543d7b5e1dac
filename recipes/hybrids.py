"""Small hybrids of three shapes, trained on bytes so that chosen sides of them never see past T.

A row of P T tokens is read in P pieces of T. What is carried from piece to piece decides which side is
trained long: the recurrent states, the keys and values of attention, both, or neither (plain training at T).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from longroll import RecurrentLM
from longroll.state import Part, RecurrentState
from longroll.training.graphs import StepGraph

SLOW, ORDINARY = (0.001, 0.1), (1.0, 16.0)
"""Decay rates A of heads that hardly forget, and Mamba-2's own."""
_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def bamba(size: int, length: int, vocabulary: int) -> PreTrainedModel:
    """Mamba-2, attention with rotary positions, Mamba-2."""
    config = BambaConfig(
        **_TOKENS,
        vocab_size=vocabulary,
        **_mamba2(size, length),
        attn_layer_indices=[1],
        max_position_embeddings=length,
    )
    return BambaForCausalLM(config)


def granite(size: int, length: int, vocabulary: int) -> PreTrainedModel:
    """Mamba-2, attention without positions, Mamba-2 (Granite 4)."""
    config = GraniteMoeHybridConfig(
        **_TOKENS, **_mamba2(size, length), vocab_size=vocabulary,
        layer_types=["mamba", "attention", "mamba"],
        position_embedding_type="nope", shared_intermediate_size=2 * size, num_local_experts=0,
        num_experts_per_tok=0, max_position_embeddings=length,
    )  # fmt: skip
    return GraniteMoeHybridForCausalLM(config)


def qwen3_next(size: int, length: int, vocabulary: int) -> PreTrainedModel:
    """Gated DeltaNet, gated attention with rotary positions on a quarter of each head, Gated DeltaNet."""
    config = Qwen3NextConfig(
        **_TOKENS, vocab_size=vocabulary, hidden_size=size, num_hidden_layers=3, tie_word_embeddings=True,
        layer_types=["linear_attention", "full_attention", "linear_attention"], intermediate_size=2 * size,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32, num_experts=0,
        num_experts_per_tok=0, mlp_only_layers=[0, 1, 2], max_position_embeddings=length,
    )  # fmt: skip
    return Qwen3NextForCausalLM(config)


def _mamba2(size: int, length: int) -> dict:
    return {
        "hidden_size": size, "num_hidden_layers": 3, "tie_word_embeddings": True,
        "intermediate_size": 2 * size, "num_attention_heads": 4, "num_key_value_heads": 2,
        "mamba_n_heads": 4, "mamba_d_head": size // 2, "mamba_d_state": 64, "mamba_n_groups": 1,
        "mamba_chunk_size": 64,
    }  # fmt: skip


SHAPES: dict[str, Callable[[int, int, int], PreTrainedModel]] = {
    "bamba": bamba, "granite": granite, "qwen3_next": qwen3_next,
}  # fmt: skip


def build(
    shape: str,
    *,
    size: int,
    length: int,
    slow: float,
    seed: int,
    rates: tuple[float, float] = SLOW,
    vocabulary: int = 256,
) -> RecurrentLM:
    """A fresh model, a share `slow` of whose heads decays by rates A drawn from `rates`; none are trained."""
    torch.manual_seed(seed)
    model = SHAPES[shape](size, length, vocabulary)
    model.config.train_length = length
    random = np.random.default_rng(seed)
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            heads = len(weight)
            drawn = [random.uniform(*(rates if head < slow * heads else ORDINARY)) for head in range(heads)]
            weight.data.copy_(torch.tensor(drawn).log())
            weight.requires_grad_(False)
    return RecurrentLM(model, name=shape)


def train(
    lm: RecurrentLM,
    ids: Tensor,
    carried: tuple[Part, ...],
    *,
    length: int,
    pieces: int,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    seconds: float = math.inf,
) -> dict[str, float]:
    """AdamW on rows of `pieces` x `length` tokens, a step for each piece; returns steps, loss, seconds.

    Args:
        lm: the model.
        ids: (N,) bytes of the text.
        carried: parts of the state that go from piece to piece, without gradient.
        length: T.
        pieces: of a row.
        steps: of the optimizer.
        batch: rows.
        learning_rate: peak; 10 % warm-up, cosine to 0.
        seed: of the rows.
        seconds: ends training sooner.
    """
    weights = [p for p in lm.parameters() if p.requires_grad]
    fused = lm.device.type == "cuda"
    optimizer = torch.optim.AdamW(
        weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=fused
    )
    graph = None
    if fused and "attention" not in carried and lm.family.op in ("ssd", "selective_scan"):
        graph = StepGraph(lm, states=bool(carried))  # keys that are carried change the shapes of a step

    def rate(step: int) -> float:
        return min(1, (step + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(pieces * length + 1)
    lm.train()
    began, losses = time.perf_counter(), []
    state: RecurrentState | None = None
    for step in range(steps):
        piece = step % pieces
        if piece == 0:
            starts = torch.randint(len(ids) - len(window), (batch, 1), generator=generator)
            rows, state = ids[starts + window].long().to(lm.device), None
        tokens = rows[:, piece * length : (piece + 1) * length + 1]
        if graph is not None:
            loss, final = graph(tokens[:, :-1], tokens[:, 1:], state)
        else:
            logits, final = lm(tokens[:, :-1], state)
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        state = final.detach().part(*carried) if carried else None
        losses.append(loss.detach())
        if time.perf_counter() - began > seconds:
            break
    lm.eval()
    return {
        "steps": len(losses),
        "loss": torch.stack(losses[-50:]).mean().item(),
        "seconds": time.perf_counter() - began,
    }
