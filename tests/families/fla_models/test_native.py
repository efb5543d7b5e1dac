"""Families on fla's own classes: on its kernels where there is a GPU, else on its naive functions."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import longroll
from longroll.conformance import laws
from longroll.conformance.tiny import ON_GPU, build
from longroll.errors import LongrollError
from longroll.families import model_class
from longroll.families.fla_models.native import NATIVE, NativeCache, NativeFamily
from longroll.model import RecurrentLM
from zoo import tokens

HERE = Path(__file__).parent
has_fla = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("triton", "fla")),
    reason="needs flash-linear-attention and triton",
)
on_cpu = not torch.cuda.is_available()
DEVICE = "cpu" if on_cpu else "cuda"
TOLERANCE = 1e-5 if on_cpu else laws.IN_TF32


@pytest.mark.skipif(not on_cpu, reason="needs a machine without a GPU")
@pytest.mark.parametrize("model_type", NATIVE)
def test_what_is_missing_is_named(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(LongrollError, match=f"{model_type} models run on .* missing .*a CUDA GPU"):
        longroll.load(tmp_path)


@pytest.fixture
def fla(monkeypatch):
    """fla, such that it runs here."""
    if on_cpu:
        monkeypatch.setattr(sys, "path", [str(HERE), str(HERE.parents[2] / "recipes"), *sys.path])
        importlib.import_module("fla_parity").replace_kernels()
        classes = importlib.import_module("fla.models")
        monkeypatch.setattr(
            NativeFamily, "model_class", lambda self: getattr(classes, f"{self.name}ForCausalLM")
        )
        monkeypatch.setattr(
            NativeFamily,
            "cache",
            lambda self, model, ids, state: NativeCache(self, model.config.num_hidden_layers, state),
        )


def lm_of(name):
    return RecurrentLM(build(name).to(DEVICE))


@has_fla
@pytest.mark.parametrize("name", ON_GPU)
def test_laws(name, fla):
    pieces, ids = [70, 1, 2, 27], tokens(2, 101).to(DEVICE)
    lm = lm_of(name)
    state = laws.random_state(lm, 2)
    for gap in (
        laws.own_logits(lm.model, ids),
        laws.zero_state(lm, ids),
        laws.permutation(lm, ids, 9, [1, 0]),
        laws.chunking(lm, ids[:, 1:], pieces, state),
    ):
        assert gap.size <= TOLERANCE, gap
    for gap in (laws.chaining(lm, ids, pieces), laws.checkpointing(lm, ids, pieces)):
        assert gap.size <= 10 * TOLERANCE, gap
    assert laws.unreached(lm, ids, state) == []
    assert laws.unreached(lm, ids, state, checkpoint=True) == []


@has_fla
def test_the_power_of_the_laws_under_checkpointing(fla):
    """fla's own way: gradient checkpointing drops the cache, so segments start from zero."""
    lm = lm_of("kda")
    for layer in lm.model.model.layers:
        layer._can_checkpoint_with_cache = False
    assert laws.checkpointing(lm, tokens(2, 41).to(DEVICE), [20, 20]).size > 0.01


@has_fla
def test_attention_layers_are_refused(fla):
    model = build("gsa")
    model.config.attn = {"layers": [1], "num_heads": 2}  # fla builds such a model where flash-attn is
    with pytest.raises(LongrollError, match="attention layers"):
        RecurrentLM(model)


@has_fla
@pytest.mark.parametrize("name", ["mamba", "mamba2", "gla"])
def test_fla_in_the_auto_classes_changes_nothing(name, tmp_path):
    importlib.import_module("fla")
    assert AutoConfig.for_model(name).__class__.__module__.startswith("fla.")
    build(name).save_pretrained(tmp_path)
    lm = longroll.load(tmp_path, device="cpu")
    assert not type(lm.model).__module__.startswith("fla.")
    assert isinstance(lm.model, model_class(name))
