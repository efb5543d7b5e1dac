"""The product by oneDNN against float64, and where it is taken."""

import pytest
import torch

from longroll.conformance import laws
from longroll.conformance.tiny import VOCAB, build
from longroll.model import RecurrentLM
from longroll.ops import _linear

needs_onednn = pytest.mark.skipif(not _linear._onednn(), reason="needs oneDNN and vectors of 512 bits")


@needs_onednn
@pytest.mark.parametrize("shape", [(2, 37, 48, 64), (1, 1, 5, 3), (3, 16, 128, 24)])
def test_products_and_gradients_are_near_float64(shape):
    torch.manual_seed(0)
    B, T, D, E = shape
    x, weight, dy = (torch.randn(s, dtype=torch.float64) for s in ((B, T, D), (E, D), (B, T, E)))
    given = [t.float().requires_grad_() for t in (x, weight)]
    exact = [t.requires_grad_() for t in (x, weight)]
    y, expected = _linear.linear(*given), torch.nn.functional.linear(*exact)
    found = (y, *torch.autograd.grad(y, given, dy.float()))
    for a, b in zip(found, (expected, *torch.autograd.grad(expected, exact, dy)), strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert (a.double() - b).norm() < 1e-6 * b.norm()


@needs_onednn
def test_a_frozen_weight_has_no_gradient():
    x = torch.randn(4, 8, requires_grad=True)
    _linear.linear(x, torch.randn(3, 8)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_and_small_weights_stay_with_pytorch(dtype):
    large = torch.randn(1024, 1024)
    assert _linear.is_faster(torch.randn(64, 1024), large) == _linear._onednn()
    assert not _linear.is_faster(torch.randn(64, 1024, dtype=dtype), large.to(dtype))
    assert not _linear.is_faster(torch.randn(64, 8), torch.randn(8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert not _linear.is_faster(torch.randn(64, 1024), large)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not _linear.is_faster(torch.randn(64, 1024), large)


@needs_onednn
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_models_that_multiply_by_onednn_learn_the_same(name, monkeypatch):
    ids = torch.randint(VOCAB, (2, 65), generator=torch.Generator().manual_seed(0))
    lm = RecurrentLM(build(name)).train()
    expected = laws.gradients(lm, ids, [64])
    taken = []
    monkeypatch.setattr(_linear, "LEAST", 1)
    product = _linear._product
    monkeypatch.setattr(_linear, "_product", lambda *a: taken.append(a) or product(*a))
    assert laws.gradient_gap(laws.gradients(lm, ids, [64]), expected).size < 1e-5
    assert taken
