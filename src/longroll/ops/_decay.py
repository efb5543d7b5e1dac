"""Decays between the steps of a chunk, without an exponential that could overflow."""

import torch
import torch.nn.functional as F
from torch import Tensor


def meet(q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weigh keys against later queries, each channel with its own decays.

    The two halves of a block meet at its middle: keys of the first half decay up to it, queries of the second
    from it on, and one matrix product is their share of the scores. Blocks double until they are the chunk.
    So no quotient of decays is formed, and an exponential a step does the work of one for every pair.

    Args:
        q: queries, (..., C, K), C a power of 2, which read the state before their step.
        k: keys, (..., C, K), which their step writes after its decay.
        w: decays, (..., C, K), in [0, 1].

    Returns:
        Scores (..., C, C), 0 on and above the diagonal; q decayed from the chunk's start; k decayed to its end.
    """
    scores = torch.zeros_like(q[..., :1]).unsqueeze(-1)
    q, k, w = (t.unsqueeze(-2) for t in (q, k, w))  # (..., blocks, steps, K); w: of whole blocks
    while q.shape[-3] > 1:
        (q0, q1), (k0, k1), (w0, w1) = (t.unflatten(-3, (-1, 2)).unbind(-3) for t in (q, k, w))
        s0, s1 = scores.unflatten(-3, (-1, 2)).unbind(-3)
        scores = torch.cat([F.pad(s0, (0, s0.shape[-1])), torch.cat([q1 @ k0.mT, s1], -1)], -2)
        q, k, w = torch.cat([q0, q1 * w0], -2), torch.cat([k0 * w1, k1], -2), w0 * w1
    return scores.squeeze(-3), q.squeeze(-3), k.squeeze(-3)


def between(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decays (..., C) up to each step, after it, and (..., C, C) after the column's step up to the row's.

    Sums of logarithms g (..., C) are taken in float64, so that a strong decay costs later steps no digits.
    """
    total = g.double().cumsum(-1)
    gaps = total.unsqueeze(-1) - total.unsqueeze(-2)
    steps = torch.ones(gaps.shape[-2:], dtype=torch.bool, device=g.device)
    gaps = gaps.masked_fill(steps.triu(1), -torch.inf)
    return total.exp().to(g.dtype), (total[..., -1:] - total).exp().to(g.dtype), gaps.to(g.dtype).exp()
