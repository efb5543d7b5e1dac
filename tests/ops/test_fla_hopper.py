"""The gradients that stand in for fla's kernel are those of autograd, through the chunks written out."""

import math

import pytest
import torch

from longroll.ops.fla_hopper import gated_gradients, keep_to_warps
from longroll.ops.fla_kernels import tuners


def chunks_of(q, k, v, starts, g, scale, size):
    """Outputs, and states after the chunks, of chunks that start from given states."""
    outputs, ends = [], []
    for i, first in enumerate(range(0, q.shape[1], size)):
        part = slice(first, first + size)
        Q, K, V = (x[:, part].transpose(1, 2) for x in (q, k, v))
        G, h = g[:, part].transpose(1, 2), starts[:, i]
        gaps = torch.exp2(G[..., :, None] - G[..., None, :]).tril()
        outputs.append(scale * (torch.exp2(G)[..., None] * Q @ h + (Q @ K.mT * gaps) @ V))
        last = G[..., -1:]
        ends.append(torch.exp2(last)[..., None] * h + (torch.exp2(last - G)[..., None] * K).mT @ V)
    return torch.cat([o.transpose(1, 2) for o in outputs], 1), torch.stack(ends, 1)


@pytest.mark.parametrize("time", [1, 16, 37, 64])
@pytest.mark.parametrize(("heads", "groups"), [(2, 1), (1, 3)])
@pytest.mark.parametrize(("v_first", "strength"), [(False, 1), (True, 1), (False, 40)])
def test_gradients_are_autograds(time, heads, groups, v_first, strength):
    size, K, V, scale = 16, 5, 7, 0.4
    generator = torch.Generator().manual_seed(time)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = heads * groups
    chunks = -(-time // size)
    q, k, v, w = (
        normal(2, time, heads, K),
        normal(2, time, heads, K),
        normal(2, time, wide, V),
        normal(2, time, wide, K),
    )
    decay = -strength * normal(2, time, wide).abs().mul(64).ceil() / 64  # whose sums float32 holds
    g = torch.cat([part.cumsum(1) for part in decay.split(size, 1)], 1)
    h, dh = normal(2, chunks, wide, K, V), normal(2, chunks, wide, K, V)
    do, dv = normal(2, time, wide, V), normal(2, time, wide, V)
    for tensor in (leaves := [q, k, g]):
        tensor.requires_grad_()
    o, ends = chunks_of(q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2), v, h, g, scale, size)
    # a last, shorter chunk too: the decay of its end is that of its last step
    by_q, by_k, by_g = torch.autograd.grad((o, ends), leaves, (do, dh))
    expected = by_q, by_k, by_g / math.log(2)  # fla's g is to base 2, its gradient to base e
    written = torch.cat(
        [
            -(dv[:, i * size : (i + 1) * size].transpose(1, 2) @ h[:, i].mT).transpose(1, 2)
            for i in range(chunks)
        ],
        1,
    )
    turned = [x.mT if v_first else x for x in (h, dh)]
    dq, dk, dw, dg = gated_gradients(
        q, k, v, do, *turned, w, g, dv, scale, state_v_first=v_first, chunk_size=size
    )
    for actual, wanted in zip((dq, dk, dg, dw), (*expected, written), strict=True):
        torch.testing.assert_close(actual.double(), wanted, atol=2e-5, rtol=2e-5)
        assert actual.is_contiguous()  # fla's next kernel reads them as if they were


def test_kernels_that_go_wrong_keep_to_two_warps(monkeypatch):
    pytest.importorskip("fla.utils")
    monkeypatch.setattr("fla.utils.IS_NVIDIA_HOPPER", True)
    kernels = tuners()
    for tuner in kernels:
        monkeypatch.setattr(tuner, "configs", tuner.configs)
    keep_to_warps(kernels)
    warps = {}
    for tuner in kernels:
        module = tuner.base_fn.__module__.removeprefix("fla.ops.")
        warps[module, tuner.base_fn.__name__] = max(config.num_warps for config in tuner.configs)
    for kernel in (
        ("common.chunk_o", "chunk_bwd_kernel_dv"),
        ("common.chunk_o", "chunk_bwd_kernel_dv_local"),
        ("common.chunk_delta_h", "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64"),
        ("delta_rule.wy_fast", "prepare_wy_repr_bwd_kernel"),
        ("gated_delta_rule.wy_fast", "prepare_wy_repr_bwd_kernel"),
        ("comba.wy_fast", "prepare_wy_repr_bwd_kernel"),
        ("kda.chunk_bwd", "chunk_kda_bwd_kernel_wy_dqkg_fused"),
    ):
        assert warps[kernel] == 2
    assert warps["gla.chunk", "chunk_gla_bwd_kernel_intra"] > 2  # others stay as they were
