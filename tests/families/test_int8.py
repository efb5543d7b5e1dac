"""Layers in 8 bits: products of what the codes stand for, and states near those of the full weights."""

import pytest
import torch
from torch import nn

from longroll import RecurrentLM
from longroll.families.int8 import Int8Linear, holds_int8, restore, to_int8
from zoo import assert_close, build, tokens

FAMILIES = ["mamba", "mamba2", "falcon_h1", "nemotron_h", "qwen3_next", "gla", "rwkv7"]


def as_codes_say(name):
    """A model with plain weights that are the numbers of the codes of another one."""
    lm, plain = RecurrentLM(build(name)), RecurrentLM(build(name))
    to_int8(lm.model, lm.width)
    for path, layer in lm.model.named_modules():
        if isinstance(layer, Int8Linear):
            plain.model.get_submodule(path).weight.data.copy_(layer.weight)
    return lm, plain


@pytest.mark.parametrize("name", FAMILIES)
def test_products_states_and_gradients_are_those_of_the_numbers_that_codes_stand_for(name):
    lm, plain = as_codes_say(name)
    lm.self_check()
    ids, found = tokens(2, 40), []
    for model in (plain, lm):
        embeddings = model.model.get_input_embeddings().weight
        logits, state = model(ids)
        (grad,) = torch.autograd.grad(logits.float().square().sum(), embeddings)
        found.append((logits, state, grad))
    (logits, state, grad), (ours, our_state, our_grad) = found
    assert_close(ours, logits, 1e-5)
    assert_close(our_grad, grad, 1e-4)
    for key in state:
        assert_close(our_state[key], state[key], 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_states_stay_near_those_of_the_full_weights_however_long_the_text(name):
    lm, ids = RecurrentLM(build(name)), tokens(2, 512)
    full = [lm(ids[:, :length])[1] for length in (32, 512)]
    to_int8(lm.model, lm.width)
    for length, before in zip((32, 512), full, strict=True):
        _, after = lm(ids[:, :length])
        for key in before:
            if key.part == "recurrent":
                apart = (after[key] - before[key]).norm() / before[key].norm()
                assert apart < 0.06, (str(key), length)


def test_what_decides_the_decays_keeps_its_numbers():
    lm, full = RecurrentLM(build("mamba2")), build("mamba2")
    to_int8(lm.model, lm.width)
    for path, layer in lm.model.named_modules():
        if path.endswith("in_proj"):
            weight = full.get_submodule(path).weight
            heads = lm.model.config.num_heads
            assert torch.equal(layer.weight[-heads:], weight[-heads:])
            step = weight[:-heads].abs().amax(dim=1, keepdim=True) / 127
            assert ((layer.weight - weight)[:-heads].abs() <= 0.501 * step).all()
            assert layer.codes.dtype == torch.int8
    assert sum(p.numel() for p in lm.model.parameters()) == sum(p.numel() for p in full.parameters())
    linear = {path for path, module in lm.model.named_modules() if isinstance(module, nn.Linear)}
    eight = {path for path, module in lm.model.named_modules() if isinstance(module, Int8Linear)}
    assert linear - eight == {"lm_head"}
    dtypes = {key: p.dtype for key, p in lm.model.named_parameters() if not key.endswith("codes")}
    assert set(dtypes.values()) == {torch.float32}


def test_backward_keeps_no_copy_of_a_weight():
    layer = Int8Linear(nn.Linear(64, 128, bias=False), 0, None, True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 64, requires_grad=True))
    assert sum(t.nbytes for t in kept) == 64 * 128 + 4 * 128


def test_autocast_multiplies_in_its_dtype():
    layer = Int8Linear(nn.Linear(64, 96), 8, None, False)
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        expected = nn.functional.linear(x, layer.weight, layer.bias)
    assert y.dtype == expected.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert_close(y, expected, 0.02)


def test_shared_weights_are_held_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    to_int8(model, 8)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear, Int8Linear]
    restore(model)
    assert not holds_int8(model) and type(model[2]) is nn.Linear


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_multiplies_the_same_numbers():
    torch.manual_seed(0)
    plain = nn.Linear(512, 768, bias=False, dtype=torch.bfloat16)
    layer = Int8Linear(plain, 16, torch.device("cuda"), True)
    here = Int8Linear(plain, 16, None, False)
    assert torch.equal(layer.codes.cpu(), here.codes) and torch.equal(layer.weight.cpu(), here.weight)
    assert layer.full.device.type == "cpu" and layer.codes.device.type == "cuda"
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    wide = here.weight.double()
    assert_close(y.double().cpu(), x.detach().double().cpu() @ wide.T, 0.01)
    assert_close(grad.double().cpu(), torch.ones(64, 768).double() @ wide, 0.01)
