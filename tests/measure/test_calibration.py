"""Scales of the decays: found where they were planted, written as weights, and dt's are what they say."""

import math

import pytest
import torch
from planted import TRAIN_LENGTH, texts_of_twin, twin_lm
from typer.testing import CliRunner

import longroll
import zoo
from longroll import LongrollError, ops
from longroll.cli import app
from longroll.cli._posttrain import NO_GAIN
from longroll.history import history
from longroll.measure import position_loss
from longroll.measure.calibration import Calibration, _decays, _gain, calibrate, readings_of
from longroll.model import RecurrentLM
from longroll.results import read_result


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
    lm, text, done = slow_twin(64), texts_of_twin()[:, :257], []
    found = calibrate(lm, text, train_length=TRAIN_LENGTH, unit=unit, progress=done.append)
    assert all(len(scales) == (1 if unit == "layer" else 4) for scales in found.scales.values())
    assert sum(found.after) < sum(found.before) and "readings of 2,048 tokens" in found.sentence
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


def test_scales_that_gain_nothing_on_other_texts_are_taken_back():
    """One random text, that scales fit, and others, that they do not."""
    lm, other = zoo.lm_of("mamba2"), zoo.tokens(8, 129, seed=1)
    before = {name: weight.clone() for name, weight in lm.model.named_parameters()}
    found = calibrate(lm, zoo.tokens(1, 129), train_length=TRAIN_LENGTH, held_out=other)
    assert any(scale != 1 for some in found.scales.values() for scale in some)
    assert found.gain is not None and found.gain.texts == 8 and not found.gain.counts and not found.scaled
    assert "not worth it: the model is as it was" in found.sentence
    for name, weight in lm.model.named_parameters():
        assert torch.equal(weight, before[name])


def test_the_gain_is_measured_on_other_texts():
    lm, text = slow_twin(64), texts_of_twin()[:, :257]
    found = calibrate(lm, text[:2], train_length=TRAIN_LENGTH, held_out=text[2:], sweeps=0)
    assert found.gain is not None and found.gain.held_out and found.scaled
    after, before = (position_loss(one, text[2:]) for one in (lm, slow_twin(64)))
    gained = [before.between(a, b) - after.between(a, b) for a, b in found.octaves]
    assert found.gain.mean == pytest.approx(sum(gained) / len(gained), abs=1e-6)
    assert found.gain.low <= found.gain.mean <= found.gain.high


@pytest.mark.parametrize(
    ("before", "after", "counts"),
    [([2.0, 3.0], [1.9, 2.9], True), ([2.0, 3.0], [2.1, 2.7], False), ([2.0, 3.0], [1.995, 2.995], False),
     ([math.inf, 3.0], [9.0, 3.5], True), ([2.0, 3.0], [math.nan, 1.0], False)],
)  # fmt: skip
def test_a_gain_counts_beyond_its_interval(before, after, counts):
    """A loss that becomes finite is a gain, and one that no longer is is none."""
    losses = (torch.tensor(some)[:, None].double() for some in (before, after))
    assert _gain(*losses, held_out=True, seed=0).counts == counts


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

    arguments = [
        "calibrate",
        "specimen",
        "--train-length",
        "64",
        "--length",
        "2048",
        "--sequences",
        "2",
        "--sweeps",
        "0",
    ]
    app(
        [*arguments, "--output", str(tmp_path / "out"), "--json", str(tmp_path / "c.json")],
        standalone_mode=False,
    )
    found = read_result(tmp_path / "c.json")
    assert found.kind == "calibration" and found.passes == 8 and found.train_length == 64
    text = torch.randint(256, (1, 40))
    with torch.no_grad():
        here, _ = longroll.load(tmp_path / "out", device="cpu")(text)
        zoo.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(text).logits, here, 1e-4)
    (done,) = history(longroll.load(tmp_path / "out", device="cpu").model.config, "calibrate")
    assert done["scales"] == found.scales and found.gain["held_out"] and found.look["holds"] is False
    card = (tmp_path / "out" / "README.md").read_text()
    assert "specimen, calibrated by longroll" in card and f"{found.gain['texts']} held-out texts" in card
    with pytest.raises(LongrollError, match="out already holds a model"):
        app([*arguments, "--output", str(tmp_path / "out")], standalone_mode=False)


@pytest.mark.parametrize(
    ("force", "status", "said"), [(False, 0, "there is nothing to calibrate"), (True, NO_GAIN, "as it was")]
)
def test_a_model_that_holds_is_declined(force, status, said, tmp_path):
    """A random one, which reads all texts alike."""
    zoo.build("mamba2", vocab_size=256).save_pretrained(tmp_path / "model")
    out, json = str(tmp_path / "out"), str(tmp_path / "c.json")
    arguments = ["calibrate", str(tmp_path / "model"), "--train-length", "16", "--length", "64"]
    arguments += ["--sequences", "2", "--sweeps", "0", "--tokenizer", "bytes", "--output", out]
    ran = CliRunner().invoke(app, [*arguments, "--json", json, *(["--force"] if force else [])])
    found = read_result(tmp_path / "c.json")
    assert ran.exit_code == status and said in ran.output and not (tmp_path / "out").exists()
    assert found.output is None and not found.scaled and said in found.declined
    assert (found.look is None) == force
