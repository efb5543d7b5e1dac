"""The decays learn at a rate of their own, and nothing is trained twice or left out."""

import pytest
from transformers import TrainingArguments

from longroll import InitialStateTrainer, LongrollError, PosttrainOptions
from longroll.training.lora import with_lora
from longroll.training.weights import DECAYS
from zoo import build

FAMILIES = ["mamba", "mamba2", "bamba", "kimi_linear", "qwen3_next", "gla", "rwkv7", "rwkv6", "rwkv", "xlstm"]
FAMILIES += ["zamba", "zamba2", "jamba"]


@pytest.mark.parametrize("family", [*FAMILIES, "recurrent_gemma"])
def test_every_parameter_is_in_one_group_and_only_decays_are_faster(family, tmp_path):
    model = build(family)
    arguments = TrainingArguments(output_dir=str(tmp_path), learning_rate=1e-3, use_cpu=True, report_to=[])
    trainer = InitialStateTrainer(model, arguments, decay_speed=30.0)
    groups = trainer.create_optimizer().param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups)
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(3e-2 if name.endswith(DECAYS) else 1e-3), name
    assert any(name.endswith(DECAYS) for name, _ in model.named_parameters())


@pytest.mark.parametrize(("family", "rank"), [("delta_net", 0), ("minimax", 0), ("mamba2", 2)])
def test_a_speed_that_nothing_learns_at_is_refused(family, rank, tmp_path):
    model = with_lora(build(family), rank)
    with pytest.raises(LongrollError, match="decay_speed"):
        InitialStateTrainer(model, TrainingArguments(output_dir=str(tmp_path)), decay_speed=30.0)


@pytest.mark.parametrize("speed", [0.0, -1.0, float("inf")])
def test_a_speed_that_is_none_is_refused(speed):
    with pytest.raises(LongrollError, match="decay_speed"):
        PosttrainOptions(length=8, decay_speed=speed)
