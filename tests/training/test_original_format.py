"""`--format original`: checkpoints of state-spaces and BlinkDL keep their names, shapes and dtypes."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as HFTokens
from tokenizers import models
from transformers import PreTrainedTokenizerFast

import longroll
from families.fla_models.blinkdl import Sizes, weights_6, weights_7
from families.test_original_mamba import SSM, make_weights, write
from longroll import TBPTT, LongrollError, PosttrainOptions, StatePassing
from longroll.data import Corpus, load_tokenizer
from longroll.training import posttrain
from longroll.training.saving import opened_as, save_original
from zoo import assert_close, build

VOCAB = 60
OPTIONS = {"length": 8, "steps": 3, "batch_size": 2, "learning_rate": 1e-2, "format": "original"}
CORPUS = Corpus(np.random.default_rng(0).integers(0, VOCAB, 900).astype(np.int32), np.array([0, 900]), 900)
DECAYS = ("A_log", "dt_bias", "time_decay", "w0")  # in float32, where the rest is in 16 bits


def narrow(weights, dtype):
    return {name: t if name.endswith(DECAYS) else t.to(dtype) for name, t in weights.items()}


def state_spaces(kind, tied, dtype):
    def make(folder):
        folder.mkdir()
        weights = narrow(make_weights(SSM[kind], tied=tied), dtype)
        if tied:
            weights["lm_head.weight"] = weights["backbone.embedding.weight"]
        write(folder, SSM[kind], tied=tied, weights=weights)
        return folder

    return make


def rwkv(make_weights, dtype, **sizes):
    def make(folder):
        folder.mkdir()
        file = folder / "RWKV-tiny-ctx4096.pth"
        torch.save(narrow(make_weights(Sizes(vocab=VOCAB, **sizes)), dtype), file)
        return file

    return make


CHECKPOINTS = {
    **{
        f"{kind}-{tied}": state_spaces(
            kind, tied == "tied", torch.float16 if kind[-1] == "2" else torch.float32
        )
        for kind in SSM
        for tied in ("tied", "untied")
    },
    "rwkv7": rwkv(weights_7, torch.bfloat16),
    "rwkv7-one-layer": rwkv(weights_7, torch.float32, layers=1, heads=3),
    "rwkv6": rwkv(weights_6, torch.bfloat16, rank=5),
    "rwkv6-three-layers": rwkv(weights_6, torch.float32, layers=3),
}
every_checkpoint = pytest.mark.parametrize("make", CHECKPOINTS.values(), ids=CHECKPOINTS)


def read_file(place):
    return torch.load(place if place.is_file() else place / "pytorch_model.bin", weights_only=True)


def logits(place):
    with torch.no_grad():
        return longroll.load(place, device="cpu")(torch.arange(50)[None])[0]


@every_checkpoint
def test_what_was_not_trained_comes_back_bit_by_bit(make, tmp_path):
    source = make(tmp_path / "in")
    lm = longroll.load(source, device="cpu")
    (tmp_path / "out").mkdir()
    save_original(lm.model, tmp_path / "out", lm.checkpoint)
    place = opened_as(tmp_path / "out", lm.checkpoint, "original")
    before, after = read_file(source), read_file(place)
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    weights = source if source.is_file() else source / "pytorch_model.bin"
    written = place if place.is_file() else place / "pytorch_model.bin"
    assert written.stat().st_size <= weights.stat().st_size + 4096  # no tensor is in it twice
    assert torch.equal(logits(place), logits(source))


@pytest.mark.parametrize("name", ["mamba1-tied", "mamba2-untied", "rwkv7", "rwkv6"])
def test_a_trained_model_goes_back(name, tmp_path):
    source = CHECKPOINTS[name](tmp_path / "in")
    lm = longroll.load(source, device="cpu")
    log = posttrain(lm, CORPUS, StatePassing(), PosttrainOptions(**OPTIONS), tmp_path / "out")
    assert log[-1]["loss_saved"] == pytest.approx(log[-1]["loss_trained"], abs=0.1)
    place = opened_as(tmp_path / "out", lm.checkpoint, "original")
    before, after = read_file(source), read_file(place)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    still = {n for n, t in before.items() if torch.equal(t, after[n])}
    assert all(n.startswith("blocks.0.att.v") for n in still), still
    again = longroll.load(place, device="cpu")
    assert again.train_length == 8 and again.checkpoint.layout == lm.checkpoint.layout
    for ours, theirs in zip(again.model.parameters(), lm.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0.01, atol=1e-3)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert "library_name" not in (tmp_path / "out" / "README.md").read_text()
    if source.is_dir():
        assert (place / "config.json").read_bytes() == (source / "config.json").read_bytes()
    with pytest.raises(LongrollError, match="already holds a model"):
        posttrain(lm, CORPUS, None, PosttrainOptions(**OPTIONS), tmp_path / "out")
    posttrain(again, CORPUS, TBPTT(), PosttrainOptions(**OPTIONS), tmp_path / "twice")
    assert "post-trained before: sp (3 steps)" in (tmp_path / "twice" / "README.md").read_text()


def test_another_layout_is_refused_before_the_run(tmp_path):
    build("mamba2").save_pretrained(tmp_path / "in")
    lm = longroll.load(tmp_path / "in")
    with pytest.raises(LongrollError, match=r"came in the layout of transformers.*leave it out"):
        posttrain(lm, CORPUS, None, PosttrainOptions(**OPTIONS), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(LongrollError, match="transformers, original"):
        PosttrainOptions(**OPTIONS | {"format": "gguf"})


@pytest.mark.parametrize("content", ["{", "[]", '{"train_length": "8"}', '{"train_length": 0}'])
def test_a_damaged_file_beside_is_named(content, tmp_path):
    source = CHECKPOINTS["rwkv7"](tmp_path / "in")
    source.with_name(f"{source.name}.longroll.json").write_text(content)
    with pytest.raises(LongrollError, match=r"ctx4096\.pth\.longroll\.json"):
        longroll.load(source)


@pytest.mark.parametrize("name", ["mamba2-untied", "rwkv7"])
def test_the_tokenizer_is_found_beside_the_model(name, tmp_path):
    source = CHECKPOINTS[name](tmp_path / "in")
    words = models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=HFTokens(words), pad_token="w1").save_pretrained(tmp_path / "t")
    lm, tokenizer = longroll.load(source, device="cpu"), load_tokenizer(tmp_path / "t")
    options = PosttrainOptions(**OPTIONS | {"lora_rank": 2})
    posttrain(lm, CORPUS, None, options, tmp_path / "out", tokenizer=tokenizer)
    place = opened_as(tmp_path / "out", lm.checkpoint, "original")
    assert load_tokenizer(model_path=place).encode("w7").tolist() == [7]
    with torch.no_grad():  # the adapters are merged
        assert_close(logits(place), lm(torch.arange(50)[None])[0], 0.02)


def test_the_tokenizer_is_moved_into_place_with_the_model(tmp_path):
    class Tokenizer:
        def save(self, folder):
            assert not (tmp_path / "out" / "config.json").exists()
            (folder / "tokenizer.json").write_text(json.dumps({}))

    build("mamba2").save_pretrained(tmp_path / "in")
    options = PosttrainOptions(**OPTIONS | {"format": "transformers"})
    posttrain(longroll.load(tmp_path / "in"), CORPUS, None, options, tmp_path / "out", tokenizer=Tokenizer())
    assert (tmp_path / "out" / "tokenizer.json").exists()
