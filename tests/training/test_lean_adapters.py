"""Adapters without needless passes: peft's numbers, bit for bit where the scale is a power of two."""

import copy

import pytest
import torch
from torch import nn

from longroll.training.lora import lean
from zoo import assert_close

peft = pytest.importorskip("peft")


def pair(dtype, seed=0, **settings):
    """peft's adapted layers, and the same ones made lean; adapters that do something."""
    torch.manual_seed(seed)
    sizes = torch.randint(3, 40, (3,)).tolist()
    body = nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.SiLU(), nn.Linear(sizes[1], sizes[2])).to(dtype)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "2"]} | settings
    plain = peft.get_peft_model(body, peft.LoraConfig(**settings))
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32)
    return plain, lean(copy.deepcopy(plain)), torch.randn(2, 5, sizes[0], dtype=dtype)


def result(model, x, *, autocast):
    """Outputs, the gradient of the input, and those of the adapters."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, True), (torch.float32, False)])
def test_the_bits_are_pefts(dtype, autocast, seed):
    plain, fast, x = pair(dtype, seed)
    for ours, theirs in zip(*(result(m, x, autocast=autocast) for m in (fast, plain)), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "settings", [{"lora_alpha": 3}, {"lora_bias": True}, {"use_dora": True}, {"use_rslora": True}]
)
def test_other_adapters_keep_their_numbers(settings):
    plain, fast, x = pair(torch.float32, **settings)
    for ours, theirs in zip(*(result(m, x, autocast=False) for m in (fast, plain)), strict=True):
        assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("change", ["disabled", "merged", "two"])
def test_what_peft_switches_stays_its_own(change):
    models = pair(torch.float32)
    found = []
    for model in models[:2]:
        if change == "two":
            model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
            model.base_model.set_adapter(["default", "other"])
            for name, parameter in model.named_parameters():
                if ".other." in name:
                    torch.nn.init.constant_(parameter, 0.1)
        if change == "merged":
            model.merge_adapter()
        with model.disable_adapter() if change == "disabled" else torch.no_grad(), torch.no_grad():
            found.append(model(models[2]))
    torch.testing.assert_close(found[1], found[0])


def test_no_wide_copy_of_the_input_is_made():
    """Under autocast the input goes into the adapter as it is."""
    seen = []

    def note(_module, inputs):
        seen.append(inputs[0].dtype)

    for model in (models := pair(torch.bfloat16))[:2]:
        model.base_model.model[0].lora_A["default"].register_forward_pre_hook(note)
        result(model, models[2], autocast=True)
    assert seen == [torch.float32, torch.bfloat16]
