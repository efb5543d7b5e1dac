"""The six families of fla, held to fla 0.6.0 by what recipes/fla_parity.py wrote down."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import longroll
from families.fla_models.planted import plant, text
from longroll.conformance import laws
from longroll.errors import LongrollError
from longroll.families.fla_models import MODELS
from longroll.model import RecurrentLM
from longroll.state import RecurrentState
from zoo import assert_close, build, lm_of, tokens

LAYOUTS = json.loads((Path(__file__).parent / "layouts.json").read_text())
NAMES = ["gla", "gla_hybrid", "delta_net", "gated_deltanet", "retnet", "rwkv6", "rwkv7"]
every_case = pytest.mark.parametrize(
    "case", LAYOUTS["cases"], ids=[f"{case['model_type']}{i}" for i, case in enumerate(LAYOUTS["cases"])]
)
every_type = pytest.mark.parametrize("model_type", MODELS)
every_name = pytest.mark.parametrize("name", NAMES)


def of_case(case):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case["model_type"], **case["config"]))
    plant(model)
    return model.eval()


# ---- as fla


@every_case
def test_names_and_shapes_are_flas(case):
    shapes = {name: list(tensor.shape) for name, tensor in of_case(case).state_dict().items()}
    assert shapes == case["shapes"]


@every_case
@torch.no_grad()
def test_logits_are_flas(case):
    lm = RecurrentLM(of_case(case))
    ids = text(lm.vocab_size, 100)
    expected = torch.tensor(case["logits"]).view(2, 3, 4)
    assert_close(lm(ids)[0][:, [1, 50, 99], :4], expected, 2e-5, "one piece")
    assert_close(laws.read(lm, ids, [40, 1, 59])[0][:, [1, 50, 99], :4], expected, 2e-5, "three pieces")


@every_type
def test_configs_have_flas_defaults(model_type):
    config = AutoConfig.for_model(model_type).to_dict()
    defaults = LAYOUTS["defaults"][model_type]
    assert {key: config.get(key, "absent") for key in defaults} == defaults


@every_type
def test_the_auto_classes_know_them(model_type):
    config = AutoConfig.for_model(model_type, vocab_size=8, hidden_size=64, num_hidden_layers=1, num_heads=2)
    assert type(AutoModelForCausalLM.from_config(config)) is MODELS[model_type]
    assert type(AutoModel.from_config(config)) is MODELS[model_type].decoder


# ---- beside the laws, which families/test_laws.py holds them to


@every_name
@torch.no_grad()
def test_generation_is_reading_on(name):
    model, ids = build(name), tokens(2, 8)
    model.generation_config.eos_token_id = None
    generated = model.generate(ids, max_new_tokens=12, do_sample=False)
    for _ in range(12):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


@every_name
def test_labels_give_the_next_token_loss(name):
    model, ids = build(name), tokens(2, 20)
    output = model(ids, labels=ids, attention_mask=torch.ones_like(ids))
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_another_librarys_class_is_refused():
    model = build("llama")
    model.config.model_type = "gla"  # as fla's own class has
    with pytest.raises(
        LongrollError, match=r"LlamaForCausalLM is not longroll's class for gla: .* longroll.load"
    ):
        RecurrentLM(model)


def test_padding_is_refused():
    mask = torch.ones(2, 5)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="padding is not supported"):
        build("gla")(tokens(2, 5), attention_mask=mask)


@torch.no_grad()
def test_a_state_of_retnet_means_the_same_at_any_position():
    lm = lm_of("retnet", dtype=torch.float64)
    ids = tokens(2, 700)
    full, _ = lm(ids)
    logits = []
    state = None
    for piece in ids.split(7, dim=1):
        out, state = lm(piece, state)
        state = RecurrentState(state, seen=0)  # as StatePassing and TBPTT hand it on
        logits.append(out)
    assert_close(torch.cat(logits, dim=1), full, 1e-9)


@pytest.mark.parametrize(
    ("model_type", "options", "named"),
    [
        ("gla", {"attnres_block_size": 4}, "attnres_block_size = 4"),
        ("gla", {"hidden_act": "powlu"}, "hidden_act = 'powlu'"),
        ("gla", {"feature_map": "elu"}, "feature_map = 'elu'"),
        ("gla", {"attn": {}}, "attn = {}"),
        ("gla", {"attn": [{"layers": [2], "num_heads": 2}]}, "attn = [{'layers': [2], 'num_heads': 2}]"),
        ("gla", {"attn": {"layers": [0], "num_heads": 3}}, "attn = {'layers': [0], 'num_heads': 3}"),
        (
            "retnet",
            {"attn": {"layers": [0], "num_heads": 2, "window_size": 0}},
            "attn = {'layers': [0], 'num_heads': 2, 'window_size': 0}",
        ),
        ("retnet", {"expand_k": 0.3}, "expand_k = 0.3"),
        ("delta_net", {"qk_norm": "l1"}, "qk_norm = 'l1'"),
        ("delta_net", {"qk_activation": "gelu"}, "qk_activation = 'gelu'"),
        ("gated_deltanet", {"num_v_heads": 3}, "num_v_heads = 3"),
        ("gated_deltanet", {"output_gate_activation": "tanh"}, "output_gate_activation = 'tanh'"),
        ("rwkv6", {"hidden_act": "swiglu"}, "hidden_act = 'swiglu'"),
        ("rwkv7", {"value_dim": 64, "head_dim": 16}, "value_dim = [64, 64]"),
        ("rwkv7", {"head_dim": 24}, "head_dim = 24"),
        ("rwkv7", {"attn": {"layers": [0], "num_heads": 2}}, "attn = {'layers': [0], 'num_heads': 2}"),
    ],
)
def test_options_that_cannot_run_are_named(model_type, options, named, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} | sizes | options))
    save_file({"lm_head.weight": torch.zeros(8, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LongrollError) as error:
        longroll.load(tmp_path)
    assert f"{model_type} with {named} cannot run" in str(error.value)


@pytest.mark.parametrize("name", ["gla", "rwkv7"])
@torch.no_grad()
def test_arguments_of_transformers_are_heeded_or_refused(name):
    model, ids = build(name), tokens(1, 9)
    logits, *_ = model(ids, return_dict=False, output_hidden_states=False)
    assert torch.equal(logits, model(ids).logits)
    for refused in ({"cu_seqlens": torch.tensor([0, 4, 9])}, {"output_hidden_states": True}):
        with pytest.raises(ValueError, match=f"{next(iter(refused))} is not supported"):
            model(ids, **refused)


def test_a_checkpoint_with_weights_missing_is_refused(tmp_path):
    build("gla").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(LongrollError, match=r"weights are missing: \['model\.layers\.2"):
        longroll.load(tmp_path)
