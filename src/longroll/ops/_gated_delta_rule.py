"""The gated delta rule: each step decays the state and replaces what it holds under its key."""

import torch
from torch import Tensor

from longroll.ops._backend import kernel_for
from longroll.ops._chunks import Chunk, check, run, solve
from longroll.ops._decay import between, exp


def gated_delta_rule(
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
        v: values, (B, T, HV, V), HV a multiple of H: value head h uses key head h // (HV / H).
        g: log decays, (B, T, HV), at most 0.
        beta: how much of the old value is replaced, (B, T, HV), from 0 to 1 (2 with negative eigenvalues).
        scale: factor on the outputs; K^-0.5 when None.
        initial_state: (B, HV, K, V); zero when None.
        output_final_state: also return the state after the last step.
        use_qk_l2norm_in_kernel: first bring q and k to length 1.

    Returns:
        o (B, T, HV, V) in q's dtype, and the state (B, HV, K, V) in float32 (float64), or None.

    Raises:
        ValueError: a shape does not fit, an input is complex or of integers, or T is 0.

    Source: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2025; argument order and
    layouts as in fla's `chunk_gated_delta_rule`.
    """
    if q.dim() == v.dim() == 4 and v.shape[2] % q.shape[2] == 0 and q.shape == k.shape:
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    check({"q": q, "k": k}, v, {"beta": beta, "g": g}, initial_state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if kernel := kernel_for("gated_delta_rule", q, v, k, g, beta, initial_state):
        return kernel(q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel)

    def chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Chunk:
        if use_qk_l2norm_in_kernel:
            q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        q, beta = q * scale, beta.unsqueeze(-1)
        gaps, upto = between(g), exp(g.cumsum(-1)).unsqueeze(-1)
        # The steps write U = new + old S.
        sides = torch.cat([v * beta, k * (-beta * upto)], -1)
        new, old = solve(k @ k.mT * gaps * beta, sides).split([v.shape[-1], k.shape[-1]], -1)
        write = k * gaps[..., -1, :, None]
        return Chunk(q * upto, upto[..., -1:, :], None, None, q @ k.mT * gaps, write, new, old)

    return run(chunk, (q, k, v, g, beta), initial_state, output_final_state)
