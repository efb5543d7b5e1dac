"""FSDP2 of N ranks is DDP of N ranks and one process with N times the batch; states stay with their rows."""

import copy
import json
from pathlib import Path

import pytest
import torch
from ranked import run, train
from safetensors.torch import load_file
from test_ranks import ALONE, BASE, assert_same_result, spec, torchrun

import longroll
from longroll.training import sharding
from longroll.training.plan import Setting, outline_of
from zoo import lm_of, tokens

FSDP = BASE | {"fsdp": True, "steps": 4, "weight_decay": 0.1, "clip": 0.5, "learning_rate": 1e-3}
DDP = FSDP | {"fsdp": False}
WAYS = {"fsdp": FSDP, "ddp": DDP}
ONE = DDP | {"batch_size": ALONE["batch_size"]}
TIED = {"tie_word_embeddings": True}
RUNS = {
    "mamba2": ("sp", {"config": TIED}, {}),
    "hybrid": ("tbptt", {"family": "falcon_h1"}, {"fsdp_config": {"reshard_after_forward": False}}),
    "lora": ("fitted", {}, {"lora_rank": 2}),
    "checkpointed": ("random", {}, {"gradient_checkpointing": True}),
}
"""Name -> the intervention, the model, the options besides."""
CAST = {"bf16": True, "accumulation": 1, "steps": 3, "weight_decay": 0.0}
TRAINED = {
    "fsdp": True,
    "fsdp_config": {"activation_checkpointing": True, "state_dict_type": "SHARDED_STATE_DICT"},
}


def of(root: Path, place: str, name: str, options: dict, **more) -> dict:
    kind, model, besides = RUNS[name]
    kept = {key: value for key, value in besides.items() if options["fsdp"] or key != "fsdp_config"}
    found = spec(root, place, kind, **model, **more)
    return found | {"output": str(root / place / name), "options": options | kept}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All runs of two ranks, in one launch."""
    root = tmp_path_factory.mktemp("sharding")
    runs = [of(root, "fsdp", name, FSDP) for name in RUNS]
    runs += [of(root, "ddp", name, DDP) for name in ("mamba2", "hybrid")]
    runs += [of(root, f"{way} in bfloat16", "mamba2", given | CAST) for way, given in WAYS.items()]
    runs += [of(root, "killed", "mamba2", FSDP, kill=3), of(root, "killed", "mamba2", FSDP, resume=True)]
    runs += [of(root, "spoiled", "mamba2", FSDP, spoil=2)]
    runs += [{"output": str(root / "trainer"), "family": "mamba2", "batch_size": 2, "arguments": TRAINED}]
    done = torchrun(runs)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("name", RUNS)
def test_shards_on_two_processes_train_as_one_process(name, root):
    run(**of(root, "one", name, ONE))
    assert_same_result(root / "fsdp" / name, root / "one" / name, 2e-6)


@pytest.mark.parametrize("name", ["mamba2", "hybrid"])
def test_fsdp_trains_as_ddp(name, root):
    assert_same_result(root / "fsdp" / name, root / "ddp" / name, 1e-6)


def test_under_autocast_each_step_trains_all_weights(root):
    """Adam's first steps are as long as the learning rate, so that a lost gradient shows."""
    assert_same_result(root / "fsdp in bfloat16" / "mamba2", root / "ddp in bfloat16" / "mamba2", 2e-5)


def test_an_interrupted_run_resumes_to_the_same_bits(root):
    assert_same_result(root / "killed" / "mamba2", root / "fsdp" / "mamba2", 0.0)


@pytest.mark.parametrize("name", RUNS)
def test_the_result_is_one_ordinary_checkpoint(name, root):
    folder = root / "fsdp" / name
    assert (folder / "model.safetensors").is_file() and not (folder / "checkpoints").exists()
    alike = root / "ddp" / name
    if alike.exists():
        assert load_file(folder / "model.safetensors").keys() == load_file(alike / "model.safetensors").keys()
    logits, _ = longroll.load(folder, device="cpu")(tokens(1, 9))
    assert logits.isfinite().all()


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_at_its_step(root):
    said = [(root / "spoiled" / f"mamba2.{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and "Step 3" in said[0] and "is not finite" in said[0]
    assert (root / "spoiled" / "mamba2" / "checkpoints" / "checkpoint-2" / "manifest.json").is_file()


def test_a_trainer_of_ones_own_shards_evaluates_and_saves(root):
    """With activation checkpointing and checkpoints in shards."""
    train(str(root / "alone"), family="mamba2", batch_size=4, arguments={})
    logs = [json.loads((root / name / "log.json").read_text()) for name in ("trainer", "alone")]
    for key in ("loss", "eval_loss", "grad_norm"):
        found, expected = ([entry[key] for entry in log if key in entry] for log in logs)
        assert len(found) >= 2 and found == pytest.approx(expected, rel=2e-6), key
    one, other = (load_file(root / name / "model.safetensors") for name in ("trainer", "alone"))
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=2e-6, atol=2e-6, msg=name)
    assert list((root / "trainer" / "checkpoint-4").glob("pytorch_model_fsdp_0/*.distcp"))


def test_each_process_holds_its_share_of_weights_and_moments(root):
    """As planned; a dimension that does not divide leaves a row more to one."""
    held = [json.loads((root / f"trainer.bytes.{rank}").read_text()) for rank in (0, 1)]
    setting = Setting(rows=2, length=8, shards=2, autocast=False)
    expected = outline_of(lm_of("mamba2")).training(setting)
    for name in ("weights", "optimizer"):
        assert sum(sizes[name] for sizes in held) == 2 * getattr(expected, name), name
        assert max(sizes[name] for sizes in held) <= 1.1 * getattr(expected, name), name


@pytest.mark.parametrize("family", ["mamba2", "falcon_h1", "zamba2", "gla", "xlstm"])
def test_a_skeleton_keeps_ties_and_hooks_but_no_numbers(family):
    lm = lm_of(family, **TIED).eval()
    model = lm.model
    empty = sharding.skeleton(model)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert [name for name, _ in empty.named_parameters()] == [name for name, _ in model.named_parameters()]
    filled = sharding.whole(empty, copy.deepcopy(model))
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (filled, model)]
    assert tied[0] == tied[1]
    ids = tokens(2, 9)
    assert torch.equal(longroll.RecurrentLM(filled)(ids)[0], lm(ids)[0])
