"""Retention, and MiniMax's lightning attention: every head decays at its own fixed rate."""

import torch
from torch import Tensor

from longroll.ops._backend import kernel_for
from longroll.ops._chunks import Chunk, check, run
from longroll.ops._common import check_shape, state_dtype
from longroll.ops._decay import between, exp


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    g_gamma: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run `S_t = e^g_gamma S_{t-1} + k_t v_t^T`, `o_t = scale S_t^T q_t`.

    Gradients flow into q, k, v and the state and from both outputs; double backward is not supported.
    Arithmetic is float32 (float64 when an input is float64), also under autocast.

    Args:
        q: queries, (B, T, H, K), T >= 1.
        k: keys, (B, T, H, K).
        v: values, (B, T, H, V).
        scale: factor on the outputs; K^-0.5 when None.
        initial_state: (B, H, K, V); zero when None.
        output_final_state: also return the state after the last step.
        g_gamma: log decay of each head, (H,), at most 0; a constant, without gradient. By default that of
            1 - 2^(-5 - h) in head h.

    Returns:
        o (B, T, H, V) in q's dtype, and the state (B, H, K, V) in float32 (float64), or None.

    Raises:
        ValueError: a shape does not fit, an input is complex or of integers, or T is 0.

    Source: Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", 2023;
    argument order and layouts as in fla's `chunk_retention`, the decay's name as in its `chunk_simple_gla`.
    """
    check({"q": q, "k": k}, v, {}, initial_state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if g_gamma is None:
        heads = torch.arange(q.shape[2], dtype=torch.float64, device=q.device)
        g_gamma = torch.log1p(-(2.0 ** (-5 - heads)))  # in float32 off by 1e-4 in head 8
    check_shape("g_gamma", g_gamma, (q.shape[2],), "H")
    if kernel := kernel_for("retention", q, v, k, initial_state):
        return kernel(q, k, v, g_gamma, scale, initial_state, output_final_state)
    g = g_gamma.detach().to(state_dtype(q, k, v, initial_state))

    def chunk(q: Tensor, k: Tensor, v: Tensor) -> Chunk:
        steps = g.unsqueeze(-1).expand(-1, q.shape[-2])
        gaps, upto = between(steps), exp(steps.cumsum(-1)).unsqueeze(-1)
        q = q * scale
        write = k * gaps[:, -1, :, None]
        return Chunk(q * upto, upto[None, None, :, -1:], (q @ k.mT * gaps) @ v, write.mT @ v)

    return run(chunk, (q, k, v), initial_state, output_final_state)
