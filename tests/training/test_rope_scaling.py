"""Scaled rotary positions: in transformers' own words, so that what is saved reads alike everywhere."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import longroll
from longroll import LongrollError, RecurrentLM, StatePassing
from longroll.data import Corpus
from longroll.families._rope import RopeScaling, rope_frequencies, scale_rope, scaled_rope
from longroll.training import PosttrainOptions, posttrain
from zoo import VOCAB, assert_close, build, tokens

T = 16


def repaired(name, scaling, folder, **options):
    ids = np.random.default_rng(0).integers(0, VOCAB, 400).astype(np.int32)
    corpus = Corpus(ids, np.array([0, 400], dtype=np.int64), len(ids))
    lm = RecurrentLM(build(name))
    how = PosttrainOptions(length=T, steps=2, batch_size=2, rope_scaling=scaling, **options)
    posttrain(lm, corpus, StatePassing(), how, folder)
    return lm


@pytest.mark.parametrize(
    ("name", "scaling"),
    [("bamba", "yarn:4"), ("granitemoehybrid", "linear:8"), ("falcon_h1", "ntk:4"), ("qwen3_5", "yarn:2.5")],
)
def test_a_saved_model_reads_alike_everywhere(name, scaling, tmp_path, caplog):
    lm = repaired(name, scaling, tmp_path / "out")
    kind, factor = scaling.split(":")
    entry = json.loads((tmp_path / "out/config.json").read_text())["rope_parameters"]
    assert entry["rope_type"] == ("default" if kind == "ntk" else kind)
    assert kind == "ntk" or entry["factor"] == float(factor)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (
        config.max_position_embeddings == T * float(factor)
        and config.longroll["posttrain"][-1]["rope_scaling"] == scaling
    )
    text = tokens(2, 3 * T)
    with torch.no_grad():
        here, _ = lm(text)
        elsewhere = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(text).logits
        again, _ = longroll.load(tmp_path / "out", device="cpu")(text)
    assert_close(elsewhere, here, 1e-5)
    assert_close(again, here, 1e-5)
    assert "implicit factor" not in caplog.text


@pytest.mark.parametrize("name", ["mamba2", "gla", "bamba_recurrent", "qwen3_next_recurrent"])
def test_a_model_without_attention_is_refused(name, tmp_path):
    """Also one whose config has rotary positions."""
    with pytest.raises(LongrollError, match=r"has no attention whose positions could be scaled: leave"):
        repaired(name, "linear:4", tmp_path / "out")


@pytest.mark.parametrize("name", ["jamba", "nemotron_h", "zamba", "kimi_linear"])
def test_attention_that_reads_no_rope_config_is_refused_by_name(name, tmp_path):
    with pytest.raises(LongrollError, match=f"^{name} has no attention that reads a RoPE config.*leave"):
        repaired(name, "yarn:4", tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_other_refusals(tmp_path):
    for wrong in ("yarn", "yarn:1", "yarn:x", "dynamic:4", "linear:nan", "linear:inf", ""):
        with pytest.raises(LongrollError, match=r"`rope_scaling`.*as yarn:4"):
            PosttrainOptions(length=T, rope_scaling=wrong)
    lm = RecurrentLM(build("bamba"))
    scale_rope(lm.model, RopeScaling("yarn", 4), T)
    with pytest.raises(LongrollError, match=r"scaled already \(yarn\)"):
        scale_rope(lm.model, RopeScaling("linear", 2), T)
    for name in ("lfm3", "zaya"):
        with pytest.raises(LongrollError, match="different rotary positions for different layers"):
            scale_rope(build(name), RopeScaling("yarn", 4), T)
    with pytest.raises(LongrollError, match="yarn:4 cannot be had of recurrent_gemma"):
        scale_rope(build("recurrent_gemma"), RopeScaling("yarn", 4), T)
    with pytest.raises(LongrollError, match=r"no word for it.*ntk:4"):
        scale_rope(build("gla_hybrid"), RopeScaling("yarn", 4), T)


@pytest.mark.parametrize(
    ("name", "again"), [("bamba", "ntk:4"), ("bamba", "linear:2"), ("gla_hybrid", "ntk:4")]
)
def test_a_base_raised_by_an_earlier_run_is_not_scaled_again(name, again, tmp_path):
    """Its config has a larger base, and no other word for it than the record of the run."""
    repaired(name, "ntk:4", tmp_path / "once")
    lm = longroll.load(tmp_path / "once", device="cpu")
    with pytest.raises(LongrollError, match=r"scaled already \(ntk:4, by post-training\)"):
        scale_rope(lm.model, RopeScaling.parse(again), T)


@pytest.mark.parametrize("kind", ["linear", "yarn", "ntk"])
@pytest.mark.parametrize("name", ["bamba", "zamba2", "gla_hybrid"])
def test_a_scaling_is_undone_after_the_block(name, kind):
    lm, text = RecurrentLM(build(name)).eval(), tokens(2, 40)
    with torch.no_grad():
        before, _ = lm(text)
        try:
            with scaled_rope(lm.model, RopeScaling(kind, 4), T):
                inside, _ = lm(text)
        except LongrollError:
            assert name == "gla_hybrid" and kind != "ntk"
            inside = None
        after, _ = lm(text)
    assert torch.equal(before, after) and (inside is None or not torch.equal(before, inside))


def test_frequencies_against_their_definitions():
    model = build("llama")
    plain = rope_frequencies(model)
    with scaled_rope(model, RopeScaling("linear", 4), T):
        assert_close(rope_frequencies(model), plain / 4, 1e-6)
    with scaled_rope(model, RopeScaling("ntk", 4), T):
        found = rope_frequencies(model)
        assert found[0] == plain[0]
        assert_close(found[-1:], plain[-1:] / 4, 1e-6)  # the slowest pair turns `factor` times slower
    with scaled_rope(model, RopeScaling("yarn", 4), T):
        expected, sharper = ROPE_INIT_FUNCTIONS["yarn"](model.config)
        assert_close(rope_frequencies(model), expected.double(), 1e-6)
        assert model.model.rotary_emb.attention_scaling == sharper == pytest.approx(0.1 * np.log(4) + 1)
