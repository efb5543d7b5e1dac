"""RWKV-7: a decay per key channel, and each step moves what the state holds from one direction to another."""

import torch
from torch import Tensor

from longroll.ops._chunks import Chunk, check, run
from longroll.ops._decay import meet

CHUNK = 32


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
) -> tuple[Tensor, Tensor | None]:
    """Run `S_t = exp(w_t) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T`, `o_t = scale S_t^T r_t`.

    Gradients flow into every tensor argument and from both outputs. Arithmetic is float32 (float64 when an
    input is float64), also under autocast.

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

    Returns:
        o (B, T, H, V) in r's dtype, and the state (B, H, K, V) in float32 (float64), or None.

    Raises:
        ValueError: a shape does not fit, or T is 0.

    Source: Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", 2025; argument order and
    layouts as in fla's `chunk_rwkv7`.
    """
    check({"r": r, "w": w, "k": k, "a": a, "b": b}, v, {}, initial_state)

    def chunk(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Chunk:
        r, decay = r * scale, w.exp()
        scores, reads, writes = meet(
            torch.stack([r * decay, a, r * decay, a]), torch.stack([k, k, b, b]), decay.expand(4, *w.shape)
        )
        (rk, ak, rb, ab), (read, looked, *_), (write, _, move, _) = scores, reads, writes
        rk, rb = rk + torch.diag_embed((r * k).sum(-1)), rb + torch.diag_embed((r * b).sum(-1))
        # What the steps move is U = new + old S.
        sides = torch.cat([ak @ v, looked], -1)
        solved = torch.linalg.solve_triangular(-ab, sides, upper=False, unitriangular=True)
        new, old = solved.split([v.shape[-1], k.shape[-1]], -1)
        kept = torch.diag_embed(w.sum(-2).exp())
        return Chunk(rk @ v + rb @ new, read + rb @ old, kept + move.mT @ old, write.mT @ v + move.mT @ new)

    o, state = run(chunk, (r, w, k, v, a, b), initial_state, CHUNK)
    return o, (state if output_final_state else None)
