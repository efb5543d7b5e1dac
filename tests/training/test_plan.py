"""A plan is what a step allocates; what does not fit is said, and what is no config is refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import zoo
from longroll import LongrollError, RecurrentLM
from longroll.cli import app
from longroll.cli._plan import _bytes, _train_length
from longroll.conformance.tiny import build
from longroll.dry_run import Ledger
from longroll.outline import outline
from longroll.training import PosttrainOptions
from longroll.training.loss import hidden_loss
from longroll.training.plan import Memory, Outline, Setting, fitting_line, outline_of, settings_for, what_fits


def taken(name: str, rows: int, length: int) -> int:
    """Bytes at the peak of a real step, weights and moments of AdamW included."""
    with Ledger() as ledger:
        lm = RecurrentLM(build(name)).train()
        before = ledger.start()
        ids = torch.zeros(rows, length, dtype=torch.long)
        hidden, _final = lm(ids, lm.zero_state(rows), logits=False)
        hidden_loss(lm, hidden, ids).backward()
        peak = ledger.peak - before
    return peak + 3 * sum(p.nbytes for p in lm.parameters())


@pytest.mark.parametrize("name", ["mamba2", "gla"])
def test_training_takes_what_is_planned(name):
    lm = zoo.lm_of(name)
    planned = outline_of(lm).training(Setting(rows=3, length=40, autocast=False))
    assert planned.total == pytest.approx(taken(name, 3, 40), rel=0.01)
    assert planned.weights == planned.gradients == sum(p.nbytes for p in lm.parameters())
    assert planned.optimizer == 2 * planned.weights


def test_settings_take_less_in_turn_and_the_first_that_fits_is_found():
    subject = outline_of(zoo.lm_of("mamba2"))
    asked = Setting(rows=16, length=64, autocast=False)
    whole = subject.training(asked)
    adapters = subject.training(Setting(rows=16, length=64, lora_rank=2, autocast=False))
    shards = subject.training(Setting(rows=16, length=64, shards=4, autocast=False))
    assert adapters.optimizer < whole.optimizer and adapters.total < whole.total
    assert shards.optimizer == whole.optimizer // 4 and shards.states == whole.states
    scales = subject.training(Setting(rows=16, length=64, trainable="scales", autocast=False))
    assert 0 < scales.gradients < 0.1 * whole.gradients and scales.optimizer == 2 * scales.gradients
    assert scales.weights == whole.weights and scales.total < whole.total
    assert len(settings_for(asked, 1)) == 5 and len(settings_for(asked, 2)) == 10
    assert not any(setting.lora_rank and setting.trainable != "all" for setting in settings_for(asked, 2))
    least = settings_for(asked, 2, int8=subject.takes_int8)[-1]
    assert (
        least.int8
        and least.shards == 1
        and least.arguments == ("`lora_rank` 16 `dtype` int8 `gradient_checkpointing`")
    )
    assert all(setting.int8 for setting in settings_for(least, 2, int8=True))
    assert subject.training(least).weights < 0.7 * subject.training(replace(least, int8=False)).weights
    assert not outline_of(zoo.lm_of("gpt2")).takes_int8
    assert what_fits(subject, asked, whole.total) == asked
    found = what_fits(subject, asked, 0.3 * whole.total)
    assert found != asked and subject.training(found).total <= 0.3 * whole.total
    assert what_fits(subject, asked, 1000) is None
    assert isinstance(whole, Memory) and str(whole).count("GiB") == 1


def test_replicas_hold_gradients_twice_unless_they_are_sharded():
    subject = outline_of(zoo.lm_of("mamba2"))
    one, many, sharded = (
        subject.training(Setting(rows=2, length=64, autocast=False, **how))
        for how in ({}, {"replicas": 4}, {"replicas": 4, "shards": 4})
    )
    assert many.total - one.total == one.gradients and sharded.gradients == one.gradients // 4


def test_a_reading_over_gpus_takes_the_fullest_share():
    subject = outline_of(zoo.lm_of("bamba"))
    one, two, many = (subject.reading(2, 256, 64, gpus) for gpus in (1, 2, 100))
    assert one.weights / 2 < two.weights < one.weights and many.weights < two.weights
    assert two.keys_and_values >= one.keys_and_values / 2 and two.states >= one.states / 2
    assert two.activations == many.activations == one.activations and two.logits == one.logits


def test_what_would_fit_is_named_where_memory_is_short(monkeypatch):
    options = PosttrainOptions(length=64, batch_size=16)
    lm = zoo.lm_of("mamba2")
    assert fitting_line(lm, options) == ""
    monkeypatch.setattr("longroll.training.plan.memory_of", lambda _: 6_000_000)
    assert "rows with" in fitting_line(lm, options)


def run(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command_plans_the_specimen(tmp_path):
    file = tmp_path / "plan.json"
    done = run("specimen", "--batch-size", "4", "--sequences", "2", "--memory", "0.5", "--json", str(file))
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert (
        found["parameters"] == sum(p.numel() for p in zoo.specimen().parameters())
        if hasattr(zoo, "specimen")
        else found["parameters"] > 3e5
    )
    assert {row["name"] for row in found["rows"]} >= {"reading", "all weights", "LoRA 16"}
    for row in found["rows"]:
        assert row["total"] == sum(row["memory"].values()) and row["tokens_per_second"] > 0
    assert "steps" in found["sentence"]
    assert "--trainable scales" in {row["setting"] for row in found["rows"]}


def test_a_model_without_recurrence_is_read_and_not_trained(tmp_path):
    zoo.lm_of("gpt2").model.config.save_pretrained(tmp_path)
    done = run(str(tmp_path), "--memory", "1", "--length", "64", "--sequences", "1", "--batch-size", "1")
    assert done.exit_code == 0 and "no recurrent layer" in " ".join(done.output.split()), done.output
    assert "LoRA" not in done.output


def test_layers_over_several_gpus_are_planned():
    where = ("--device", "auto", "--gpus", "2", "--memory", "1")
    done = run("specimen", *where, "--sequences", "1", "--length", "512")
    assert done.exit_code == 0 and "over" in done.output, done.output


@pytest.mark.parametrize("memory", ["inf", "nan", "1e400"])
def test_memory_is_a_finite_number(memory):
    done = run("specimen", "--memory", memory)
    assert isinstance(done.exception, LongrollError) and "--memory" in str(done.exception)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"model_type": "mamba2", "num_hidden_layers": 10**9}, "num_hidden_layers 1,000,000,000 is no size"),
        ({"model_type": "mamba2", "num_hidden_layers": 0}, "num_hidden_layers 0 leaves no layer"),
        ({"model_type": "mamba2", "hidden_size": -3}, "no model has this config.json"),
        ({"model_type": "mamba2", "hidden_size": "wide"}, "no model has this config.json"),
        ({"model_type": "bamba", "layer_types": [["deep"]]}, "bamba|config.json"),
        ({"model_type": "no such thing"}, "no such thing"),
        ([], "JSON object"),
    ],
)
def test_hostile_configs_are_refused_in_one_line(entries, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(LongrollError, match=said) as refused:
        _ = Outline(*outline(tmp_path)).sizes
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "found"),
    [("80", 80 * 2**30), ("80GB", 80 * 10**9), ("79.6 GiB", int(79.6 * 2**30)), ("512mb", 512 * 10**6)],
)
def test_a_size_of_memory_may_have_its_unit(given, found):
    assert _bytes(given) == found


@pytest.mark.parametrize("given", ["inf", "nan", "1e300", "9" * 400, "0", "-3", "80 people", "", "0.00001"])
def test_what_is_no_size_of_memory_is_refused(given):
    with pytest.raises(LongrollError, match="no size of a device"):
        _bytes(given)


@pytest.mark.parametrize("stated", [0, "many", -5, None, [64]])
def test_a_training_length_that_is_none_is_not_taken(stated):
    assert _train_length(SimpleNamespace(train_length=stated, context_length=512)) == 512
