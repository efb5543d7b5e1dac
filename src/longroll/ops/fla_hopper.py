"""What Triton miscompiles of fla's kernels on Hopper, done without the instruction that goes wrong.

Kernels of four warps and more multiply with Hopper's instruction for warp groups. With it some of fla's give
wrong gradients in 16 bits or read out of bounds (flash-linear-attention issue 984; seen with Triton 3.6 on an
H200 in retention and the delta rules): these keep to two warps, which multiply as on older GPUs.

From Triton 3.4 to 3.7.0 `chunk_bwd_dqkwg` with a decay is wrong in any configuration, so fla refuses to run
it (issue 640): no gradient of the gated delta rule, of Comba, or of transformers' Qwen3-Next line. It is
local to chunks and made of matrix products, a small part of the pass, and here in PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WARP_GROUP = 4
"""Warps that multiply together on Hopper."""

WRONG_IN_GROUPS = (
    "fla.ops.common.chunk_delta_h",
    "fla.ops.common.chunk_o",
    "fla.ops.delta_rule",
    "fla.ops.gated_delta_rule",
    "fla.ops.comba",
    "fla.ops.kda",
)
"""Modules with kernels that go wrong with a warp group, or are like those that do."""


def keep_to_warps(tuners: Iterable[Any]) -> None:
    """On Hopper, let kernels of `WRONG_IN_GROUPS` run without a warp group, where they can."""
    import fla.utils

    hopper = getattr(fla.utils, "IS_NVIDIA_HOPPER", False)  # there since fla 0.6
    for tuner in tuners:
        if hopper and tuner.base_fn.__module__.startswith(WRONG_IN_GROUPS):
            tuner.configs = [c for c in tuner.configs if c.num_warps < WARP_GROUP] or tuner.configs


def register_if_needed() -> bool:
    """Let fla dispatch to `gated_gradients` on a machine that needs it; return whether this one does."""
    try:
        from fla.backends import BaseBackend, register
        from fla.utils import IS_NVIDIA_HOPPER, TRITON_ABOVE_3_4_0, TRITON_ABOVE_3_7_1
    except ImportError:  # before fla 0.6
        return False
    if not IS_NVIDIA_HOPPER or not TRITON_ABOVE_3_4_0 or TRITON_ABOVE_3_7_1:
        return False

    @register("common")
    class _Torch(BaseBackend):  # type: ignore[misc]  # fla ships no types
        backend_type = "longroll"
        priority = 9  # after tilelang, which is fla's own way out

        def chunk_bwd_dqkwg_verifier(self, *_, g=None, g_gamma=None, cu_seqlens=None, **__):
            fits = g is not None and g_gamma is None and cu_seqlens is None
            return fits, None if fits else "only with a decay and without packed sequences"

        def chunk_bwd_dqkwg(self, q, k, v, do, h, dh, w=None, g=None, dv=None, scale=None, **options):
            layout = {name: options[name] for name in ("state_v_first", "chunk_size") if name in options}
            return gated_gradients(q, k, v, do, h, dh, w, g, dv, scale, **layout)

    return True


def gated_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    h: Tensor,
    dh: Tensor,
    w: Tensor | None,
    g: Tensor,
    dv: Tensor | None,
    scale: float,
    *,
    state_v_first: bool = False,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return gradients of chunks that decay, read and write, as fla 0.6.0's `chunk_bwd_dqkwg` has them; in
    float32.

    `o = scale (2^g q h + (q k^T 2^(g_i - g_j)) v)` and `h' = 2^g_last h + (2^(g_last - g) k)^T v`, where v is
    what is written: in the delta rules `u - w h`.

    Args:
        q: (B, T, H, K).
        k: (B, T, H, K).
        v: (B, T, HV, V), HV a multiple of H.
        do: gradient of the outputs, (B, T, HV, V).
        h: states at the start of the chunks, (B, chunks, HV, K, V), or (..., V, K) with `state_v_first`.
        dh: gradients of the states after the chunks, as h.
        w: (B, T, HV, K), or None.
        g: running sums of the log decays in each chunk, to base 2, (B, T, HV).
        dv: gradient of v, (B, T, HV, V), or None.
        scale: factor on the outputs.
        state_v_first: the layout of h and dh.
        chunk_size: steps a chunk.

    Returns:
        dq and dk as q and k; dw as w, or None; dg (B, T, HV) in float32, by g to base e.
    """
    time, groups = q.shape[1], v.shape[2] // q.shape[2]
    chunks = h.shape[1]

    def cut(x: Tensor) -> Tensor:
        """Return (B, T, HV, D) -> (B, chunks, HV, C, D), zero after the end."""
        x = F.pad(x.float(), (0, 0, 0, 0, 0, chunks * chunk_size - time))
        blocks: Tensor = x.unflatten(1, (chunks, chunk_size))
        return blocks.transpose(2, 3)

    def joined(x: Tensor) -> Tensor:
        """Return the inverse of `cut`; contiguous, as the kernels that read it expect."""
        return x.transpose(2, 3).flatten(1, 2)[:, :time].contiguous()

    with torch.autocast(q.device.type, enabled=False):
        Q, K, V, O = (cut(x) for x in (q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2), v, do))
        h, dh = (x.float().mT if state_v_first else x.float() for x in (h, dh))
        ends = torch.arange(1, chunks + 1, device=q.device).mul(chunk_size).clamp_max(time) - 1
        last = g[:, ends].float()[..., None]  # (B, chunks, HV, 1)
        G = cut(g[..., None]).squeeze(-1)  # (B, chunks, HV, C)
        inside = torch.arange(chunks * chunk_size, device=q.device).view(chunks, 1, chunk_size) < time
        # a step after the end has no decay, so that its gaps could overflow
        seen = inside[..., None].expand(-1, -1, -1, chunk_size).tril()

        dQ = O @ h.mT * (torch.exp2(G) * scale)[..., None]
        dK = V @ dh.mT * torch.where(inside, torch.exp2(last - G), 0)[..., None]
        dlast = (h * dh).sum((-2, -1)) * torch.exp2(last[..., 0]) + (dK * K).sum((-2, -1))
        gaps = torch.exp2((G[..., :, None] - G[..., None, :]).masked_fill(~seen, float("-inf")))
        dS = O @ V.mT * gaps * scale
        dQ = dQ + dS @ K
        dK = dK + dS.mT @ Q
        dG = joined(((dQ * Q).sum(-1) - (dK * K).sum(-1))[..., None]).squeeze(-1)
        dG = dG.index_add(1, ends, dlast)
        dw = None if w is None or dv is None else joined(-(cut(dv) @ h.mT)).to(w.dtype)
    dq, dk = (joined(x).unflatten(2, (-1, groups)).sum(3) for x in (dQ, dK))
    return dq.to(q.dtype), dk.to(k.dtype), dw, dG
