"""One view of heads: the norms are those of the numbers, and a factor reaches every number of its head."""

import pytest
import torch

from longroll.heads import channels_of, choose_heads, has_heads, head_norms, heads_of, scale_heads

SHAPES = [(3, 4, 5, 2), (3, 4, 5, 2, 6), (3, 7, 5), (3, 7), (3,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_view_holds_every_number_once(shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    heads = heads_of(tensor)
    assert heads.ndim == 4 and heads.shape[1] == (shape[1] if has_heads(tensor) else 1)
    assert torch.equal(heads.flatten(), tensor.flatten())
    assert channels_of(tensor).shape[:2] == (*shape[:2], 1)[:2]
    assert torch.equal(channels_of(tensor).flatten(), tensor.flatten())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_scale_norms(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    norms = head_norms(tensor)
    flat = tensor.double().reshape(len(tensor), norms.shape[1], -1)
    torch.testing.assert_close(norms.double(), flat.square().sum(dim=2).sqrt())
    factor = torch.rand(norms.shape, generator=generator).to(dtype)
    scaled = scale_heads(tensor, factor)
    assert scaled.shape == tensor.shape and scaled.dtype == dtype
    torch.testing.assert_close(
        head_norms(scaled).double(), norms.double() * factor.double(), rtol=0.02, atol=0
    )
    assert torch.equal(scale_heads(tensor, torch.tensor(2.0)), 2 * tensor)
    mask = factor > 0.5
    chosen = heads_of(choose_heads(mask, scaled, tensor))
    assert torch.equal(chosen[mask], heads_of(scaled)[mask])
    assert torch.equal(chosen[~mask], heads_of(tensor)[~mask])
