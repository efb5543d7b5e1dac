"""Gated linear attention: every key channel decays at its own rate."""

from torch import Tensor

from longroll.ops._backend import kernel_for
from longroll.ops._chunks import Chunk, check, run
from longroll.ops._decay import exp, meet


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run `S_t = exp(g_t) S_{t-1} + k_t v_t^T`, `o_t = scale S_t^T q_t`.

    Gradients flow into every tensor argument and from both outputs; double backward is not supported.
    Arithmetic is float32 (float64 when an input is float64), also under autocast.

    Args:
        q: queries, (B, T, H, K), T >= 1.
        k: keys, (B, T, H, K).
        v: values, (B, T, H, V).
        g: log decays, (B, T, H, K), at most 0.
        scale: factor on the outputs; K^-0.5 when None.
        initial_state: (B, H, K, V); zero when None.
        output_final_state: also return the state after the last step.

    Returns:
        o (B, T, H, V) in q's dtype, and the state (B, H, K, V) in float32 (float64), or None.

    Raises:
        ValueError: a shape does not fit, an input is complex or of integers, or T is 0.

    Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2024;
    argument order and layouts as in fla's `chunk_gla`.
    """
    check({"q": q, "k": k, "g": g}, v, {}, initial_state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if kernel := kernel_for("gla", q, v, k, g, initial_state):
        return kernel(q, k, v, g, scale, initial_state, output_final_state)

    def chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Chunk:
        q, w = q * scale, exp(g)
        scores, read, write = meet(q * w, k, w)
        local = scores @ v + (q * k).sum(-1, keepdim=True) * v
        return Chunk(read, exp(g.sum(-2)).unsqueeze(-1), local, write.mT @ v)

    return run(chunk, (q, k, v, g), initial_state, output_final_state)
