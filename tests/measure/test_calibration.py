"""Scales of the decays: found where they were planted, written as weights, and dt's are what they say."""

import math

import pytest
import torch
from planted import TRAIN_LENGTH, texts_of_twin, twin_lm

import longroll
import zoo
from longroll import LongrollError, ops
from longroll.measure import position_loss
from longroll.measure.calibration import Calibration, _decays, calibrate, readings_of
from longroll.model import RecurrentLM


def slow_twin(factor: float) -> RecurrentLM:
    """The twin whose texts are read, with all its decay rates divided."""
    lm = zoo.lm_of("mamba2")
    lm.model.load_state_dict(twin_lm().model.state_dict())
    for name, weight in lm.model.named_parameters():
        if name.endswith("A_log"):
            weight.data -= math.log(factor)
    return lm


def test_a_planted_scale_is_found_again():
    lm = slow_twin(8)
    found = calibrate(lm, texts_of_twin()[:, :257], train_length=TRAIN_LENGTH, sweeps=0)
    ((scale,), *others) = found.scales.values()
    assert (
        4 <= scale <= 16 and others == [[scale]] and found.passes == 8
    )  # of the 7 tried, 8 and its neighbours


@pytest.mark.parametrize("unit", ["layer", "head"])
def test_the_model_has_the_scales_that_read_best(unit):
    lm, text, done = slow_twin(8), texts_of_twin()[:, :129], []
    found = calibrate(lm, text, train_length=TRAIN_LENGTH, unit=unit, progress=done.append)
    assert all(len(scales) == (1 if unit == "layer" else 4) for scales in found.scales.values())
    assert sum(found.after) < sum(found.before) and "readings of 1,024 tokens" in found.sentence
    assert done == list(range(1, found.passes + 1)) and found.passes <= readings_of(lm, "A", unit, 1)
    now = position_loss(lm, text)
    assert [now.between(*octave) for octave in found.octaves] == pytest.approx(found.after)


@pytest.mark.parametrize("name", ["mamba", "jamba", "mamba2", "bamba", "zamba2", "nemotron_h"])
def test_a_scale_of_dt_is_the_recurrence_with_longer_steps(name, monkeypatch):
    """Against the ops themselves, given dt times the scale."""
    lm, text, scale = zoo.lm_of(name), zoo.tokens(2, 30), 2.0
    for module in lm.modules():
        if hasattr(module, "variance_epsilon"):  # which does not scale; the activations here are as small
            module.variance_epsilon = 1e-14
    with torch.no_grad():
        plain, _ = lm(text)
        for op in ("ssd", "selective_scan"):
            real = getattr(ops, op)

            def longer(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, *, real=real, **more):
                low, high = more.pop("dt_limit", (0.0, math.inf))
                if dt_bias is not None:
                    dt = dt + dt_bias
                dt = torch.nn.functional.softplus(dt) if dt_softplus else dt
                return real(x, scale * dt.clamp(low, high), A, B, C, D, z, None, False, **more)

            monkeypatch.setattr(ops, op, longer)
        expected, _ = lm(text)
        monkeypatch.undo()
        for decay in _decays(lm, "dt", "layer"):
            decay.exponents.fill_(math.log2(scale))
            decay.write()
        found, _ = lm(text)
    assert (expected - plain).abs().max() > 1e-3
    zoo.assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "kimi_linear", "falcon_mamba", "gated_deltanet"])
def test_a_scale_of_a_is_one_of_the_log_decay(name):
    lm = zoo.lm_of(name)
    before = {n: w.clone() for n, w in lm.model.named_parameters()}
    for decay in _decays(lm, "A", "layer"):
        decay.exponents.fill_(1.0)
        decay.write()
    for n, weight in lm.model.named_parameters():
        expected = before[n] + math.log(2) if n.endswith("A_log") else before[n]
        assert torch.allclose(weight, expected)


def test_scales_of_one_are_said_to_leave_the_model_as_it_was():
    found = Calibration(
        "A", "layer", {"a": [1.0], "b": [1.0]}, [(0, 8), (8, 32)], [2.0, 3.0], [2.0, 3.0], 4, 64
    )
    assert found.sentence.startswith("4 readings of 16 tokens: no scale of A reads these texts of 32 tokens")


def test_refusals():
    text = zoo.tokens(4, 65)
    for name, how, said in (
        ("gla", {}, "gla has no decay rates"),
        ("mamba", {"unit": "head"}, "of channels, not of heads"),
        ("mamba2", {"unit": "head", "what": "dt"}, "a norm over all heads"),
        ("falcon_mamba", {"what": "dt"}, "FalconMambaMixer expresses a scale"),
        ("qwen3_next", {"what": "dt"}, "GatedDeltaNet expresses a scale"),
    ):
        with pytest.raises(LongrollError, match=said):
            calibrate(zoo.lm_of(name), text, train_length=16, **how)
    with pytest.raises(LongrollError, match="do not go past"):
        calibrate(zoo.lm_of("mamba2"), text, train_length=64)


def test_the_command_writes_an_ordinary_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM

    from longroll.cli import app
    from longroll.results import read_result

    arguments = ["calibrate", "specimen", "--length", "256", "--sequences", "2", "--sweeps", "0"]
    app(
        [*arguments, "--output", str(tmp_path / "out"), "--json", str(tmp_path / "c.json")],
        standalone_mode=False,
    )
    found = read_result(tmp_path / "c.json")
    assert found.kind == "calibration" and found.passes == 8 and found.train_length == 128
    text = torch.randint(256, (1, 40))
    with torch.no_grad():
        here, _ = longroll.load(tmp_path / "out", device="cpu")(text)
        zoo.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(text).logits, here, 1e-4)
    with pytest.raises(LongrollError, match="out already holds a model"):
        app([*arguments, "--output", str(tmp_path / "out")], standalone_mode=False)
