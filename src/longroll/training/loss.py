"""The loss of training, which takes no more memory than the logits do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longroll.model import RecurrentLM
from longroll.ops._backend import choose
from longroll.ops._common import needs_graph
from longroll.state import RecurrentState

_AT_ONCE = 1 << 26  # logits whose exponentials exist at a time


def loss_and_state(
    lm: RecurrentLM,
    input_ids: Tensor,
    targets: Tensor,
    state: RecurrentState | None = None,
    items: Tensor | int | None = None,
) -> tuple[Tensor, RecurrentState]:
    """`next_token_loss` of `lm` reading (B, T) from `state`, and the final state, on the graph.

    Many of transformers' models copy their logits to float32, which under autocast says no more than the
    logits do and triples their memory; here they stay as the output embedding made them.
    """
    hidden, final = lm(input_ids, state, logits=False)
    return next_token_loss(lm.family.head(lm.model, hidden), targets, items), final


def next_token_loss(logits: Tensor, targets: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of `targets` (B, T; -100 counts not) by logits (B, T, V), summed, divided by `items`.

    By default the mean: `items` are the tokens that count. Where a gradient is asked for, the logits may be
    overwritten: on a GPU they, their softmax and its gradients outweigh all else in the model.
    """
    logits, targets = logits.flatten(0, 1), targets.flatten()
    if not needs_graph(logits):
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
    elif kernel := choose("cross_entropy", logits.device, logits.dtype).kernel:
        loss = kernel(logits.contiguous(), targets.contiguous())
    else:
        loss = _CrossEntropy.apply(logits.float(), targets)
    return loss / ((targets != -100).sum().clamp_min(1) if items is None else items)


class _CrossEntropy(torch.autograd.Function):
    """Sum over rows of `logits` (M, V) float32, whose gradient is made at once and in their place."""

    @staticmethod
    def forward(ctx, logits, targets):
        counts = (targets != -100).unsqueeze(1)
        chosen = targets.where(targets != -100, 0).unsqueeze(1)
        loss = logits.new_zeros(())
        rows = max(1, _AT_ONCE // logits.shape[1])
        for x, y, count in zip(*(t.split(rows) for t in (logits, chosen, counts)), strict=True):
            norm = x.logsumexp(1, keepdim=True)
            loss += ((norm - x.gather(1, y)) * count).sum()
            x.sub_(norm).exp_()
            x.scatter_add_(1, y, x.new_full((), -1.0).expand_as(y))
            x.mul_(count)
        ctx.gradient = logits
        return loss

    @staticmethod
    def backward(ctx, dloss):
        gradient, ctx.gradient = ctx.gradient, None  # there is no second time
        return gradient.mul_(dloss), None
