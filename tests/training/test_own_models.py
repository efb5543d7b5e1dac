"""Training a wrapped module: every intervention, resume, LoRA, and the folder that opens again."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments

import longroll
from longroll import TBPTT, InitialStateTrainer, LongrollError, StatePassing
from longroll.data import ByteTokenizer, Corpus, Lanes
from longroll.interventions import INTERVENTIONS
from longroll.tasks import Copying, Row
from longroll.tasks.evaluate import evaluate_grid
from longroll.training import PosttrainOptions, posttrain
from own_modules import RNN, VOCAB, Recurrence, build

T, ROWS = 8, 2
OPTIONS = PosttrainOptions(length=T, steps=4, batch_size=ROWS, learning_rate=1e-2, save_steps=2)


def corpus(seed=0):
    ids = np.random.default_rng(seed).integers(0, VOCAB, 400).astype(np.int32)
    return Corpus(ids, np.array([0, 90, 250, 400]), 400)


def fresh(name):
    return longroll.load(name, plugin="own_modules:build", device="cpu")


def tokens(rows, length):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("name", "kind"), [*(("dict", kind) for kind in INTERVENTIONS), ("lstm", "sp")])
def test_posttrain_resumes_and_the_folder_opens_again(name, kind, tmp_path):
    lm = fresh(name)
    before = {n: p.detach().clone() for n, p in lm.model.module.named_parameters()}
    posttrain(lm, corpus(), INTERVENTIONS[kind](), OPTIONS, tmp_path / "whole")
    assert all(not torch.equal(p, before[n]) for n, p in lm.model.module.named_parameters())
    with pytest.raises(KeyboardInterrupt):
        posttrain(
            fresh(name), corpus(), INTERVENTIONS[kind](), OPTIONS, tmp_path / "cut", callbacks=[Killed()]
        )
    again = fresh(name)
    posttrain(again, corpus(), INTERVENTIONS[kind](), OPTIONS, tmp_path / "cut", resume=True)
    ids = tokens(2, 20)
    expected = lm(ids)[0]
    for found in (again, fresh(tmp_path / "whole"), longroll.load(tmp_path / "cut", plugin=build)):
        assert torch.equal(found(ids)[0], expected)
    assert fresh(tmp_path / "whole").train_length == T
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (config["plugin"], config["built"]) == ("own_modules:build", name)


def test_what_python_wrapped_a_function_builds_again(tmp_path):
    """No plug-in was named: the folder notes the model's name."""
    lm = longroll.wrap(build("gru"), vocab_size=VOCAB, name="gru")
    assert lm.flags is None  # no command opens it
    posttrain(lm, corpus(), None, OPTIONS, tmp_path / "out")
    names = []
    again = longroll.load(tmp_path / "out", plugin=lambda name: names.append(name) or build(name))
    assert names == ["gru"] and torch.equal(again(tokens(1, 5))[0], lm(tokens(1, 5))[0])


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    posttrain(fresh("gru"), corpus(), None, OPTIONS, tmp_path / "gru")
    with pytest.raises(LongrollError, match=r"`plugin` names what builds it \(own_modules:build\)"):
        longroll.load(tmp_path / "gru")
    with pytest.raises(LongrollError, match="weights are missing"):
        longroll.load(tmp_path / "gru", plugin=lambda name: build("dict"))
    with pytest.raises(LongrollError, match="name the plug-in that built it"):
        longroll.load(tmp_path / "gru", plugin=lambda name: longroll.load("specimen"))
    file = tmp_path / "gru" / "model.safetensors"
    weights = load_file(file)
    save_file({n: t for n, t in weights.items() if "bias_hh_l1" not in n}, file)
    with pytest.raises(LongrollError, match="1 weights are missing"):
        fresh(tmp_path / "gru")
    file.write_bytes(b"nothing")
    with pytest.raises(LongrollError, match="weights cannot be loaded"):
        fresh(tmp_path / "gru")
    file.unlink()
    with pytest.raises(LongrollError, match="weights are missing"):
        fresh(tmp_path / "gru")


def test_the_readmes_loop_and_the_trainer_train_alike(tmp_path):
    """Written out by hand, and by InitialStateTrainer."""
    data = Lanes(corpus(), T, ROWS, steps=4)
    lm, passing = fresh("stacked"), TBPTT()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(4):
        items = [data[step * ROWS + row] for row in range(ROWS)]
        batch = {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in items[0]}
        logits, final = lm(batch["input_ids"], passing.initial_state(batch))
        F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        passing.observe(final)
    other = fresh("stacked")
    args = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=ROWS, learning_rate=1e-2, use_cpu=True,
        lr_scheduler_type="constant", report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    InitialStateTrainer(other, args, intervention=TBPTT(), train_dataset=data).train()
    for (name, one), two in zip(lm.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=lambda said, name=name: f"{name}: {said}")


def test_lora_merges_and_opens_again(tmp_path):
    pytest.importorskip("peft")
    lm = fresh("dict")
    posttrain(lm, corpus(), StatePassing(), PosttrainOptions(T, 2, ROWS, lora_rank=2), tmp_path / "lora")
    ids = tokens(2, 9)
    assert torch.equal(fresh(tmp_path / "lora")(ids)[0], lm(ids)[0])
    assert not torch.equal(fresh("dict")(ids)[0], lm(ids)[0])


def test_gradient_checkpointing_is_refused_by_name(tmp_path):
    options = PosttrainOptions(T, 2, ROWS, gradient_checkpointing=True)
    with pytest.raises(LongrollError, match="`gradient_checkpointing` knows no layers of a wrapped module"):
        posttrain(fresh("gru"), corpus(), None, options, tmp_path / "out")


def test_diagnosis_report_and_tasks():
    lm = fresh("stacked")
    found = longroll.diagnose(lm, tokens(4, 129), train_length=T).to_json()
    assert found["architecture"] == "Recurrence" and found["states"]["layers"]
    assert [row["layer"] for row in found["states"]["layers"]] == [layer.layer for layer in lm.layers]


@pytest.mark.parametrize("module", [Recurrence(vocab=256), RNN(vocab=256)])
def test_tasks_read_prompts_of_different_lengths(module):
    lm = longroll.wrap(module, vocab_size=256)
    cells = evaluate_grid(lm, [Row(None, Copying(ByteTokenizer()))], [3, 5], samples=3)
    assert [cell["length"] for cell in cells] == [3, 5]
