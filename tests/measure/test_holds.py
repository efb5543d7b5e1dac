"""Readings held in the range of training, by loss: each against what it says it is."""

import re

import pytest
import torch

import zoo
from longroll import LongrollError
from longroll.cli import app
from longroll.measure import position_loss
from longroll.measure.holds import HOLDS, held_loss, loss_under, make_hold
from longroll.results import read_result

WINDOW, STRIDE = 32, 8


def fresh(lm, tokens, start, stop):
    """Loss of positions [start, stop) of a model that begins at `start`."""
    return position_loss(lm, tokens[:, start : stop + 1]).losses


@pytest.mark.parametrize("name", ["mamba2", "bamba", "qwen3_next", "gla_hybrid", "jamba", "rwkv7"])
def test_reset_is_a_fresh_start(name):
    lm, text = zoo.lm_of(name), zoo.tokens(2, 101)
    found = loss_under("reset", lm, text, WINDOW).losses
    for start in range(STRIDE, 100, STRIDE):
        begin, stop = max(0, start - (WINDOW - STRIDE)), min(start + STRIDE, 100)
        expected = fresh(lm, text, begin, stop)[:, start - begin :]
        zoo.assert_close(found[:, start:stop], expected, 1e-4)


@pytest.mark.parametrize("name", ["mamba2", "rwkv7"])
def test_without_attention_rescan_is_reset(name):
    lm, text = zoo.lm_of(name), zoo.tokens(2, 81)
    one, other = (loss_under(hold, lm, text, WINDOW).losses for hold in ("rescan", "reset"))
    zoo.assert_close(one, other, 1e-5)


@pytest.mark.parametrize("hold", HOLDS)
def test_a_hold_changes_nothing_up_to_its_window(hold):
    lm, text = zoo.lm_of("bamba"), zoo.tokens(3, 90)
    plain, found = position_loss(lm, text).losses, loss_under(hold, lm, text, WINDOW).losses
    zoo.assert_close(found[:, : WINDOW - STRIDE], plain[:, : WINDOW - STRIDE], 1e-4)
    assert (found[:, WINDOW + STRIDE :] - plain[:, WINDOW + STRIDE :]).abs().max() > 1e-6 or hold == "clip"


def test_reading_on_from_a_state():
    lm, text = zoo.lm_of("bamba"), zoo.tokens(2, 65)
    whole = held_loss(lm, text, lambda position, state: state, stride=STRIDE).losses
    with torch.no_grad():
        _, state = lm(text[:, :24])
    part = held_loss(lm, text, lambda p, s: s, stride=STRIDE, start=24, state=state, measured_from=40).losses
    zoo.assert_close(part[:, 40:], whole[:, 40:], 1e-5)
    assert part[:, :40].isnan().all()


def test_refusals():
    text = zoo.tokens(2, 65)
    for hold, name in (
        ("window", "mamba2"),
        ("window", "glm5_next"),
        ("window+first", "mamba2"),
        ("window+first", "bailing_hybrid"),
        ("rescan", "llama"),
        ("clip", "lfm2"),
    ):
        with pytest.raises(LongrollError, match=re.escape(f"`reading` {hold}:")):
            loss_under(hold, zoo.lm_of(name), text, WINDOW)
    with pytest.raises(LongrollError, match="not one of plain, reset"):
        make_hold("chunk", zoo.lm_of("bamba"), text, WINDOW, stride=STRIDE)
    with pytest.raises(LongrollError, match="give a longer one"):
        make_hold("window", zoo.lm_of("bamba"), text, STRIDE, stride=STRIDE)
    with pytest.raises(LongrollError, match="keeps 4 tokens besides"):
        make_hold("window+first", zoo.lm_of("bamba"), text, STRIDE + 4, stride=STRIDE)


def test_the_command_reads_under_a_hold_and_refuses_what_it_would_ignore(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 900)
    how = ["evaluate", "loss", "specimen", "--text", str(text), "--length", "300", "--sequences", "2"]
    how += ["--concatenate", "--device", "cpu"]
    app([*how, "--reading", "reset", "--json", str(tmp_path / "loss.json")], standalone_mode=False)
    found = read_result(tmp_path / "loss.json")
    assert found.reading == "reset" and found.window == 128
    for wrong, said in (
        (["--window", "64"], "--window 64.*--reading plain"),
        (["--reading", "clip", "--chunk-size", "64"], "--chunk-size 64.*--reading clip"),
        (["--reading", "chunk"], "--reading chunk is not one of plain"),
        (["--reading", "window"], "--reading window: .* no attention"),
    ):
        with pytest.raises(LongrollError, match=said):
            app([*how, *wrong], standalone_mode=False)
