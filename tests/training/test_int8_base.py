"""Adapters on layers in 8 bits are merged into the weights before them; what 8 bits cannot do is refused."""

import logging

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

import longroll
from longroll import LongrollError
from longroll.data import Corpus
from longroll.measure import calibrate
from longroll.training import InitialStateTrainer, PosttrainOptions, posttrain
from zoo import VOCAB, build, tokens

CORPUS = Corpus(np.random.default_rng(0).integers(0, VOCAB, 900).astype(np.int32), np.array([0, 900]), 900)


class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("interrupted", [False, True])
def test_adapters_are_merged_into_the_weights_before_8_bits(tmp_path, caplog, interrupted):
    build("falcon_h1").save_pretrained(tmp_path / "in")
    with caplog.at_level(logging.WARNING, "longroll"):
        lm = longroll.load(tmp_path / "in", dtype="int8")
    assert "numbers are in 8 bits, the rest in float32" in caplog.text
    options = PosttrainOptions(
        length=16, steps=6, batch_size=2, lora_rank=2, learning_rate=0.01, save_steps=2
    )
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            posttrain(lm, CORPUS, "sp", options, tmp_path / "out", callbacks=[Killed()])
        lm = longroll.load(tmp_path / "in", dtype="int8")
    log = posttrain(lm, CORPUS, "sp", options, tmp_path / "out", resume=interrupted)
    assert abs(log[-1]["loss_saved"] - log[-1]["loss_trained"]) < 0.1
    assert not lm.int8 and lm.device.type == "cpu"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = dict(build("falcon_h1").named_parameters())
    changed = {key for key, p in saved.named_parameters() if not torch.equal(p, before[key])}
    assert set(before) == set(dict(saved.named_parameters()))
    assert changed and all(before[key].ndim == 2 for key in changed)
    for key in changed:  # adapters alone: what is added has their rank
        assert torch.linalg.matrix_rank((saved.get_parameter(key) - before[key]).double(), rtol=1e-4) <= 2
    if interrupted:
        whole = longroll.load(tmp_path / "in", dtype="int8")
        posttrain(whole, CORPUS, "sp", options, tmp_path / "whole")
        for key, parameter in whole.model.named_parameters():
            assert torch.equal(parameter, lm.model.get_parameter(key)), key


@pytest.mark.filterwarnings("ignore")
def test_what_8_bits_cannot_do_is_refused_with_the_mend(tmp_path, monkeypatch):
    build("mamba2").save_pretrained(tmp_path / "in")
    lm = longroll.load(tmp_path / "in", dtype="int8")
    options = PosttrainOptions(length=16, steps=2, batch_size=2)
    with pytest.raises(LongrollError, match="give `lora_rank`"):
        posttrain(lm, CORPUS, "sp", options, tmp_path / "out")
    with pytest.raises(LongrollError, match="adapters alone"):
        InitialStateTrainer(lm.model, intervention="sp")
    with pytest.raises(LongrollError, match="`fsdp`"):
        sharded = PosttrainOptions(length=16, steps=2, batch_size=2, lora_rank=2, fsdp=True)
        posttrain(lm, CORPUS, "sp", sharded, tmp_path / "out")
    with pytest.raises(LongrollError, match="no checkpoint"):
        lm.model.save_pretrained(tmp_path / "out")
    with pytest.raises(LongrollError, match="plain weights"):
        calibrate(lm, tokens(2, 65), train_length=16)
    with pytest.raises(LongrollError, match="one device"):
        longroll.load(tmp_path / "in", dtype="int8", device_map="auto")
    with pytest.raises(LongrollError, match="`dtype` int32 holds no model"):
        longroll.load(tmp_path / "in", dtype="int32")
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(LongrollError, match="no large linear layer"):
        longroll.load(tmp_path / "gpt2", dtype="int8")
    assert not (tmp_path / "out").exists()
