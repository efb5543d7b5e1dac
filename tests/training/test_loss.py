"""The loss is PyTorch's cross-entropy, with its gradient."""

import pytest
import torch
import torch.nn.functional as F

from longroll.training import loss as module
from longroll.training.loss import next_token_loss
from zoo import VOCAB, assert_close, assert_same_state, lm_of, tokens


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


@pytest.mark.parametrize("tokens_at_once", [5, 1000])
def test_it_is_float64_in_float64(tokens_at_once, monkeypatch):
    monkeypatch.setattr(module, "LOGITS", tokens_at_once * VOCAB)
    monkeypatch.setattr(module, "_WIDTHS", 0)
    lm, ids = lm_of("mamba2").train(), tokens(2, 14)
    lm.model.double()
    loss, _ = module.loss_and_state(lm, ids[:, :-1], ids[:, 1:])
    loss.backward()
    found = {name: p.grad.clone() for name, p in lm.named_parameters()}
    lm.model.zero_grad()
    logits = lm.family.head(lm.model, lm(ids[:, :-1], logits=False)[0])  # transformers makes them float32
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    assert loss.dtype == torch.float64
    assert_close(loss, expected, 1e-13)
    for name, p in lm.named_parameters():
        assert_close(found[name], p.grad, 1e-11, name)


@pytest.mark.parametrize("name", ["mamba2", "granitemoehybrid", "recurrent_gemma", "gla", "xlstm"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tokens_at_once", [1, 5, 1000])
def test_in_pieces_it_is_the_whole(name, bf16, frozen, tokens_at_once, monkeypatch):
    """Heads that scale, cap and share their weights with the embedding; targets that count not."""

    def measured(pieces: int):
        monkeypatch.setattr(module, "LOGITS", pieces * VOCAB)
        monkeypatch.setattr(module, "_WIDTHS", 0)
        lm, ids = lm_of(name).train(), tokens(2, 14)
        lm.model.get_output_embeddings().requires_grad_(not frozen)
        targets = ids[:, 1:].masked_fill(ids[:, 1:] % 5 == 0, -100)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, state = module.loss_and_state(lm, ids[:, :-1], targets)
        (3 * loss).backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            assert_close(module.loss_and_state(lm, ids[:, :-1], targets)[0], loss, 1e-5)
        return loss, state, {key: p.grad for key, p in lm.named_parameters() if p.grad is not None}

    (loss, state, gradients), (whole, final, expected) = measured(tokens_at_once), measured(10**9)
    assert_close(loss, whole, 1e-5)
    assert_same_state(state, final)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        assert_close(gradient, expected[key], 2e-2 if bf16 else 1e-4, key)


@pytest.mark.parametrize(("gradient", "pieces"), [(True, 3), (False, 12)])
def test_pieces_are_of_some_widths_of_the_model_where_there_is_a_gradient(gradient, pieces, monkeypatch):
    """Of 24 tokens: two at once, or four times as many where a piece adds to the head's gradient."""
    monkeypatch.setattr(module, "LOGITS", 2 * VOCAB)
    lm, ids = lm_of("mamba2").train(), tokens(2, 13)
    heads = []
    lm.model.get_output_embeddings().register_forward_hook(lambda *_: heads.append(1))
    with torch.set_grad_enabled(gradient):
        module.loss_and_state(lm, ids[:, :-1], ids[:, 1:])
    assert len(heads) == pieces
    if gradient:
        monkeypatch.setattr(module, "_WIDTHS", 0)
        heads.clear()
        module.loss_and_state(lm, ids[:, :-1], ids[:, 1:])
        assert len(heads) == 12


def test_float16_is_not_taken_to_pieces(monkeypatch):
    """Its gradients want the scale that comes only with backward."""
    monkeypatch.setattr(module, "LOGITS", VOCAB)
    monkeypatch.setattr(module, "_WIDTHS", 0)
    monkeypatch.setattr(module, "_InPieces", None)
    lm, ids = lm_of("mamba2").train(), tokens(2, 14)
    with torch.autocast("cpu", torch.float16):
        assert module.loss_and_state(lm, ids[:, :-1], ids[:, 1:])[0].isfinite()


def test_a_head_that_still_needs_its_logits_says_so():
    logits = torch.randn(1, 3, 4, requires_grad=True).tanh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        next_token_loss(logits, torch.zeros(1, 3, dtype=torch.long)).backward()


def test_a_target_outside_the_vocabulary_is_refused():
    logits = torch.randn(1, 3, 4, requires_grad=True) * 1
    for target in (-1, 4):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            next_token_loss(logits, torch.tensor([[0, target, -100]]))
