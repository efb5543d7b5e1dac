"""RWKV-6: a decay per key channel; the current token is weighed by a bonus instead of being read back."""

from torch import Tensor

from longroll.ops._backend import kernel_for
from longroll.ops._chunks import Chunk, check, run
from longroll.ops._common import check_shape
from longroll.ops._decay import exp, meet


def rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run `o_t = scale (S_{t-1} + (u * k_t) v_t^T)^T r_t`, `S_t = exp(w_t) S_{t-1} + k_t v_t^T`.

    Gradients flow into every tensor argument and from both outputs; double backward is not supported.
    Arithmetic is float32 (float64 when an input is float64), also under autocast.

    Args:
        r: receptances (queries), (B, T, H, K), T >= 1.
        k: keys, (B, T, H, K).
        v: values, (B, T, H, V).
        w: log decays, (B, T, H, K), at most 0.
        u: bonus of the current token, (H, K).
        scale: factor on the outputs; K^-0.5 when None, as in fla (BlinkDL's models want 1).
        initial_state: (B, H, K, V); zero when None.
        output_final_state: also return the state after the last step.

    Returns:
        o (B, T, H, V) in r's dtype, and the state (B, H, K, V) in float32 (float64), or None.

    Raises:
        ValueError: a shape does not fit, an input is complex or of integers, or T is 0.

    Source: Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", 2024;
    argument order and layouts as in fla's `chunk_rwkv6`.
    """
    check({"r": r, "k": k, "w": w}, v, {}, initial_state)
    check_shape("u", u, (r.shape[2], r.shape[3]), "H, K")
    scale = r.shape[-1] ** -0.5 if scale is None else scale
    if kernel := kernel_for("rwkv6", r, v, k, w, u, initial_state):
        return kernel(r, k, v, w, u, scale, initial_state, output_final_state)

    def chunk(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Chunk:
        r = r * scale
        scores, read, write = meet(r, k, exp(w))
        local = scores @ v + (r * u.unsqueeze(1) * k).sum(-1, keepdim=True) * v
        return Chunk(read, exp(w.sum(-2)).unsqueeze(-1), local, write.mT @ v)

    return run(chunk, (r, k, v, w), initial_state, output_final_state, (u,))
