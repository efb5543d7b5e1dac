"""Distances between next-token distributions: total variation, Jensen-Shannon, Kullback-Leibler."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from longroll.errors import LongrollError
from longroll.measure.roll_out import LOGITS
from longroll.model import RecurrentLM

Distance = Literal["tv", "js", "kl"]


def check_distance(distance: str) -> None:
    """Raise a LongrollError for a distance that is none of `tv`, `js`, `kl`."""
    if distance not in get_args(Distance):
        raise LongrollError(f"distance {distance!r} is not one of {', '.join(get_args(Distance))}.")


def logit_distance(p: Tensor, q: Tensor, distance: Distance = "tv") -> Tensor:
    """Return distance (...) between the distributions that logits (..., V) stand for; shapes broadcast.

    `tv` is 1/2 sum |p - q|, in [0, 1]; `js` in nats, in [0, log 2]; `kl` is KL(p || q) in nats.
    """
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    if distance == "tv":
        return (log_p.exp() - log_q.exp()).abs_().sum(-1).mul_(0.5).clamp_max_(1)
    if distance == "kl":
        return _divergence(log_p, log_q)
    middle = torch.logaddexp(log_p, log_q).sub_(torch.log(torch.tensor(2.0)).item())
    return (_divergence(log_p, middle) + _divergence(log_q, middle)) / 2


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    # a token without probability adds nothing, whatever q gives it; rounding may not make the sum negative
    return torch.where(p == 0, torch.zeros_like(p), p * (log_p - log_q)).sum(-1).clamp_min_(0)


@torch.no_grad()
def head_distance(lm: RecurrentLM, reference: Tensor, others: Tensor, distance: Distance) -> Tensor:
    """Return distances (K, B) from the predictions of `reference` (B, d_model) to those of `others` (K, B,
    d_model).

    Exact over the whole vocabulary. Memory is bounded by taking a few rows at a time, not by leaving
    tokens out.
    """
    rows = max(1, LOGITS["cpu"] // ((len(others) + 1) * lm.vocab_size))
    pieces = [
        logit_distance(lm.head(one), lm.head(more), distance)
        for one, more in zip(reference.split(rows), others.split(rows, dim=1), strict=True)
    ]
    return torch.cat(pieces, dim=1)
