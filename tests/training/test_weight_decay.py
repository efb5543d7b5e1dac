"""Weight decay shrinks matrices, in every family; rates, scales, shifts and convolutions stay."""

import re

import pytest
from torch import nn
from transformers import TrainingArguments
from transformers.pytorch_utils import Conv1D

from longroll import InitialStateTrainer
from longroll.training.lora import with_lora
from longroll.training.weights import DECAYS
from zoo import EVERY, build

EXPERTS = ("down_proj", "gate_up_proj", "gate_proj", "up_proj")
BARE = (
    *("x_proj_weight", "dt_proj_weight"),  # Zamba
    *("input_gate_weight", "recurrent_gate_weight"),  # RecurrentGemma
    *("rel_logits_proj.proj", "_hc.fn", "index_kpool_compress_gate"),  # Inkling, GLM-5-Next
)
NEVER = re.compile(
    r"A_log|\bD$|bias|norm|conv(1d|_1d)?\.weight$|time_|\.x_[rwkvag]$|bonus|[rk]_[ka]$|scale|\bmu$"
)


def decayed(model, folder, **options):
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], weight_decay=0.1)
    groups = InitialStateTrainer(model, arguments, **options).create_optimizer().param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(
        name for name, p in model.named_parameters() if p.requires_grad
    )
    return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}


@pytest.mark.parametrize("name", EVERY)
def test_matrices_decay_and_nothing_else(name, tmp_path):
    model = build(name)
    found = decayed(model, tmp_path)
    for parameter_name, parameter in model.named_parameters():
        owner = model.get_submodule(parameter_name.rpartition(".")[0])
        kind, leaf = type(owner).__name__, parameter_name.rpartition(".")[2]
        matrix = (
            (isinstance(owner, nn.Linear | nn.Embedding | Conv1D) and leaf == "weight")
            or (kind.endswith("Experts") and leaf in EXPERTS)
            or (kind.endswith(("Router", "Embedding")) and leaf == "weight")
            or parameter_name.endswith(BARE)
        )
        assert (parameter_name in found) == matrix, f"{parameter_name} of {kind} {tuple(parameter.shape)}"
        assert not (parameter_name in found and parameter_name.endswith(DECAYS))
    assert not [n for n in found if NEVER.search(n)]


@pytest.mark.parametrize("name", ["mamba", "zamba", "rwkv7"])
def test_faster_decays_do_not_decay(name, tmp_path):
    assert decayed(build(name), tmp_path, decay_speed=30.0) == decayed(build(name), tmp_path)


def test_adapters_decay(tmp_path):
    model = with_lora(build("mamba2"), 2)
    assert decayed(model, tmp_path) == {n for n, p in model.named_parameters() if "lora_" in n}


def test_what_is_marked_stays(tmp_path):
    model = build("mamba2")
    weight = model.backbone.layers[0].mixer.in_proj.weight
    weight._no_weight_decay = True  # as mamba-ssm marks
    assert not any(n.endswith("layers.0.mixer.in_proj.weight") for n in decayed(model, tmp_path))
