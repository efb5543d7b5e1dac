"""Softmax attention of new tokens over earlier keys and values that lie in blocks, which are never joined.

Attention over all keys is the mean of the attention over each block, weighted by the sums of the blocks'
exponentials (the merge of FlashAttention and of ring attention, Liu et al. 2023, arXiv 2310.01889). Only the
block of the new tokens themselves wants a causal mask, and that one is square, so that fast kernels take it
without any tensor of new tokens x keys.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

_SCORES = 1 << 26  # numbers of them that exist at once where no kernel runs


@torch.no_grad()
def block_attention(
    q: Tensor, k: Tensor, v: Tensor, past: Iterable[tuple[Tensor, Tensor]], scale: float | None = None
) -> Tensor:
    """Attend causally to the new tokens, and to all of `past`; no gradient.

    Args:
        q: queries of the new tokens, (B, H, T, K).
        k: their keys, (B, G, T, K); G divides H, and query head h reads head h * G // H.
        v: their values, (B, G, T, V).
        past: keys (B, G, S, K) and values (B, G, S, V) of the tokens before, in any number of blocks.
        scale: the scale of the scores; default: K ** -.5.

    Returns:
        (B, H, T, V), in q's dtype; sums over blocks are in float32 or wider.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, norm = _attend(q, k, v, scale, causal=True)
    out = out.to(norm.dtype)
    for keys, values in past:
        more, its = _attend(q, keys.to(q.dtype), values.to(v.dtype), scale, causal=False)
        both = torch.logaddexp(norm, its)
        out.mul_((norm - both).exp_().unsqueeze(-1))
        out.add_(more.to(out.dtype).mul_((its - both).exp_().unsqueeze(-1)))
        norm = both
    return out.to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Return attention (B, H, T, V) and the logarithm of its sum of exponentials (B, H, T)."""
    alike = k.shape[-1] == v.shape[-1]
    if q.is_cuda and alike:
        params = SDPAParams(q, k, v, None, 0.0, causal, True)
        if can_use_flash_attention(params):
            return _flash(q, k, v, scale, causal)
    groups, (heads, time) = q.shape[1] // k.shape[1], q.shape[1:3]
    if groups > 1 and causal:
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    elif groups > 1:  # heads that share keys are as good as more queries
        q = q.unflatten(1, (-1, groups)).flatten(2, 3)
    out, norm = _kernel(q, k, v, scale, causal) if alike else _scores(q, k, v, scale, causal)
    return out.reshape(out.shape[0], heads, time, -1), norm.reshape(norm.shape[0], heads, time)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Return FlashAttention-2's kernel, whose heads are multiples of 8 wide."""
    size = v.shape[-1]
    if rest := -size % 8:
        q, k, v = (F.pad(t, (0, rest)) for t in (q, k, v))
    out, norm, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out[..., :size], norm


def _kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        out, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )
        return out, norm
    if q.is_cuda and can_use_efficient_attention(SDPAParams(q, k, v, None, 0.0, causal, False)):
        out, norm, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=scale
        )
        return out, norm[..., : q.shape[2]]  # padded to a multiple of 32
    return _scores(q, k, v, scale, causal)


def _scores(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Return the definition, some queries at a time."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    outs, norms = [], []
    some = max(1, _SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], some):
        scores = (q[:, :, start : start + some] @ k.mT).mul_(scale)
        if causal:
            row = torch.arange(start, start + scores.shape[2], device=q.device)
            later = torch.arange(k.shape[2], device=q.device) > row.unsqueeze(1)
            scores.masked_fill_(later, float("-inf"))
        norms.append(scores.logsumexp(-1))
        outs.append(scores.sub_(norms[-1].unsqueeze(-1)).exp_() @ v)
    return torch.cat(outs, dim=2), torch.cat(norms, dim=2)
