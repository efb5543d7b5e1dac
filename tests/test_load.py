import json
import subprocess
import sys

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM

import longroll
from longroll import LongrollError
from zoo import CONFIGS, RECURRENT, assert_same_state, build, lm_of, tokens


@pytest.fixture
def checkpoint(tmp_path):
    """A Mamba-2 folder."""
    folder = tmp_path / "model"
    build("mamba2").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_hf_checkpoint_in_hf_checkpoint_out(name, tmp_path):
    model, ids = build(name), tokens(2, 30)
    model.save_pretrained(tmp_path / "in")
    lm = longroll.load(tmp_path / "in", device="cpu")
    assert not lm.training and lm.device.type == "cpu" and lm.name == str(tmp_path / "in")
    logits, state = lm(ids)
    expected_logits, expected = lm_of(name)(ids)
    assert torch.equal(logits, expected_logits)
    assert_same_state(state, expected)
    lm.model.save_pretrained(tmp_path / "out")
    for key, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    ours, theirs = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("out", "in"))
    assert ours == theirs


ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}")
    ids = torch.load(f"{sys.argv[1]}/{name}/ids.pt")
    with torch.no_grad():
        torch.save(model(ids).logits, f"{sys.argv[1]}/{name}/alone.pt")
assert not any("longroll" in module for module in sys.modules)
"""


@torch.no_grad()
def test_transformers_alone_gives_the_same_logits(tmp_path):
    expected = {}
    for name in RECURRENT:
        build(name).save_pretrained(tmp_path / "in" / name)
        lm = longroll.load(tmp_path / "in" / name, device="cpu")
        lm.model.save_pretrained(tmp_path / name)
        ids = tokens(2, 30)
        torch.save(ids, tmp_path / name / "ids.pt")
        expected[name] = lm(ids)[0]
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path), *RECURRENT], check=True)
    for name, logits in expected.items():
        alone = torch.load(tmp_path / name / "alone.pt")
        torch.testing.assert_close(alone, logits, rtol=1e-4, atol=1e-5)


def test_dtypes(checkpoint):
    assert longroll.load(checkpoint, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    assert longroll.load(checkpoint, device="cpu", dtype=torch.float64).model.dtype == torch.float64
    assert longroll.load(checkpoint, device="cpu").model.dtype == torch.float32


def refused(source, *parts, **options):
    with pytest.raises(LongrollError) as caught:
        longroll.load(source, device="cpu", **options)
    for part in parts:
        assert str(part) in str(caught.value)


def test_a_missing_folder(tmp_path):
    refused(tmp_path / "nowhere", tmp_path / "nowhere", "check the path")
    refused("./nowhere", "./nowhere")


def test_a_file_instead_of_a_folder(checkpoint):
    refused(checkpoint / "config.json", "not a model folder")


def test_a_folder_without_config(tmp_path):
    refused(tmp_path, tmp_path, "no config.json")


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", '"mamba"', "\x00\x01"])
def test_a_broken_config(checkpoint, text):
    (checkpoint / "config.json").write_text(text)
    refused(checkpoint, checkpoint / "config.json")


def test_a_config_that_is_no_text(checkpoint):
    (checkpoint / "config.json").write_bytes(b"\xff\xfe\x9d")
    refused(checkpoint, checkpoint / "config.json")


@pytest.mark.parametrize("entries", [{"model_type": "bert"}, {"model_type": "no_such_thing"}, {}])
def test_an_unknown_architecture(checkpoint, entries):
    (checkpoint / "config.json").write_text(json.dumps(entries))
    refused(checkpoint, repr(entries.get("model_type")), "mamba2")


def test_truncated_weights(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(checkpoint, checkpoint)


def test_no_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    refused(checkpoint, checkpoint)


def test_missing_weights_are_named(checkpoint):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    gone = "backbone.layers.1.mixer.A_log"
    del weights[gone]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    refused(checkpoint, checkpoint, gone)


def test_weights_of_another_size(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    refused(checkpoint, checkpoint)


def test_a_hub_id_without_a_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("nobody/no-such-model-here", "nobody/no-such-model-here", "local folder")


@pytest.mark.parametrize("dtype", ["float33", "Tensor", "int64"])
def test_a_bad_dtype(checkpoint, dtype):
    refused(checkpoint, dtype, dtype=dtype)


@pytest.mark.parametrize("device", ["no-such-device", "cuda:99"])
def test_a_bad_device(checkpoint, device):
    with pytest.raises(LongrollError, match=f"`device` {device}"):
        longroll.load(checkpoint, device=device)


def test_nan_weights_are_refused_at_load(checkpoint):
    model = build("mamba2")
    with torch.no_grad():
        model.backbone.norm_f.weight[3] = float("nan")
    model.save_pretrained(checkpoint)
    refused(checkpoint, checkpoint, "backbone.norm_f.weight", "NaN")


def test_the_default_device_is_a_gpu_where_there_is_one(monkeypatch):
    there = {"cuda": False, "xpu": False, "mps": False}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there["cuda"])
    monkeypatch.setattr(torch.xpu, "is_available", lambda: there["xpu"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there["mps"])
    assert longroll.model.default_device() == "cpu"
    for name in ("mps", "xpu", "cuda"):
        there[name] = True
        assert longroll.model.default_device() == name


def test_a_model_that_fails_on_an_untried_device_runs_on_the_cpu(monkeypatch, caplog):
    """This machine has no such device, so that moving the model there fails as PyTorch fails."""
    monkeypatch.setattr("longroll.model.default_device", lambda: "xpu")
    lm = longroll.load("specimen")
    assert lm.device.type == "cpu" and lm.model.dtype == torch.float32
    assert "specimen does not run on xpu, so the CPU is used" in caplog.text


@pytest.mark.parametrize("length", ["{{", [4], float("inf")])
def test_a_training_length_that_is_no_number_is_one_line(length):
    lm = lm_of("mamba2")
    lm.model.config.train_length = length
    with pytest.raises(LongrollError, match=r"train_length .* is no length"):
        lm.find_train_length()
