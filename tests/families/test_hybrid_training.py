"""Families beyond Mamba in Trainer: the state enters, checkpointing and resuming change nothing."""

import gc

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from longroll import InitialStateTrainer, LongrollError, RandomNoise, StatePassing
from longroll.data import Corpus, Windows
from zoo import VOCAB, build

T, ROWS = 8, 2
NAMES = ["bamba", "qwen3_5", "xlstm", "rwkv", "recurrent_gemma"]  # one of each container, and two hybrids


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Trainer collects garbage in every train(); with all of torch on the heap that is most of its time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def train(name, folder, intervention=None, *, resume=None, steps=4, **options):
    ids = np.random.default_rng(0).integers(0, VOCAB, 400).astype(np.int32)
    data = Windows(Corpus(ids, np.array([0, 200, 400], dtype=np.int64), len(ids)), T, num_items=40)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=2,
        **options,
    )
    trainer = InitialStateTrainer(build(name), arguments, intervention=intervention, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.base.state_dict()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("name", NAMES)
def test_a_passed_state_enters_and_survives(name, tmp_path):
    plain = train(name, tmp_path / "plain")
    assert same(train(name, tmp_path / "zero", RandomNoise(std=0, conv=True)), plain)
    passed = train(name, tmp_path / "passed", StatePassing())
    assert not same(passed, plain)
    saving = {"gradient_checkpointing": True}
    assert same(train(name, tmp_path / "checkpointed", StatePassing(), **saving), passed)
    halfway = str(tmp_path / "passed" / "checkpoint-2")
    assert same(train(name, tmp_path / "resumed", StatePassing(), resume=halfway), passed)


def test_a_family_without_a_state_is_refused(tmp_path):
    with pytest.raises(LongrollError, match="lfm2 has no recurrent state"):
        train("lfm2", tmp_path, StatePassing())
