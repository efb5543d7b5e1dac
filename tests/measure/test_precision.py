"""The dtype is blamed for what it does, and only for that; the weights come back as they were."""

import math

import pytest
import torch

import zoo
from longroll import diagnose
from longroll.measure import precision
from longroll.measure.precision import LIMIT, Float16Watch, check_precision, in_float32

TRAIN_LENGTH = 16


def overflows_late(dtype: torch.dtype = torch.float16):
    """A model that adds to a layer's output what is too large for float16, after 64 tokens."""
    lm, seen = zoo.lm_of("mamba2", dtype=dtype), [0]
    lm.register_forward_pre_hook(
        lambda module, inputs: seen.__setitem__(0, inputs[1].seen if len(inputs) > 1 and inputs[1] else 0)
    )

    def loud(module, inputs, output):
        return (output.float() * 1e7).to(output.dtype) if seen[0] >= 64 else output

    lm.model.backbone.layers[1].mixer.out_proj.register_forward_hook(loud)
    return lm


def test_weights_come_back_as_they_were():
    lm = zoo.lm_of("mamba2", dtype=torch.float16)
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in lm.named_parameters()}
    with pytest.raises(ZeroDivisionError), in_float32(lm):
        assert {p.dtype for p in lm.parameters()} == {torch.float32}
        1 / 0  # noqa: B018
    for name, parameter in lm.named_parameters():
        same, place, values = before[name]
        assert parameter is same and parameter.data_ptr() == place and torch.equal(parameter, values)


def test_an_overflow_is_the_dtypes_fault():
    saved = []
    lm, texts = overflows_late(), zoo.tokens(4, 161)
    found = diagnose(lm, texts, train_length=TRAIN_LENGTH, chunk_size=32, save=saved.append)
    kept = found.to_json()
    assert kept["precision"]["dtype"] == "float16" and kept["precision"]["finite_in_float32"] is True
    assert 64 <= kept["precision"]["not_finite_from"] < 97
    assert "finite in float32: float16 overflows in" in found.sentence and "out_proj" in found.sentence
    assert found.advice.startswith("Read it in bfloat16") and "--dtype bfloat16" in kept["advice"]["command"]
    assert kept["advice"]["intervention"] is None and "State Passing" not in found.advice
    assert not lm.model.backbone.layers[1].mixer.in_proj._forward_hooks  # the watch is gone
    (early,) = saved  # as far as the losses tell, before anything is explained
    assert early.verdict == found.verdict and early.to_json()["curve"] == kept["curve"]


def test_what_is_not_finite_in_float32_either_is_not_the_dtypes_fault():
    lm = overflows_late()
    lm.model.backbone.layers[1].mixer.out_proj.register_forward_hook(lambda m, i, out: out * math.inf)
    found = diagnose(lm, zoo.tokens(4, 161), train_length=TRAIN_LENGTH, chunk_size=32, explain=False)
    assert found.details["precision"]["finite_in_float32"] is False
    assert "nor in float32" in found.sentence and "bfloat16" not in found.advice


def test_without_memory_for_float32_nothing_is_claimed(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 0})())
    found = diagnose(
        overflows_late(), zoo.tokens(4, 161), train_length=TRAIN_LENGTH, chunk_size=32, explain=False
    )
    assert found.details["precision"]["finite_in_float32"] is None
    assert "before any repair" in found.advice and "State Passing" not in found.advice


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_activations_near_the_limit_are_said(share):
    lm, texts = zoo.lm_of("mamba2", dtype=torch.float16), zoo.tokens(4, 65)
    largest = share * LIMIT
    lm.model.backbone.layers[0].mixer.out_proj.register_forward_hook(
        lambda m, i, out: out.clamp(-1, 1) * (largest / out.clamp(-1, 1).abs().max())
    )
    found = diagnose(lm, texts, train_length=TRAIN_LENGTH, explain=False)
    assert found.details["precision"]["largest"] == pytest.approx(largest, rel=0.01)
    assert found.details["precision"]["where"].startswith("backbone.layers.")
    assert ("near float16's limit" in found.sentence) == (share > precision.NEAR)


def test_what_float32_holds_is_said_too():
    """The scan of a Mamba-2 gives its norm more than float16 holds; longroll's losses are finite."""
    lm = zoo.lm_of("mamba2", dtype=torch.float16)
    with torch.no_grad():
        for mixer in (layer.mixer for layer in lm.model.backbone.layers):
            mixer.A_log.fill_(-8.0)
            mixer.in_proj.weight.mul_(16)
    found = diagnose(lm, zoo.tokens(4, 201), train_length=TRAIN_LENGTH, explain=False)
    assert found.details["precision"]["largest"] > LIMIT
    assert found.details["precision"]["where"].endswith("mixer.norm")
    assert "past float16's limit" in found.sentence and "held in float32 here" in found.sentence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_not_watched(dtype):
    lm, texts = zoo.lm_of("mamba2", dtype=dtype), zoo.tokens(4, 33)
    with Float16Watch(lm) as watch:
        assert not any(module._forward_hooks for module in lm.modules())
    carried = precision.position_loss(lm, texts)
    found = check_precision(lm, texts, carried, watch, TRAIN_LENGTH)
    assert found == precision.Precision(str(dtype).removeprefix("torch."))
    assert found.sentence is None and not found.suspect
