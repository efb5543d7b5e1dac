"""The loss of training: its memory is that of the logits, and of many tokens that of a part of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longroll.model import RecurrentLM
from longroll.ops._backend import choose
from longroll.ops._common import needs_graph, product_dtype
from longroll.state import RecurrentState

LOGITS = 1 << 29
"""Numbers of logits that exist at once: 1 GiB in 16 bits."""
_WIDTHS = 4  # of the model, in tokens: what a piece with a gradient has, up to four times the logits
_AT_ONCE = 1 << 26  # logits whose exponentials exist at a time


def loss_and_state(
    lm: RecurrentLM,
    input_ids: Tensor,
    targets: Tensor,
    state: RecurrentState | None = None,
    num_items: Tensor | int | None = None,
    **documents: Any,
) -> tuple[Tensor, RecurrentState]:
    """Return `hidden_loss` of `lm` reading (B, T) from `state`, and the final state, on the graph.

    `documents` are the arguments `attention_mask`, `starts` and `restart` of `lm`.
    """
    hidden, final = lm(input_ids, state, logits=False, **documents)
    return hidden_loss(lm, hidden, targets, num_items), final


def hidden_loss(
    lm: RecurrentLM, hidden: Tensor, targets: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Return `next_token_loss` of the logits that `lm` gives of its last hidden states (B, T, D).

    Many of transformers' models copy their logits to float32, which under autocast says no more than the
    logits do and triples their memory; here they stay as the output embedding made them. Many tokens are
    taken in pieces, none so small that the head's gradient, which each adds to, outweighs its logits.
    """
    head = functools.partial(lm.family.head, lm.model)
    tokens = max(1, LOGITS // lm.vocab_size)
    if needs_graph(hidden):
        tokens = max(tokens, min(_WIDTHS * hidden.shape[-1], 4 * tokens))
    # gradients in float16 want their scale, which comes only with backward
    if targets.numel() <= tokens or product_dtype(hidden, hidden) == torch.float16:
        return next_token_loss(head(hidden), targets, num_items)
    num_items = (targets != -100).sum().clamp_min(1) if num_items is None else num_items
    pieces = [t.flatten(0, 1)[None].split(tokens, dim=1) for t in (hidden, targets)]
    if not needs_graph(hidden):
        return torch.stack(
            [next_token_loss(head(h), y, num_items) for h, y in zip(*pieces, strict=True)]
        ).sum()
    weights = lm.family.head_parameters(lm.model)
    loss: Tensor = _InPieces.apply(head, weights, pieces[1], hidden, *weights) / num_items  # type: ignore[no-untyped-call]
    return loss


class _InPieces(torch.autograd.Function):
    """Sum of the losses of `hidden` (B, T, D), piece by piece, each with its gradient.

    The gradients of the hidden states and of the head's weights are made at once and kept in place of the
    logits, so that nothing is computed twice (as in Liger-Kernel's fused linear cross-entropy).
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[Tensor], Tensor],
        weights: Sequence[Tensor],
        targets: Sequence[Tensor],
        hidden: Tensor,
        *_: Tensor,
    ) -> Tensor:
        dhidden, dweights = hidden.new_empty(hidden.shape), [torch.zeros_like(w) for w in weights]
        loss = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        sizes = [y.shape[1] for y in targets]
        parts = (t.flatten(0, 1).split(sizes) for t in (hidden.detach(), dhidden))
        for h, dh, y in zip(*parts, targets, strict=True):
            with torch.enable_grad():
                h = h[None].requires_grad_()
                piece = next_token_loss(head(h), y, 1)
                found, *others = torch.autograd.grad(piece, [h, *weights])
            dh.copy_(found[0])
            if weights:
                torch._foreach_add_(dweights, others)
            loss += piece.detach()
        ctx.save_for_backward(dhidden, *dweights)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(g * dloss for g in ctx.saved_tensors)


def next_token_loss(logits: Tensor, targets: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Return cross-entropy of `targets` (B, T; -100 is ignored) by logits (B, T, V), summed, divided by
    `num_items`.

    The default is the mean: `num_items` is the number of targets that are not -100. Where a gradient is asked
    for, the logits may be overwritten: on a GPU they, their softmax and its gradients outweigh all else.
    """
    logits, targets = logits.flatten(0, 1), targets.flatten()
    wide = torch.promote_types(logits.dtype, torch.float32)
    if not needs_graph(logits):
        loss = F.cross_entropy(logits.to(wide), targets, reduction="sum")
    elif kernel := choose("cross_entropy", logits.device, logits.dtype).kernel:
        loss = kernel(logits.contiguous(), targets.contiguous())
    else:
        loss = _CrossEntropy.apply(logits.to(wide), targets)  # type: ignore[no-untyped-call]
    return loss / ((targets != -100).sum().clamp_min(1) if num_items is None else num_items)


class _CrossEntropy(torch.autograd.Function):
    """Sum over rows of `logits` (M, V), float32 or float64. Their gradient takes their place at once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
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
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None  # there is no second time
        return gradient.mul_(dloss), None
