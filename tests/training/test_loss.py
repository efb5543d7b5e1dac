"""The loss is PyTorch's cross-entropy, with its gradient."""

import pytest
import torch
import torch.nn.functional as F

from longroll.training import loss as module
from longroll.training.loss import next_token_loss
from zoo import assert_close


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [0, 5, 14])
def test_it_is_pytorchs(rows_at_once, dtype, ignored, monkeypatch):
    vocabulary = 11
    monkeypatch.setattr(module, "_AT_ONCE", rows_at_once * vocabulary)
    generator = torch.Generator().manual_seed(ignored)
    hidden = torch.randn(2, 7, 5, generator=generator)
    targets = torch.randint(vocabulary, (2, 7), generator=generator)
    targets.view(-1)[torch.randperm(14, generator=generator)[:ignored]] = -100
    head = torch.randn(vocabulary, 5, generator=generator)
    for items in (None, 3, torch.tensor(6)):
        found, exact = (hidden.clone().requires_grad_() for _ in range(2))
        loss = next_token_loss((30 * F.linear(found, head)).to(dtype), targets, items)
        logits = (30 * F.linear(exact, head)).to(dtype).double()
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        expected = expected / ((14 - ignored or 1) if items is None else items)
        assert_close(loss, expected, 1e-5)
        loss.backward()
        expected.backward()
        assert_close(found.grad, exact.grad, 1e-5 if dtype == torch.float32 else 1e-2)
        with torch.no_grad():
            assert_close(next_token_loss((30 * F.linear(found, head)).to(dtype), targets, items), loss, 1e-6)


def test_a_head_that_still_needs_its_logits_says_so():
    logits = torch.randn(1, 3, 4, requires_grad=True).tanh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        next_token_loss(logits, torch.zeros(1, 3, dtype=torch.long)).backward()


def test_a_target_outside_the_vocabulary_is_refused():
    logits = torch.randn(1, 3, 4, requires_grad=True) * 1
    for target in (-1, 4):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            next_token_loss(logits, torch.tensor([[0, target, -100]]))
