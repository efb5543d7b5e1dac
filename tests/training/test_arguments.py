"""Every argument of Trainer is tested, neutral or refused, and an unknown one is refused by name."""

import dataclasses
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DynamoBackend
from test_trainer import quick_collections
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from longroll import InitialStateTrainer, LongrollError, StatePassing
from longroll.training import _arguments
from longroll.training._arguments import ACCELERATOR_CONFIG, FSDP_CONFIG, TRAINER, TRAINING_ARGUMENTS
from longroll.training.launch import check_placement
from zoo import build

__all__ = ["quick_collections"]  # a fixture of each test here

_FSDP1 = {
    *("forward_prefetch", "backward_prefetch", "use_orig_params", "sync_module_states"),
    "limit_all_gathers",
}
_ADDED = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # by transformers 5.23


def _documented(name):
    """The keys that the docstring of TrainingArguments lists under an argument."""
    listed = TrainingArguments.__doc__.partition(f"        {name} (")[2].partition("        > ")[0]
    return re.findall(r"^ +- (\w+) \(", listed, re.MULTILINE)


@pytest.mark.parametrize(
    ("names", "table", "added"),
    [
        ([f.name for f in dataclasses.fields(TrainingArguments)], TRAINING_ARGUMENTS, _ADDED),
        ([f.name for f in dataclasses.fields(AcceleratorConfig)], ACCELERATOR_CONFIG, set()),
        (list(inspect.signature(Trainer.__init__).parameters)[1:], TRAINER, set()),
        (_documented("fsdp_config"), FSDP_CONFIG, _FSDP1 | {"xla_fsdp_v2"}),
    ],
    ids=["TrainingArguments", "accelerator_config", "Trainer", "fsdp_config"],
)
def test_every_argument_of_this_transformers_is_decided(names, table, added):
    assert set(names) - set(table) == set(), "decide what becomes of these, in training/_arguments.py"
    assert set(table) - set(names) <= added
    assert all(row.reason for row in table.values())


def test_the_documented_table_is_this_one():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    for table in (TRAINING_ARGUMENTS, ACCELERATOR_CONFIG, FSDP_CONFIG, TRAINER):
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
    "deepspeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
    "megatron": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    "tp": ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "tensor parallelism"),
    "cp": ({"PARALLELISM_CONFIG_CP_SIZE": "2"}, "context parallelism"),
    "sp": ({"PARALLELISM_CONFIG_SP_SIZE": "2"}, "sequence parallelism"),
    "hsdp": ({"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, "hybrid sharding"),
    "fsdp of one process": ({"ACCELERATE_USE_FSDP": "true"}, "start with torchrun"),
    "fsdp1": ({"ACCELERATE_USE_FSDP": "true", "RANK": "0"}, "fsdp_version: 2"),
}


@pytest.mark.parametrize(("environment", "said"), LAUNCHED.values(), ids=LAUNCHED.keys())
def test_what_a_launcher_sets_past_the_arguments_is_refused(environment, said, tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LongrollError, match=said) as error:
        trainer(tmp_path, args)
    assert "\n" not in str(error.value)


def test_a_compiling_launcher_is_refused(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    plugin = SimpleNamespace(backend=DynamoBackend.EAGER)
    monkeypatch.setattr(made.accelerator, "state", SimpleNamespace(dynamo_plugin=plugin))
    with pytest.raises(LongrollError, match="ACCELERATE_DYNAMO_BACKEND"):
        made._check_accelerator()


FSDP = {
    "without fsdp": ({"fsdp_config": {"reshard_after_forward": False}}, "no effect without `fsdp`"),
    "one process": ({"fsdp": True}, "start with torchrun"),
    "unknown": ({"fsdp": True, "fsdp_config": {"fsdp_sharding": 3}}, "sharding 3"),
    "fsdp1": ({"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP1"),
    "offload": ({"fsdp": "full_shard offload"}, "cpu_offload True"),
    "xla": ({"fsdp": True, "fsdp_config": {"xla": True, "xla_fsdp_grad_ckpt": True}}, "xla True"),
    "of fsdp1": ({"fsdp": True, "fsdp_config": {"use_orig_params": True}}, "use_orig_params True"),
}


@pytest.mark.parametrize(("given", "said"), FSDP.values(), ids=FSDP.keys())
@pytest.mark.filterwarnings("ignore")
def test_settings_of_fsdp_that_cannot_be_honoured_are_refused(given, said, tmp_path):
    with pytest.raises(LongrollError, match=said) as error:
        trainer(tmp_path, **given)
    assert "\n" not in str(error.value)


def test_a_model_that_is_spread_already_is_refused(tmp_path):
    model = build("mamba2")
    model.hf_device_map = {"backbone.layers.0": 0, "backbone.layers.1": 1}
    with pytest.raises(LongrollError, match=r"pipeline.*FSDP2"):
        check_placement(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = build("mamba2")
        model.lm_head.weight = torch.nn.Parameter(
            distribute_tensor(model.lm_head.weight, init_device_mesh("cpu", (1,)))
        )
        with pytest.raises(LongrollError, match="tp_plan"):
            check_placement(model)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_refused(in_place, tmp_path):
    model = build("mamba2")
    if in_place:
        model.backbone.layers[0].compile()
    else:
        model.backbone.layers[0] = torch.compile(model.backbone.layers[0])
    with pytest.raises(LongrollError, match=r"layers\.0.*torch\.compile"):
        InitialStateTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True), intervention="sp")
