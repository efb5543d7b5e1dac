"""16-bit checkpoints train in float32 weights and come back in 16 bits, without losing what was learned."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import longroll
from longroll import (
    InitialStateMixin,
    InitialStateTrainer,
    LongrollError,
    PosttrainOptions,
    RecurrentLM,
    StatePassing,
)
from longroll.data import Corpus, Windows
from longroll.training import posttrain
from longroll.training.lora import with_lora
from longroll.training.weights import projects
from zoo import VOCAB, build

SIXTEEN = [torch.bfloat16, torch.float16]
CORPUS = Corpus(np.random.default_rng(0).integers(0, VOCAB, 900).astype(np.int32), np.array([0, 900]), 900)


class Mixed(InitialStateMixin, Trainer):
    """A host's trainer, whose loss and weights are its own."""


def run(lm, output, **options):
    options = {"length": 8, "steps": 3, "batch_size": 2, "learning_rate": 3e-4, "weight_decay": 0.1} | options
    return posttrain(lm, CORPUS, StatePassing(), PosttrainOptions(**options), output)


@pytest.mark.parametrize(
    ("name", "dtype", "bf16"),
    [
        ("mamba2", SIXTEEN[0], None),
        ("mamba", SIXTEEN[1], None),
        ("rwkv7", SIXTEEN[0], True),
        ("gla", SIXTEEN[1], False),
    ],
)
@pytest.mark.parametrize("trainable", ["scales", "decays"])
def test_what_is_frozen_in_16_bits_is_multiplied(name, dtype, bf16, trainable, tmp_path):
    build(name, dtype=dtype).save_pretrained(tmp_path / "in")
    lm = longroll.load(tmp_path / "in", dtype="auto", device="cpu")
    run(lm, tmp_path / "out", trainable=trainable, bf16=bf16)
    assert torch.isfinite(lm(torch.zeros(1, 4, dtype=torch.long))[0]).all()  # as it is left in memory
    saved, start = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(tmp_path / "in" / "model.safetensors"),
    )
    matrices = projects(lm.model) & set(start)
    assert {saved[key].dtype for key in matrices} == {dtype}
    kept = {key for key in start if torch.equal(saved[key], start[key])}
    assert matrices <= kept and kept < set(start)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mamba2", SIXTEEN[0]), ("mamba", SIXTEEN[1]), ("jamba", SIXTEEN[0]), ("rwkv7", SIXTEEN[1])],
)
def test_everything_learns_and_the_file_keeps_it(name, dtype, tmp_path):
    before = build(name, dtype=dtype)
    before.save_pretrained(tmp_path / "in")
    lm = longroll.load(tmp_path / "in", dtype="auto")
    log = run(lm, tmp_path / "out")
    start = dict(before.named_parameters())
    for key, parameter in lm.model.named_parameters():
        assert parameter.dtype == torch.float32
        moved = (parameter != start[key].float()).float().mean()
        assert moved > (0.3 if "embed" in key else 0.9), key  # some words were not read
    matrices = projects(lm.model)
    saved = longroll.load(tmp_path / "out")
    assert saved.checkpoint.dtype == dtype
    files = load_file(tmp_path / "out" / "model.safetensors")
    for key, parameter in lm.model.named_parameters():
        if key in files:
            assert files[key].dtype == (dtype if key in matrices else torch.float32), key
            assert torch.equal(files[key], parameter.to(files[key].dtype)), key
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype)[6:]
    assert log[-1]["saved_dtype"] == str(dtype)[6:]
    assert log[-1]["loss_trained"] == pytest.approx(log[-1]["loss_saved"], abs=0.05)
    assert not list((tmp_path / "out").glob(".*"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n") and "states by `sp`" in card
    assert all(line in card for line in ("| steps | 3 |", "| weight_decay | 0.1 |", "| transformers | "))


def test_transformers_opens_it_in_the_checkpoints_dtype(tmp_path):
    build("mamba2", dtype=torch.bfloat16).save_pretrained(tmp_path / "in")
    run(longroll.load(tmp_path / "in"), tmp_path / "out")  # in float32, as on a CPU
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    A_log = exact.backbone.layers[0].mixer.A_log
    assert not torch.equal(A_log, A_log.bfloat16().float())  # float32 in the file, for who reads it so


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_lora_leaves_the_frozen_base_in_16_bits(dtype, tmp_path):
    model = with_lora(build("mamba2", dtype=dtype), 2)
    arguments = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    data = Windows(CORPUS, 8, num_items=64)
    InitialStateTrainer(model, arguments, intervention=StatePassing(), train_dataset=data).train()
    for key, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else dtype), key


def test_bf16_weights_say_what_they_cost(tmp_path, caplog):
    lm = RecurrentLM(build("mamba2", dtype=torch.bfloat16))
    start = lm.model.backbone.layers[0].mixer.A_log.clone()
    with caplog.at_level(logging.WARNING, "longroll"):
        run(lm, tmp_path / "out", weights="bf16")
    (line,) = (r.getMessage() for r in caplog.records if r.name == "longroll")
    assert "1/256" in line and "`weights` bf16" in line and "\n" not in line
    files = load_file(tmp_path / "out" / "model.safetensors")
    name = "backbone.layers.0.mixer.A_log"
    assert files[name].dtype == torch.float32 and (files[name] != start.float()).all()
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "options", [{"weights": "fp8"}, {"weights": "bf16", "lora_rank": 2}, {"weights": "bf16", "bf16": False}]
)
def test_weights_that_cannot_be_held_are_refused(options):
    with pytest.raises(LongrollError, match="`weights`"):
        PosttrainOptions(length=8, **options)


def test_trainer_saves_16_bits_and_resumes_from_32(tmp_path):
    model = build("mamba2", dtype=torch.bfloat16)
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = InitialStateTrainer(
        model, arguments, intervention=StatePassing(), train_dataset=Windows(CORPUS, 8, num_items=64)
    )
    trainer.train()
    trainer.save_model(tmp_path / "end")
    name = "backbone.layers.0.mixer.in_proj.weight"
    assert load_file(tmp_path / "run/checkpoint-1/model.safetensors")[name].dtype == torch.float32
    assert load_file(tmp_path / "end/model.safetensors")[name].dtype == torch.bfloat16
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "trainer", "said"),
    [
        (torch.bfloat16, Mixed, "trained in bfloat16, which loses small updates: decays"),
        (torch.float16, Mixed, "trained in float16"),
        (torch.float32, Mixed, None),
        (torch.bfloat16, InitialStateTrainer, None),  # which widens the weights
    ],
)
def test_a_host_that_trains_16_bits_is_told_what_is_lost(dtype, trainer, said, tmp_path, caplog):
    model = build("mamba2", dtype=dtype)
    with caplog.at_level(logging.WARNING, "longroll"):
        trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]), intervention="sp")
    lines = [record.getMessage() for record in caplog.records if record.name == "longroll"]
    assert [said in line and "dtype=torch.float32" in line for line in lines] == ([True] if said else [])
