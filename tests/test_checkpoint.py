"""Every tensor of a checkpoint's files is used, copied or named; adapters open on their base."""

import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

import longroll
from longroll import LongrollError, RecurrentLM
from longroll.checkpoint import stored_tensors
from longroll.training.lora import with_lora
from longroll.training.saving import save_checkpoint
from zoo import assert_close, build, tokens


def add(folder, extra):
    file = folder / "model.safetensors"
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("qwen3_next", "mtp.fc.weight"),  # which its class is told to ignore
        ("qwen3_5", "mtp.layers.0.input_layernorm.weight"),
        ("mamba2", "backbone.layers.1.mixer.rotary.weight"),
        ("mamba2", "value_head.weight"),
        ("rwkv7", "model.layers.1.ffn.s_emb.weight"),
    ],
)
def test_what_the_class_does_not_hold_is_named_and_copied(name, extra, tmp_path, caplog):
    build(name).save_pretrained(tmp_path / "in")
    tensor = torch.randn(3, 5)
    add(tmp_path / "in", {extra: tensor})
    with caplog.at_level(logging.WARNING, "longroll"):
        lm = longroll.load(tmp_path / "in")
    (line,) = (r.getMessage() for r in caplog.records if r.name == "longroll")
    assert extra in line and "1 tensors" in line
    assert lm.checkpoint.unused == (extra,)
    save_checkpoint(lm.model, tmp_path / "out", lm.checkpoint)
    written, read = stored_tensors(tmp_path / "out"), stored_tensors(tmp_path / "in")
    assert written.keys() == read.keys()
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[extra], tensor)
    assert torch.equal(longroll.load(tmp_path / "out")(tokens(1, 9))[0], lm(tokens(1, 9))[0])


@pytest.mark.parametrize("name", ["jamba", "qwen3_next", "glm5_next", "gpt2", "granitemoehybrid"])
def test_a_whole_checkpoint_has_nothing_left_over(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    assert longroll.load(tmp_path).checkpoint.unused == ()


def test_a_checkpoint_in_shards_and_in_pickles(tmp_path):
    model = build("mamba2")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    build("mamba2").save_pretrained(tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save(model.half().state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    assert longroll.load(tmp_path / "shards").checkpoint.dtype == torch.float32
    assert longroll.load(tmp_path / "pickle").checkpoint.dtype == torch.float16


@pytest.fixture
def adapted(tmp_path):
    """A base, an adapter folder, and peft's model of both."""
    build("mamba2").save_pretrained(tmp_path / "base")
    base = longroll.load(tmp_path / "base").model
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["in_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, model


@torch.no_grad()
def test_an_adapter_folder_opens_through_its_base(adapted):
    folder, model = adapted
    ids = tokens(2, 20)
    lm = longroll.load(folder / "adapter")
    assert_close(lm(ids)[0], model(ids).logits, 1e-5)
    assert (lm(ids)[0] - longroll.load(folder / "base")(ids)[0]).abs().max() > 0.1
    shutil.copy(folder / "base" / "config.json", folder / "adapter")  # as trainers leave it
    assert_close(longroll.load(folder / "adapter")(ids)[0], model(ids).logits, 1e-5)


def test_an_adapter_that_cannot_be_read_is_refused(adapted):
    folder, _ = adapted
    file = folder / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    shutil.copy(folder / "base" / "model.safetensors", folder / "adapter")
    with pytest.raises(LongrollError, match=r"whole weights and an adapter: remove adapter_config\.json"):
        longroll.load(folder / "adapter")
    (folder / "adapter" / "model.safetensors").unlink()
    file.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(LongrollError, match="base_model_name_or_path"):
        longroll.load(folder / "adapter")
    file.write_text(json.dumps(config | {"base_model_name_or_path": str(folder / "gone")}))
    with pytest.raises(LongrollError, match="gone is not a model folder"):
        longroll.load(folder / "adapter")
    file.write_text(json.dumps(config))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(LongrollError, match="cannot be merged into its base"):
        longroll.load(folder / "adapter")


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "jamba", "rwkv7"])
def test_a_peft_model_is_read_with_its_adapters(name):
    model = with_lora(build(name), 2)
    ids = tokens(2, 20)
    plain = RecurrentLM(build(name))(ids)[0]
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.normal_(std=0.1)
    lm = RecurrentLM(model)
    lm.self_check()
    assert_close(lm(ids)[0], model(ids).logits, 1e-4)
    assert (lm(ids)[0] - plain).abs().max() > 1e-3
    assert lm.adapted is model


def test_adapters_of_the_prompt_are_refused():
    model = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(LongrollError, match="tokens to the prompt"):
        RecurrentLM(model)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_quantised_weights_are_read_as_what_they_stand_for(name, bits, tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    build(
        name, hidden_size=64, vocab_size=256, **({"num_heads": 8} if name == "mamba2" else {})
    ).save_pretrained(tmp_path / "in")
    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in", quantization_config=how, device_map="cpu")
    model.save_pretrained(tmp_path / "quantised")
    with pytest.raises(LongrollError, match="dequantize"):
        RecurrentLM(model)
    with caplog.at_level(logging.WARNING, "longroll"):
        lm = longroll.load(tmp_path / "quantised")
    assert [r for r in caplog.records if "is quantised (bitsandbytes" in r.getMessage()]
    ids = tokens(2, 20)
    expected = model(ids).logits  # with a gradient: bitsandbytes' inference on a CPU wants other sizes
    assert_close(lm(ids)[0], expected, 1e-4 if bits == 4 else 0.3)  # 8 bits round activations too
    assert lm.model.dtype == torch.float32 and lm.checkpoint.unused == ()
    save_checkpoint(lm.model, tmp_path, lm.checkpoint)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_close(longroll.load(tmp_path)(ids)[0], lm(ids)[0], 0.05)


def test_a_model_that_cannot_be_dequantised_is_refused(tmp_path, monkeypatch):
    build("mamba2").save_pretrained(tmp_path)
    model = type(build("mamba2"))
    monkeypatch.setattr(model, "is_quantized", True, raising=False)
    with pytest.raises(LongrollError, match="open the checkpoint that it was made from"):
        longroll.load(tmp_path)
