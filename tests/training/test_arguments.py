"""Every argument of Trainer is tested, neutral or refused, and an unknown one is refused by name."""

import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DynamoBackend
from test_trainer import quick_collections
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from longroll import InitialStateTrainer, LongrollError, StatePassing
from longroll.training import _arguments
from longroll.training._arguments import ACCELERATOR_CONFIG, TRAINER, TRAINING_ARGUMENTS
from zoo import build

__all__ = ["quick_collections"]  # a fixture of each test here

_ADDED = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # by transformers 5.23


@pytest.mark.parametrize(
    ("names", "table", "added"),
    [
        ([f.name for f in dataclasses.fields(TrainingArguments)], TRAINING_ARGUMENTS, _ADDED),
        ([f.name for f in dataclasses.fields(AcceleratorConfig)], ACCELERATOR_CONFIG, set()),
        (list(inspect.signature(Trainer.__init__).parameters)[1:], TRAINER, set()),
    ],
    ids=["TrainingArguments", "accelerator_config", "Trainer"],
)
def test_every_argument_of_this_transformers_is_decided(names, table, added):
    assert set(names) - set(table) == set(), "decide what becomes of these, in training/_arguments.py"
    assert set(table) - set(names) <= added
    assert all(row.reason for row in table.values())


def test_the_documented_table_is_this_one():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    for table in (TRAINING_ARGUMENTS, ACCELERATOR_CONFIG, TRAINER):
        for name, row in table.items():
            assert any(
                f"`{name}`" in line and f"| {row.verdict} | {row.reason} |" in line for line in lines
            ), name


def trainer(folder, args=None, **given):
    options = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "save_strategy": "no"}
    fields = {k: v for k, v in given.items() if k in TRAINING_ARGUMENTS}
    rest = {k: v for k, v in given.items() if k not in fields}
    args = TrainingArguments(**options, **fields) if args is None else args
    return InitialStateTrainer(build("mamba2"), args, intervention=StatePassing(), **rest)


REFUSED = {
    "torch_compile": True,
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "auto_find_batch_size": True,
    "enable_jit_checkpoint": True,
    "dataloader_in_order": False,
    "label_names": ["targets"],
    "ddp_static_graph": True,
    "accelerator_config": {"split_batches": True},
    "activation_checkpointing_kwargs": {"use_reentrant": True},
    "model_init": lambda: build("mamba2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_before_the_first_step(name, tmp_path):
    if name not in {f.name for f in dataclasses.fields(TrainingArguments)} | set(TRAINER):
        pytest.skip("not in this transformers")
    with pytest.raises(LongrollError, match=r"split_batches|" + name) as error:
        trainer(tmp_path, **{name: REFUSED[name]})
    assert "\n" not in str(error.value)


def test_the_rows_that_are_refused_have_a_case():
    rows = {
        n for table in (TRAINING_ARGUMENTS, TRAINER) for n, row in table.items() if row.verdict == "refused"
    }
    assert rows - set(REFUSED) == {"parallelism_config", "deepspeed"}  # these need packages of their own


def test_a_field_that_a_newer_transformers_adds_is_refused_by_name(tmp_path, monkeypatch):
    newer = dataclasses.make_dataclass("Newer", [("fresh_option", int, 0)], bases=(TrainingArguments,))
    options = {"output_dir": str(tmp_path), "use_cpu": True}
    trainer(tmp_path, newer(**options))
    with pytest.raises(LongrollError, match=r"fresh_option=1.*does not know it"):
        trainer(tmp_path, newer(**options, fresh_option=1))
    with pytest.raises(LongrollError, match="predict_with_generate"):
        trainer(tmp_path, Seq2SeqTrainingArguments(**options, predict_with_generate=True))
    monkeypatch.delitem(_arguments.ACCELERATOR_CONFIG, "non_blocking")
    with pytest.raises(LongrollError, match="non_blocking=True"):
        trainer(tmp_path, accelerator_config={"non_blocking": True})


LAUNCHED = {
    "cp": ("parallelism_config", SimpleNamespace(cp_enabled=True, sp_enabled=False), "leave out cp and sp"),
    "sp": ("parallelism_config", SimpleNamespace(cp_enabled=False, sp_enabled=True), "leave out cp and sp"),
    "deepspeed": ("deepspeed_plugin", object(), "DeepSpeed"),
    "compiled": ("dynamo_plugin", SimpleNamespace(backend=DynamoBackend.EAGER), "ACCELERATE_DYNAMO_BACKEND"),
}


@pytest.mark.parametrize(("name", "value", "said"), LAUNCHED.values(), ids=LAUNCHED.keys())
def test_what_a_launcher_sets_past_the_arguments_is_refused(name, value, said, tmp_path, monkeypatch):
    made = trainer(tmp_path)
    monkeypatch.setattr(made.accelerator, "state", SimpleNamespace(**{name: value}))
    with pytest.raises(LongrollError, match=said):
        made._check_accelerator()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_refused(in_place, tmp_path):
    model = build("mamba2")
    if in_place:
        model.backbone.layers[0].compile()
    else:
        model.backbone.layers[0] = torch.compile(model.backbone.layers[0])
    with pytest.raises(LongrollError, match=r"layers\.0.*torch\.compile"):
        InitialStateTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True), intervention="sp")
