"""What pipelines hand over: collators, evaluation of padded rows, documents that start from the state."""

import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_batch import Tokenizer
from test_own_data import alone, ragged
from test_trainer import arguments, data_for, quick_collections, train
from transformers import DataCollatorWithFlattening, Trainer

from longroll import TBPTT, InitialStateMixin, InitialStateTrainer, LongrollError, RandomNoise, StatePassing
from longroll.training._batch import aligned, read_batch
from longroll.training._collate import Collator
from zoo import build, lm_of, tokens

__all__ = ["quick_collections"]  # a fixture of each test here


def pads(side):
    tokenizer = Tokenizer()
    tokenizer.padding_side, tokenizer.model_input_names = side, ["input_ids"]
    tokenizer.save_pretrained = lambda folder: None
    return tokenizer


def without_labels(side):
    def collate(items):
        batch = dict(Collator(pads(side))(items))
        del batch["labels"]
        return batch

    return collate


# ---- evaluation


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["mamba", "mamba2", "jamba", "qwen3_next", "rwkv7", "rwkv"])
def test_padded_rows_are_evaluated_as_they_are_alone(name, side, tmp_path):
    data, lm = ragged(5), lm_of(name)
    made = functools.partial(
        InitialStateTrainer, build(name), arguments(tmp_path, per_device_eval_batch_size=5), intervention="sp"
    )
    trainer = made(processing_class=pads(side))
    found = trainer.predict(data)
    blind = made(data_collator=without_labels(side)).predict(data)
    assert blind.label_ids is None and np.allclose(blind.predictions, found.predictions, atol=1e-5)
    total, items = 0.0, 0
    for row, logits in zip(data, torch.tensor(found.predictions), strict=True):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            expected = lm(ids)[0][0]
        size = len(expected)
        torch.testing.assert_close(logits[-size:] if side == "left" else logits[:size], expected)
        total += F.cross_entropy(expected[:-1], ids[0, 1:], reduction="sum").item()
        items += size - 1
    assert found.metrics["test_loss"] == pytest.approx(total / items, rel=1e-5)
    assert trainer.intervention.passed is None


@pytest.mark.parametrize("what", ["label_smoothing_factor", "compute_loss_func"])
def test_losses_of_padded_rows(what, tmp_path):
    smoothing = 0.3 if what == "label_smoothing_factor" else 0.0

    def func(outputs, labels, num_items_in_batch):
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    trainer = InitialStateTrainer(
        build("mamba2"),
        arguments(tmp_path, label_smoothing_factor=smoothing, max_steps=1, per_device_train_batch_size=12),
        train_dataset=ragged(),
        processing_class=pads("left"),
        compute_loss_func=func if what == "compute_loss_func" else None,
    )
    lm, total, items = lm_of("mamba2"), 0.0, 0
    for row in ragged():
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = lm(ids)[0][0, :-1]
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum", label_smoothing=smoothing).item()
        items += len(logits)
    assert trainer.train().training_loss == pytest.approx(total / items, rel=1e-4)


def test_smoothing_would_leave_out_the_routers_loss(tmp_path):
    model = build("jamba", output_router_logits=True)
    with pytest.raises(LongrollError, match="label_smoothing_factor"):
        train(model, None, data_for("sp"), tmp_path, label_smoothing_factor=0.1)


# ---- the state of a step enters once


@pytest.mark.parametrize("base", [(InitialStateTrainer,), (InitialStateMixin, Trainer)], ids=str)
@pytest.mark.parametrize("times", [0, 2])
def test_a_loss_of_ones_own_that_leaves_the_state_out_is_refused(base, times, tmp_path):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]
        losses = [super(made, self).compute_loss(model, inputs) for _ in range(times)]
        return sum(losses) if times else model(input_ids=ids, labels=ids).loss

    made = type("Own", base, {"compute_loss": compute_loss})
    with pytest.raises(LongrollError, match=rf"Own calls super\(\).compute_loss {times} times"):
        train(build("mamba2"), StatePassing(), data_for("sp"), tmp_path, spy=made)
    if times == 0:
        train(build("mamba2"), None, data_for("sp"), tmp_path, spy=made)


# ---- documents of packed rows that start from the state


class Noting(InitialStateTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.__dict__.setdefault("seen", []).append((inputs, loss.detach()))
        return loss

    def _read(self, model, rows, state, **kwargs):
        self.__dict__.setdefault("states", []).append(state)
        return super()._read(model, rows, state, **kwargs)


@pytest.mark.parametrize("restart", ["zero", "state"])
@pytest.mark.parametrize("intervention", [StatePassing, RandomNoise])
def test_documents_start_from_what_is_chosen(intervention, restart, tmp_path):
    trainer = Noting(
        build("mamba2"),
        arguments(tmp_path, learning_rate=0.0),
        DataCollatorWithFlattening(),
        intervention=intervention(),
        restart=restart,
        train_dataset=ragged(),
    )
    trainer.train()
    assert len(trainer.seen) == len(trainer.states) == 4
    for (inputs, loss), state in zip(trainer.seen, trainer.states, strict=True):
        cuts = [*(inputs["position_ids"][0] == 0).nonzero().flatten().tolist(), inputs["input_ids"].shape[1]]
        texts = [inputs["input_ids"][0, a:b] for a, b in itertools.pairwise(cuts)]
        states = [state] + [state if restart == "state" else None] * (len(texts) - 1)
        expected, _ = alone([{"input_ids": text.tolist()} for text in texts], states)
        assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("intervention", "restart", "said"),
    [(TBPTT(), "state", "TBPTT"), (StatePassing(), "sate", "restart='sate'")],
)
def test_restarts_that_have_no_meaning_are_refused(intervention, restart, said, tmp_path):
    with pytest.raises(LongrollError, match=said):
        InitialStateTrainer(build("mamba2"), arguments(tmp_path), intervention=intervention, restart=restart)


# ---- what a batch says


def test_masks_that_number_documents_and_seq_idx_that_marks_padding():
    ids = tokens(2, 8, seed=3)
    numbered = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [0, 1, 1, 1, 1, 2, 2, 2]])
    index = torch.where(numbered > 0, numbered - 1, -1)
    for given in ({"attention_mask": numbered}, {"seq_idx": index}):
        rows = read_batch({"input_ids": ids, "labels": ids} | given)
        assert torch.equal(rows.attention_mask, numbered > 0)
        assert rows.starts.nonzero().tolist() == [[0, 3], [0, 5], [1, 5]]
        assert (rows.targets != -100).sum() == 3 + 5


@pytest.mark.parametrize("additive", [True, False])
def test_additive_masks_are_refused(additive):
    ids = tokens(1, 4)
    mask = torch.tensor([[0.0, 0.0, -1e9, -1e9]]) if additive else torch.tensor([[1, 1, 2, 2]])
    with pytest.raises(LongrollError, match="`attention_mask`"):
        lm_of("mamba2")(ids, attention_mask=mask)
    if additive:
        with pytest.raises(LongrollError, match="additive"):
            read_batch({"input_ids": ids, "labels": ids, "attention_mask": mask})


def test_last_documents_of_one_token_are_no_padding():
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(
        [{"input_ids": [4] * n} for n in (3, 1, 1)]
    )
    rows = read_batch(batch)
    assert rows.attention_mask is None and rows.starts.nonzero().tolist() == [[0, 3], [0, 4]]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"input_ids": [3, 4]}, {"input_ids": [3, 4], "labels": [-100, 4]}], "same columns"),
        ([{"input_ids": [3, 4], "labels": None}, {"input_ids": [3, 4], "labels": [-100, 4]}], "same columns"),
        ([{"input_ids": [3, 4], "labels": [3, 4]}, {"input_ids": [3], "labels": [3, 4]}], "`labels` of"),
    ],
)
def test_rows_that_disagree_are_refused(rows, said):
    with pytest.raises(LongrollError, match=said):
        Collator(pads("left"))(rows)


def test_token_ids_of_any_integers_and_of_no_token():
    rows = [{"input_ids": np.array([3, 4], dtype=np.uint16)}, {"input_ids": []}]
    batch = Collator(pads("right"))(rows)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.long
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 0]]
    assert aligned(read_batch(batch).targets).tolist() == [[-100, 4], [-100, -100]]
    with pytest.raises(LongrollError, match="no tokens"):
        read_batch(Collator(pads("right"))(rows[1:]))


def test_decay_speed_with_an_optimizer_of_ones_own_is_refused(tmp_path):
    model = build("mamba2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(LongrollError, match="`decay_speed`"):
        InitialStateTrainer(model, arguments(tmp_path), decay_speed=10, optimizers=(optimizer, None))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("training", [True, False])
def test_a_hosts_loss_of_padded_rows_predicts_nothing_from_padding(training, side, tmp_path):
    made = type("Mixed", (InitialStateMixin, Trainer), {})
    trainer = made(
        build("mamba2"),
        arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=6,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=12,
        ),
        Collator(pads(side)),
        train_dataset=ragged(),
        eval_dataset=ragged(),
    )
    expected, _ = alone(ragged())
    found = trainer.train().training_loss if training else trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(expected, rel=1e-4)
