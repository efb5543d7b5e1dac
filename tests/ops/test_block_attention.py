"""Attention over keys and values in blocks is attention over all of them."""

import pytest
import torch

from longroll.ops._block_attention import block_attention


def _drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def _expected(q, k, v, past, scale):
    """The definition, in float64."""
    keys = torch.cat([*(k for k, _ in past), k], dim=2).double()
    values = torch.cat([*(v for _, v in past), v], dim=2).double()
    keys, values = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (keys, values))
    scores = q.double() @ keys.mT * scale
    later = torch.ones_like(scores, dtype=torch.bool).triu(1 + keys.shape[2] - q.shape[2])
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_blocks_are_attended_to_as_one(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows, kv, groups, time, size = draw(1, 4), draw(1, 4), draw(1, 5), draw(1, 40), draw(1, 33)
    width = size if seed % 2 else draw(1, 33)  # of values
    q = _drawn(rows, kv * groups, time, size, dtype=dtype) * 3
    k = _drawn(rows, time, kv, size, dtype=dtype).transpose(1, 2)  # strided, as projections give them
    v = _drawn(rows, kv, time, width, dtype=dtype)
    lengths = [draw(1, 70) for _ in range(draw(0, 5))]
    past = [
        (_drawn(rows, kv, n, size, dtype=dtype) * 2, _drawn(rows, kv, n, width, dtype=dtype)) for n in lengths
    ]
    scale = None if seed < 3 else 0.3
    found = block_attention(q, k, v, past, scale)
    expected = _expected(q, k, v, past, size**-0.5 if scale is None else scale)
    assert found.dtype == dtype
    error = ((found.double() - expected).norm() / expected.norm()).item()
    assert error < {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]


def test_autocast_does_not_lower_the_sums() -> None:
    torch.manual_seed(0)
    q, k, v = (_drawn(1, 2, 9, 8, dtype=torch.float32) for _ in range(3))
    past = [(_drawn(1, 2, 30, 8, dtype=torch.float32), _drawn(1, 2, 30, 3, dtype=torch.float32))]
    past = [(keys, torch.cat([values, values, values[..., :2]], dim=-1)) for keys, values in past]
    with torch.autocast("cpu", torch.bfloat16):
        found = block_attention(q, k, v[..., :8], past)
    assert torch.equal(found, block_attention(q, k, v[..., :8], past))
