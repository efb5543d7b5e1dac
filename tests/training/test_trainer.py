"""Training: laws 4 and 5, that the state enters the loss whatever Trainer does, and that data fit."""

import gc
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import longroll
from longroll import (
    TBPTT,
    FittedNoise,
    InitialStateTrainer,
    LongrollError,
    RandomNoise,
    RecurrentLM,
    StatePassing,
)
from longroll.data import Corpus, Lanes, Windows
from longroll.families import _dispatch
from longroll.training import PosttrainOptions, posttrain
from longroll.training.lora import with_lora
from longroll.training.loss import next_token_loss
from longroll.training.trainer import _replaces_forward
from zoo import VOCAB, assert_close, assert_same_state, build, lm_of, tokens

T, ROWS = 8, 2
KINDS = {"random": RandomNoise, "fitted": FittedNoise, "sp": StatePassing, "tbptt": TBPTT}
every_kind = pytest.mark.parametrize("kind", KINDS)
both_families = pytest.mark.parametrize("name", ["mamba", "mamba2"])


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Trainer collects garbage in every train(); with all of torch on the heap that is most of its time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def corpus_of(sizes=(70, 9, 33, 50, 21, 8, 40, 61), seed=0, vocab=VOCAB) -> Corpus:
    ids = np.random.default_rng(seed).integers(0, vocab, sum(sizes)).astype(np.int32)
    return Corpus(ids, np.cumsum([0, *sizes]).astype(np.int64), len(ids))


def lanes(rows=ROWS, steps=40):
    return Lanes(corpus_of(), T, rows, steps=steps)


def data_for(kind, rows=ROWS):
    return lanes(rows) if kind == "tbptt" else Windows(corpus_of(), T, num_items=40 * rows)


def arguments(folder, **options):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": ROWS,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return TrainingArguments(**(defaults | options))


def train(model, intervention, data, folder, *, resume=None, callbacks=None, spy=None, **options):
    trainer = (spy or InitialStateTrainer)(
        model,
        arguments(folder, **options),
        intervention=intervention,
        train_dataset=data,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(one, other, tolerance=0.0):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        if tolerance:
            assert_close(one[name], other[name], tolerance, name)
        else:
            assert torch.equal(one[name], other[name]), name


def moved(model, name):
    return not torch.equal(model.get_input_embeddings().weight, build(name).get_input_embeddings().weight)


# ---- law 4: the zero state is plain training


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2", "mamba2_groups"])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "bf16": True}], ids=str)
def test_a_zero_state_trains_bit_identically_to_none(name, options, tmp_path):
    plain = build(name)
    train(plain, None, data_for("sp"), tmp_path, **options)
    assert moved(plain, name)
    for zero in (StatePassing(zero_probability=1.0), RandomNoise(std=0), RandomNoise(std=0, conv=True)):
        model = build(name)
        train(model, zero, data_for("sp"), tmp_path, **options)
        assert_same_weights(model, plain)
    passed = build(name)  # the power of this test
    train(passed, StatePassing(), data_for("sp"), tmp_path, **options)
    assert not torch.equal(passed.get_input_embeddings().weight, plain.get_input_embeddings().weight)


# ---- law 5: killed and resumed is never killed


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@both_families
@every_kind
def test_killed_and_resumed_is_never_killed(name, kind, tmp_path):
    def run(folder, **options):
        model, intervention = build(name), KINDS[kind](zero_probability=0.3, seed=3)
        schedule = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
        try:
            train(
                model,
                intervention,
                data_for(kind),
                folder,
                gradient_accumulation_steps=2,
                **schedule,
                **options,
            )
        except KeyboardInterrupt:
            assert "callbacks" in options
        return model, intervention.state_dict()

    model, memory = run(tmp_path / "never")
    killed, _ = run(tmp_path / "killed", callbacks=[Kill(5)])
    assert not torch.equal(killed.get_input_embeddings().weight, model.get_input_embeddings().weight)
    resumed, resumed_memory = run(tmp_path / "killed", resume=str(tmp_path / "killed" / "checkpoint-3"))
    assert_same_weights(resumed, model)
    torch.testing.assert_close(resumed_memory, memory, rtol=0, atol=0)


def test_a_checkpoint_without_the_interventions_memory_is_refused(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(build("mamba2"), None, data_for("sp"), tmp_path, **options)
    with pytest.raises(LongrollError, match=r"intervention_0\.pt"):
        last = str(tmp_path / "checkpoint-1")
        train(build("mamba2"), StatePassing(), data_for("sp"), tmp_path, resume=last, **options)


@pytest.mark.parametrize(("rank", "processes"), [(0, 1), (1, 4), (3, 4)])
def test_a_rank_goes_on_from_its_own_rows_of_another_number_of_ranks(rank, processes, tmp_path, monkeypatch):
    key = longroll.StateKey(0, "recurrent")
    rows = torch.randn(4, 3, 5)
    for saved, part in enumerate(rows.split(2)):
        intervention = StatePassing()
        intervention.observe(longroll.RecurrentState({key: part}))
        torch.save(intervention.state_dict(), tmp_path / f"intervention_{saved}.pt")
    trainer = InitialStateTrainer(build("mamba2"), arguments(tmp_path), intervention=StatePassing())
    trainer.create_optimizer_and_scheduler(1)
    torch.save(trainer.optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(trainer.lr_scheduler.state_dict(), tmp_path / "scheduler.pt")
    trainer._save_rng_state(str(tmp_path))
    monkeypatch.setattr(TrainingArguments, "process_index", rank)
    monkeypatch.setattr(TrainingArguments, "world_size", processes)
    trainer._load_memory(str(tmp_path), trainer.intervention)
    assert torch.equal(trainer.intervention.passed[key], rows.view(processes, -1, 3, 5)[rank])


# ---- the state really enters the loss


class Spy(InitialStateTrainer):
    """Notes what every micro-batch saw: weights, inputs, the state, the loss; and the dtype of its logits."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.dtypes = [], set()
        head = self.base.get_output_embeddings()
        head.register_forward_hook(lambda module, inputs, output: self.dtypes.add(output.dtype))
        choose = self.intervention.initial_state
        self.intervention.initial_state = lambda batch: self._note(choose(batch))

    def _note(self, state):
        self.start = state
        return state

    def compute_loss(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
        before = weights(self.model)
        loss = super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)
        self.seen.append((before, inputs, self.start, loss.item(), num_items_in_batch))
        return loss


def opened(name, state_dict, lora):
    """The model with these weights, as longroll reads it in float32 without any of Trainer's features."""
    model = with_lora(build(name), 4) if lora else build(name)
    model.load_state_dict(state_dict)
    return RecurrentLM(model.merge_and_unload() if lora else model).eval()


@both_families
@every_kind
@pytest.mark.parametrize(
    ("options", "lora"),
    [
        ({}, False),
        ({"bf16": True}, False),
        ({"gradient_checkpointing": True}, False),
        ({}, True),
        ({"bf16": True, "gradient_checkpointing": True}, True),
    ],
    ids=["plain", "bf16", "checkpointing", "lora", "lora_bf16_checkpointing"],
)
@pytest.mark.filterwarnings("ignore")
def test_the_state_enters_the_loss(name, kind, options, lora, tmp_path):
    model = with_lora(build(name), 4) if lora else build(name)
    before = weights(model)
    intervention = KINDS[kind]()
    trainer = train(
        model,
        intervention,
        data_for(kind),
        tmp_path,
        spy=Spy,
        max_steps=3,
        gradient_accumulation_steps=2,
        **options,
    )
    assert len(trainer.seen) == 6
    assert trainer.dtypes == {torch.bfloat16 if "bf16" in options else torch.float32}
    tolerance = 2e-2 if "bf16" in options else 1e-5
    passed, differences = None, []
    for number, (state_dict, inputs, state, loss, items) in enumerate(trainer.seen):
        lm = opened(name, state_dict, lora)
        if kind == "tbptt" and passed is not None:
            passed = passed.where(~inputs["starts"])
        assert (state is None) == (number == 0)
        if number and kind in ("sp", "tbptt"):
            assert_same_state(state.to(torch.float32), passed, 5 * tolerance)
        assert items == sum(
            (other["shift_labels"] != -100).sum() for _, other, *_ in trainer.seen[number // 2 * 2 :][:2]
        )

        def direct(lm, initial, inputs=inputs, items=items):
            with torch.no_grad():
                logits, final = lm(inputs["input_ids"], initial)
            targets = inputs["shift_labels"].flatten()
            return (F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / items).item(), final

        expected, final = direct(lm, state)
        passed = final.part("recurrent", "conv")
        assert loss == pytest.approx(expected, rel=tolerance)
        differences.append(abs(direct(lm, None)[0] - loss) / max(abs(expected - loss), 1e-6 * loss))
    assert max(differences[2:]) > 10 and differences[0] < 2  # beyond rounding; the first is the zero state
    trained = [key for key, tensor in weights(model).items() if not torch.equal(tensor, before[key])]
    assert trained and all("lora_" in key for key in trained) == lora


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
def test_hooks_on_the_model_run(register, tmp_path):
    """FSDP2 and accelerate's `device_map` gather weights and move inputs in them."""
    model, called = build("mamba2"), []
    getattr(model, register)(lambda *_: called.append(1))
    train(model, StatePassing(), data_for("sp"), tmp_path, max_steps=3)
    assert len(called) == 3


@pytest.mark.parametrize("name", ["mamba", "bamba", "gla_hybrid", "rwkv7", "rwkv", "xlstm"])
def test_evaluation_by_trainer(name, tmp_path):
    """A family a container, in bfloat16, by our trainer and by transformers' own."""
    items = [data_for("sp")[i] for i in range(8)]  # a batch
    trainer = train(build(name), StatePassing(), data_for("sp"), tmp_path, bf16=True)
    found = trainer.evaluate(items)["eval_loss"]
    ids, targets = (
        torch.stack([torch.as_tensor(i[k]) for i in items]) for k in ("input_ids", "shift_labels")
    )
    with torch.no_grad():
        expected = next_token_loss(RecurrentLM(trainer.base).eval()(ids)[0], targets)
        again = next_token_loss(lm_of(name)(ids)[0][:, :-1], ids[:, 1:])
    assert found == pytest.approx(expected.item(), rel=2e-2)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    assert Trainer(build(name), arguments(tmp_path), eval_dataset=rows).evaluate()[
        "eval_loss"
    ] == pytest.approx(again.item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_died_leaves_nothing_behind(tmp_path, monkeypatch):
    """With adapters, which go the way round RecurrentLM."""
    model, ids = build("jamba"), torch.arange(24)[None]
    expected = model(ids).logits

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_dispatch.ops, "short_conv", die)
        train(with_lora(build("jamba"), 2), StatePassing(), data_for("sp"), tmp_path)
    assert torch.equal(model(ids).logits, expected)


@both_families
@pytest.mark.parametrize("kind", ["sp", "tbptt"])
def test_gradient_checkpointing_trains_the_same_weights(name, kind, tmp_path):
    plain, checkpointed = build(name), build(name)
    train(plain, KINDS[kind](), data_for(kind), tmp_path)
    trainer = train(checkpointed, KINDS[kind](), data_for(kind), tmp_path, gradient_checkpointing=True)
    assert trainer.model.is_gradient_checkpointing
    assert_same_weights(checkpointed, plain)


# ---- every target counts, once


@both_families
def test_accumulation_is_a_larger_batch(name, tmp_path):
    """On lanes, whose padding makes the micro-batches unequal."""
    sgd = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.1}
    once, twice = build(name), build(name)
    train(once, None, lanes(4), tmp_path, per_device_train_batch_size=4, **sgd)
    train(twice, None, lanes(4), tmp_path, gradient_accumulation_steps=2, **sgd)
    assert moved(once, name)
    assert_same_weights(twice, once, 1e-5)


def hand_written_tbptt(name, data, rows, steps, accumulation=1):
    """Truncated backpropagation as one would write it without longroll's interventions or Trainer."""
    lm, state = lm_of(name), None
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
    for step in range(steps):
        batches = [
            [data[(step * accumulation + micro) * rows + row] for row in range(rows)]
            for micro in range(accumulation)
        ]
        total = sum(int((item["shift_labels"] != -100).sum()) for batch in batches for item in batch)
        for batch in batches:
            ids, targets = (torch.stack([item[n] for item in batch]) for n in ("input_ids", "shift_labels"))
            starts = torch.stack([item["starts"] for item in batch])
            logits, state = lm(ids, None if state is None else state.detach().where(~starts))
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / total
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return lm.model


SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.1}


@both_families
@pytest.mark.parametrize("accumulation", [1, 2])
def test_tbptt_is_the_hand_written_loop(name, accumulation, tmp_path):
    model, data = build(name), lanes()
    options = SGD | {"gradient_accumulation_steps": accumulation, "max_steps": 5}
    train(model, TBPTT(), data, tmp_path, **options)
    assert_same_weights(model, hand_written_tbptt(name, data, ROWS, 5, accumulation), 1e-5)


def test_tbptt_over_lanes_predicts_every_token_of_a_document_from_all_before_it(tmp_path):
    """One document, one lane, no update: the losses add up to those of the whole document."""
    data = Lanes(corpus_of((41,)), T, 1)
    trainer = train(
        build("mamba2"),
        TBPTT(),
        data,
        tmp_path,
        spy=Spy,
        max_steps=5,
        per_device_train_batch_size=1,
        learning_rate=0.0,
    )
    ids = torch.from_numpy(corpus_of((41,)).ids.astype(np.int64))[None]
    with torch.no_grad():
        logits, _ = lm_of("mamba2")(ids[:, :-1])
    expected = F.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
    assert sum(int(items) for *_, items in trainer.seen) == 40  # boundaries of windows included
    assert sum(loss * int(items) for *_, loss, items in trainer.seen) == pytest.approx(expected, rel=1e-5)


def test_ordinary_labels_give_transformers_loss(tmp_path):
    model = build("mamba2")
    trainer = InitialStateTrainer(model, arguments(tmp_path))
    ids = tokens(2, 12)
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids < 5, -100)}
    loss = trainer.compute_loss(model.eval(), batch)
    expected = model(**batch)
    torch.testing.assert_close(loss, expected.loss)
    _, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    torch.testing.assert_close(outputs["logits"], expected.logits)


# ---- evaluation


@every_kind
def test_evaluation_starts_from_zero_and_leaves_the_intervention_alone(kind, tmp_path):
    options = {"max_steps": 4, "eval_steps": 1, "per_device_eval_batch_size": 3}
    models, memories = [build("mamba2"), build("mamba2")], []
    for model, strategy in zip(models, ("no", "steps"), strict=True):
        intervention = KINDS[kind](zero_probability=0.3)
        trainer = InitialStateTrainer(
            model,
            arguments(tmp_path, eval_strategy=strategy, **options),
            intervention=intervention,
            train_dataset=data_for(kind),
            eval_dataset=Windows(corpus_of(seed=1), T, num_items=7),
        )
        trainer.train()
        memories.append(intervention.state_dict())
    assert_same_weights(*models)
    torch.testing.assert_close(*memories, rtol=0, atol=0)
    items = [trainer.eval_dataset[i] for i in range(7)]
    ids, targets = (torch.stack([item[n] for item in items]) for n in ("input_ids", "shift_labels"))
    with torch.no_grad():
        logits, _ = RecurrentLM(models[1]).eval()(ids)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


# ---- posttrain: from a model and a corpus to a checkpoint

OPTIONS = {"length": T, "steps": 6, "batch_size": ROWS, "learning_rate": 1e-2, "save_steps": 2}

ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.save(model(torch.arange(60)[None]).logits, folder + "/alone.pt")
assert not any("longroll" in module for module in sys.modules)
"""


@torch.no_grad()
def test_the_result_is_an_ordinary_checkpoint(tmp_path):
    expected = {}
    for name, lora_rank in (("mamba", 0), ("mamba2", 4)):
        lm, output = lm_of(name), tmp_path / name
        with torch.enable_grad():
            log = posttrain(
                lm, corpus_of(), StatePassing(), PosttrainOptions(**OPTIONS, lora_rank=lora_rank), output
            )
        assert any("loss" in entry for entry in log)
        assert not lm.training and not (output / "checkpoints").exists()
        config = json.loads((output / "config.json").read_text())
        assert config["train_length"] == T and config["use_cache"] == build(name).config.use_cache
        assert load_file(output / "model.safetensors").keys() <= build(name).state_dict().keys()
        assert not any(
            torch.equal(t, build(name).state_dict()[k])
            for k, t in weights(lm.model).items()
            if "in_proj" in k
        )
        expected[output] = lm(torch.arange(60)[None])[0]
    subprocess.run([sys.executable, "-c", ALONE, *map(str, expected)], check=True)
    for output, logits in expected.items():
        assert_close(torch.load(output / "alone.pt"), logits, 2e-5)


@every_kind
def test_posttrain_goes_on_where_it_was_killed(kind, tmp_path):
    def run(output, **more):
        lm = lm_of("mamba2")
        posttrain(lm, corpus_of(), KINDS[kind](), PosttrainOptions(**OPTIONS), output, **more)
        return lm.model

    never = run(tmp_path / "never")
    output = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        run(output, callbacks=[Kill(5)])
    with pytest.raises(LongrollError, match=r"interrupted run.*resume"):
        run(output)
    assert_same_weights(run(output, resume=True), never)
    with pytest.raises(LongrollError, match="already holds a model"):
        run(output)
    with pytest.raises(LongrollError, match="already holds a model"):  # done: nothing to go on with
        run(output, resume=True)


def test_a_callback_that_ends_the_run_leaves_a_model(tmp_path):
    class Enough(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 3

    lm, options = lm_of("mamba2"), PosttrainOptions(**OPTIONS)
    log = posttrain(lm, corpus_of(), StatePassing(), options, tmp_path / "out", callbacks=[Enough()])
    assert options.steps > 3 and log[-1]["step"] == 3
    assert_same_weights(longroll.load(tmp_path / "out", device="cpu").model, lm.model)
    assert not (tmp_path / "out/checkpoints").exists()


def test_a_model_trained_in_bfloat16_goes_on_in_its_own_dtype(tmp_path):
    lm, ids = lm_of("mamba2"), torch.arange(30)[None]
    posttrain(lm, corpus_of(), StatePassing(), PosttrainOptions(**OPTIONS, bf16=True), tmp_path / "out")
    assert torch.equal(lm(ids)[0], longroll.load(tmp_path / "out", device="cpu")(ids)[0])
    assert "forward" not in vars(lm.model)  # nor is anything of accelerate's left to a second run


def test_a_forward_of_the_users_own_is_told_from_that_of_accelerate():
    model = build("mamba2")
    assert not _replaces_forward(model)
    kept = model.forward
    model._original_forward, model.forward = kept, lambda *a, **k: kept(*a, **k)
    assert not _replaces_forward(model)
    del model._original_forward
    assert _replaces_forward(model)


def test_plain_training_is_the_control(tmp_path):
    one, other = lm_of("mamba2"), lm_of("mamba2")
    posttrain(one, corpus_of(), None, PosttrainOptions(**OPTIONS), tmp_path / "one")
    zero = StatePassing(zero_probability=1.0)
    posttrain(other, corpus_of(), zero, PosttrainOptions(**OPTIONS), tmp_path / "other")
    assert_same_weights(one.model, other.model)


DISTRIBUTED = """
import os, sys
sys.path[:0] = sys.argv[1:3]
from test_trainer import SGD, TBPTT, arguments, build, lanes, train
model = build("mamba2")
options = SGD | {"max_steps": 4, "per_device_train_batch_size": 1}
options |= {"ddp_backend": sys.argv[4], "use_cpu": sys.argv[4] == "gloo"}
trainer = train(model, TBPTT(), lanes(2), sys.argv[3], **options)
assert trainer.args.world_size == 2
if trainer.is_world_process_zero():
    model.save_pretrained(sys.argv[3] + "/ddp")
trainer.accelerator.wait_for_everyone()
os._exit(0)  # gloo's threads sometimes abort an interpreter that ends in order (torch 2.13)
"""


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=two_gpus)])
def test_two_processes_are_one(backend, tmp_path):
    from pathlib import Path

    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED)
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script)]
    subprocess.run([*command, str(here), str(here.parent), str(tmp_path), backend], check=True, timeout=120)
    model = build("mamba2")
    train(model, TBPTT(), lanes(2), tmp_path, **SGD)
    found = load_file(tmp_path / "ddp" / "model.safetensors")
    for name, tensor in found.items():
        assert_close(tensor, weights(model)[name], 1e-5 if backend == "gloo" else 1e-3, name)


# ---- what cannot be trained


def test_a_transformer_has_no_state_to_intervene_on(tmp_path):
    with pytest.raises(LongrollError, match="gpt2 has no recurrent state"):
        train(build("gpt2"), StatePassing(), data_for("sp"), tmp_path)
    model = build("gpt2")
    train(model, None, data_for("sp"), tmp_path, max_steps=1)
    assert moved(model, "gpt2")


@pytest.mark.parametrize("data", [lanes(3), Windows(corpus_of(), T)], ids=["three", "none"])
def test_lanes_that_do_not_fit(data, tmp_path):
    with pytest.raises(LongrollError, match=r"lanes=2"):
        train(build("mamba2"), TBPTT(), data, tmp_path)


def test_a_diverging_run_is_stopped(tmp_path):
    options = PosttrainOptions(**(OPTIONS | {"learning_rate": 1e30, "steps": 12, "warmup": 0.0}))
    with pytest.raises(LongrollError, match="learning_rate"):
        posttrain(lm_of("mamba2"), corpus_of(), StatePassing(), options, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_tokens_outside_the_vocabulary(tmp_path):
    with pytest.raises(LongrollError, match=str(VOCAB)):
        posttrain(lm_of("mamba2"), corpus_of(vocab=99), None, PosttrainOptions(**OPTIONS), tmp_path / "out")


def test_an_output_that_holds_a_model(tmp_path):
    build("mamba2").save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(LongrollError, match=f"{tmp_path} already holds a model"):
        posttrain(lm_of("mamba2"), corpus_of(), None, PosttrainOptions(**OPTIONS), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LongrollError, match="cannot be written"):
        posttrain(lm_of("mamba2"), corpus_of(), None, PosttrainOptions(**OPTIONS), tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("length", 0),
        ("steps", 0),
        ("batch_size", -1),
        ("accumulation", 0),
        ("save_steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("warmup", 1.5),
        ("warmup", -0.1),
        ("weight_decay", -1.0),
        ("clip", -1.0),
        ("lora_rank", -1),
        ("schedule", "no_such_schedule"),
    ],
)
def test_wrong_options_are_named(option, value):
    with pytest.raises(LongrollError, match=f"`{option}` {value}"):
        PosttrainOptions(**(OPTIONS | {option: value}))


def test_a_text_shorter_than_a_window(tmp_path):
    with pytest.raises(LongrollError, match="`length` "):
        options = PosttrainOptions(**(OPTIONS | {"length": 100}))
        posttrain(lm_of("mamba2"), corpus_of((50,)), None, options, tmp_path / "out")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ddp_adds_in_one_order_from_the_first_step_on(checkpointing, tmp_path):
    """DDP reorders its buckets after one step unless it looks for weights without a gradient."""
    told = arguments(tmp_path, gradient_checkpointing=checkpointing)
    trainer = InitialStateTrainer(build("mamba2"), told, train_dataset=data_for("sp"))
    assert trainer.accelerator.ddp_handler.find_unused_parameters
