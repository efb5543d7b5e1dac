"""RWKV-7: a decay per key channel, and each step moves what the state holds from one direction to another."""

import torch
from torch import Tensor

from longroll.ops._backend import kernel_for
from longroll.ops._chunks import Chunk, check, run, solve
from longroll.ops._decay import exp, meet


def rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    *,
    lower_bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run `S_t = exp(w_t) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T`, `o_t = scale S_t^T r_t`.

    Gradients flow into every tensor argument and from both outputs; double backward is not supported.
    Arithmetic is float32 (float64 when an input is float64), also under autocast.

    Args:
        r: receptances (queries), (B, T, H, K), T >= 1.
        w: log decays, (B, T, H, K), at most 0.
        k: keys, (B, T, H, K).
        v: values, (B, T, H, V).
        a: directions to erase, (B, T, H, K); RWKV-7's are minus keys of length 1.
        b: directions that take their place, (B, T, H, K); RWKV-7's are -a times a rate from 0 to 1.
        scale: factor on the outputs.
        initial_state: (B, H, K, V); zero when None.
        output_final_state: also return the state after the last step.
        lower_bound: w is at least this (RWKV-7's is -exp(-0.5)); lets the GPU kernel take longer chunks.

    Returns:
        o (B, T, H, V) in r's dtype, and the state (B, H, K, V) in float32 (float64), or None.

    Raises:
        ValueError: a shape does not fit, an input is complex or of integers, or T is 0.

    Source: Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", 2025; argument order and
    layouts as in fla's `chunk_rwkv7`.
    """
    check({"r": r, "w": w, "k": k, "a": a, "b": b}, v, {}, initial_state)
    if kernel := kernel_for("rwkv7", r, v, w, k, a, b, initial_state):
        return kernel(r, w, k, v, a, b, scale, initial_state, output_final_state, lower_bound)

    def chunk(r: Tensor, k: Tensor, v: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Chunk:
        r, decay = r * scale, exp(w)
        readers, keys = torch.stack([r * decay, a], -2), torch.stack([k, b], -2)  # (..., C, 2, K)
        scores, reads, writes = meet(readers.flatten(-3, -2), keys.flatten(-3, -2), decay)
        scores = scores.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).movedim((-3, -1), (0, 1))
        (rk, rb), (ak, ab) = scores.contiguous()  # (..., C, C) each
        read, looked = reads.unflatten(-2, (-1, 2)).unbind(-2)
        write, move = writes.unflatten(-2, (-1, 2)).unbind(-2)
        # The steps move U = new + old S.
        new, old = solve(-ab, torch.cat([ak @ v, looked], -1)).split([v.shape[-1], k.shape[-1]], -1)
        local = rk @ v + (r * k).sum(-1, keepdim=True) * v
        mixer = rb + torch.diag_embed((r * b).sum(-1))
        return Chunk(read, exp(w.sum(-2)).unsqueeze(-1), local, write.mT @ v, mixer, move, new, old)

    return run(chunk, (r, k, v, w, a, b), initial_state, output_final_state)
