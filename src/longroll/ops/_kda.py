"""Kimi delta attention: the gated delta rule with a decay per key channel."""

import torch
from torch import Tensor

from longroll.ops._backend import kernel_for
from longroll.ops._chunks import Chunk, check, run, solve
from longroll.ops._decay import exp, meet


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run `S' = exp(g_t) S_{t-1}`, `S_t = S' + beta_t k_t (v_t - S'^T k_t)^T`, `o_t = scale S_t^T q_t`.

    Gradients flow into every tensor argument and from both outputs; double backward is not supported.
    Arithmetic is float32 (float64 when an input is float64), also under autocast.

    Args:
        q: queries, (B, T, H, K), T >= 1.
        k: keys, (B, T, H, K), of length at most 1 (or see `use_qk_l2norm_in_kernel`).
        v: values, (B, T, H, V).
        g: log decays of the rows of S, (B, T, H, K), at most 0.
        beta: how much of the old value is replaced, (B, T, H), from 0 to 1 (2 with negative eigenvalues).
        scale: factor on the outputs; K^-0.5 when None.
        initial_state: (B, H, K, V); zero when None.
        output_final_state: also return the state after the last step.
        use_qk_l2norm_in_kernel: first bring q and k to length 1.

    Returns:
        o (B, T, H, V) in q's dtype, and the state (B, H, K, V) in float32 (float64), or None.

    Raises:
        ValueError: a shape does not fit, an input is complex or of integers, or T is 0.

    Source: Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture", 2025; argument order
    and layouts as in fla's `chunk_kda`.
    """
    check({"q": q, "k": k, "g": g}, v, {"beta": beta}, initial_state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if kernel := kernel_for("kda", q, v, k, g, beta, initial_state):
        return kernel(q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel)

    def chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Chunk:
        if use_qk_l2norm_in_kernel:
            q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        q, decay = q * scale, exp(g)
        keys = k * beta.unsqueeze(-1)
        readers = torch.stack([q * decay, -k * decay], -2)  # (..., C, 2, K)
        scores, reads, writes = meet(readers.flatten(-3, -2), keys, decay)
        mixer, looked_up = scores.unflatten(-2, (-1, 2)).movedim(-2, 0).contiguous()  # (..., C, C) each
        read, looks = reads.unflatten(-2, (-1, 2)).unbind(-2)
        # The steps write U = new + old S.
        new, old = solve(-looked_up, torch.cat([v, looks], -1)).split([v.shape[-1], k.shape[-1]], -1)
        mixer = mixer + torch.diag_embed((q * keys).sum(-1))
        return Chunk(read, exp(g.sum(-2)).unsqueeze(-1), None, None, mixer, writes, new, old)

    return run(chunk, (q, k, v, g, beta), initial_state, output_final_state)
