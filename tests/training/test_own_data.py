"""Data of one's own: each row trains as it would alone, and metrics see labels as Trainer gives them."""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_batch import Tokenizer
from test_trainer import (
    ROWS,
    SGD,
    T,
    arguments,
    assert_same_weights,
    corpus_of,
    lanes,
    moved,
    quick_collections,
    train,
)
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer

from longroll import TBPTT, InitialStateTrainer, LongrollError, StatePassing
from longroll.data import Lanes, StreamingLanes, Windows
from zoo import VOCAB, build, lm_of

__all__ = ["quick_collections"]  # a fixture of each test here


def ragged(rows=12, seed=0):
    random = np.random.default_rng(seed)
    made = [random.integers(0, VOCAB, random.integers(3, 12)).tolist() for _ in range(rows)]
    return [{"input_ids": ids, "source": "book", "id": i} for i, ids in enumerate(made)]


def alone(rows, states=None):
    """Summed loss of each row read alone, its targets, and the final states."""
    lm, total, items, finals = lm_of("mamba2"), 0.0, 0, []
    for number, row in enumerate(rows):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits, final = lm(ids, None if states is None else states[number])
        total += F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        items += ids.shape[1] - 1
        finals.append(final.part("recurrent", "conv"))
    return total / items, finals


@pytest.mark.parametrize("strategy", ["sequential", "group_by_length", "batch_rebalance"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_train_as_they_would_alone(strategy, side, tmp_path):
    data, tokenizer, losses, batches = ragged(), Tokenizer(), [], []
    tokenizer.padding_side, tokenizer.model_input_names = side, ["input_ids"]
    tokenizer.save_pretrained = lambda folder: None

    class Noting(InitialStateTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            batches.append(inputs)
            losses.append(loss.item())
            return loss

    options = {"train_sampling_strategy": strategy, "learning_rate": 0.0, "max_steps": 4}
    trainer = Noting(
        build("mamba2"),
        arguments(tmp_path, **options),
        intervention="sp",
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    finals, known = None, {tuple(row["input_ids"]) for row in data}
    for inputs, loss in zip(batches, losses, strict=True):
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        rows = [{"input_ids": i[m].tolist()} for i, m in zip(inputs["input_ids"], mask, strict=True)]
        assert all(tuple(row["input_ids"]) in known for row in rows)
        passed = finals and [finals[i % len(finals)] for i in range(len(rows))]
        expected, finals = alone(rows, passed)
        assert loss == pytest.approx(expected, rel=1e-4)


class Ordered(Dataset):
    """Not longroll's class, and it has `lanes`."""

    def __init__(self, data, lanes):
        self.items, self.lanes = [data[i] for i in range(len(data))], lanes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_data_with_lanes_are_read_in_order_whatever_their_class(tmp_path):
    one, other = build("mamba2"), build("mamba2")
    train(one, TBPTT(), lanes(), tmp_path, **SGD)
    train(other, TBPTT(), Ordered(lanes(), ROWS), tmp_path, **SGD)
    assert moved(one, "mamba2")
    assert_same_weights(other, one)
    with pytest.raises(LongrollError, match=r"group_by_length.*Ordered"):
        train(
            other, StatePassing(), Ordered(lanes(), ROWS), tmp_path, train_sampling_strategy="group_by_length"
        )


def test_the_order_is_that_of_the_data_asked_about(tmp_path):
    """A host may ask about its own data, or about others in their place."""
    for mine, others in [(lanes(), ragged()), (ragged(), lanes())]:
        trainer = InitialStateTrainer(build("mamba2"), arguments(tmp_path), train_dataset=mine)
        for asked, given in [(mine, ()), (mine, (mine,)), (others, (others,))]:
            sampler = trainer._get_train_sampler(*given)
            assert isinstance(sampler, SequentialSampler) == isinstance(asked, Lanes)
            assert len(sampler) == len(asked)


def test_a_stream_of_documents_for_tbptt(tmp_path):
    corpus = corpus_of()
    documents = [corpus.document(i) for i in range(corpus.documents)]
    model = build("mamba2")
    train(model, TBPTT(), StreamingLanes(documents, T, ROWS), tmp_path, **SGD)
    other = build("mamba2")
    items = list(StreamingLanes(documents, T, ROWS))
    train(other, TBPTT(), Ordered(items, ROWS), tmp_path, **SGD)
    assert moved(model, "mamba2")
    assert_same_weights(model, other)
    with pytest.raises(LongrollError, match="lanes=2"):
        train(model, TBPTT(), StreamingLanes(documents, T, 3), tmp_path)


@pytest.mark.parametrize("name", ["mamba2", "jamba"])
def test_metrics_see_labels_in_trainers_convention(name, tmp_path):
    """Labels are aligned with the inputs, as transformers' Trainer gives them."""
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        logits, labels = prediction.predictions, prediction.label_ids
        nll = F.cross_entropy(
            torch.tensor(logits[:, :-1]).flatten(0, 1), torch.tensor(labels[:, 1:]).flatten()
        )
        return {"nll": nll.item()}

    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, VOCAB, (4, 9)).tolist()]
    for data in (rows, Windows(corpus_of(seed=1), T, num_items=4)):
        trainer = InitialStateTrainer(
            build(name), arguments(tmp_path), intervention="sp", eval_dataset=data, compute_metrics=metrics
        )
        found = trainer.evaluate()
        labels = torch.tensor(seen[-1].label_ids)
        items = [data[i] for i in range(4)]
        ids = torch.stack([torch.as_tensor(item["input_ids"]) for item in items])
        assert torch.equal(labels[:, 1:], ids[:, 1:])
        if data is rows:
            assert found["eval_nll"] == pytest.approx(found["eval_loss"], rel=1e-4)
            hf = Trainer(build(name), arguments(tmp_path), eval_dataset=rows).evaluate()
            assert found["eval_loss"] == pytest.approx(hf["eval_loss"], rel=1e-4)


def test_logits_for_metrics_are_preprocessed(tmp_path):
    trainer = InitialStateTrainer(
        build("mamba2"),
        arguments(tmp_path),
        eval_dataset=Windows(corpus_of(seed=1), T, num_items=4),
        compute_metrics=lambda seen: {"rows": seen.predictions.ndim},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    assert trainer.evaluate()["eval_rows"] == 2


@pytest.mark.parametrize("name", ["jamba", "qwen3_next"])
def test_a_routers_loss_is_that_of_the_real_tokens(name, tmp_path):
    model = build(name, output_router_logits=True, router_aux_loss_coef=0.5).train()
    trainer = InitialStateTrainer(model, arguments(tmp_path), processing_class=Tokenizer())
    batch = trainer.data_collator(ragged(3))
    losses, routed = [], []
    for ids, real in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        alone = model(input_ids=ids[real][None], use_cache=False)
        losses.append(F.cross_entropy(alone.logits[0, :-1], ids[real][1:], reduction="none"))
        routed.append(alone.router_logits)
    layers = tuple(
        torch.cat([r.reshape(-1, r.shape[-1]) for r in layer]) for layer in zip(*routed, strict=True)
    )
    modeling = importlib.import_module(type(model).__module__)
    router = modeling.load_balancing_loss_func(layers, layers[0].shape[-1], model.config.num_experts_per_tok)
    expected = torch.cat(losses).mean() + 0.5 * router
    assert trainer.compute_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_folder_and_a_name(tmp_path):
    build("mamba2").save_pretrained(tmp_path / "model")
    trainer = InitialStateTrainer(str(tmp_path / "model"), arguments(tmp_path), intervention="tbptt")
    assert isinstance(trainer.intervention, TBPTT) and trainer.base.dtype == torch.float32
    assert InitialStateTrainer(build("mamba2"), arguments(tmp_path), intervention="none").intervention is None
    with pytest.raises(LongrollError, match=r"'spp'.*sp, tbptt, none"):
        InitialStateTrainer(build("mamba2"), arguments(tmp_path), intervention="spp")


def test_an_unknown_key_stops_before_the_first_step(tmp_path):
    data = [{"input_ids": [3, 4, 5], "loss_weight": [1.0, 0.0, 1.0]}] * 8
    model = build("mamba2")
    with pytest.raises(LongrollError, match="`loss_weight`"):
        train(model, StatePassing(), data, tmp_path)
    assert not moved(model, "mamba2")


LOSSES = ["label_smoothing_factor", "neftune_noise_alpha", "compute_loss_func", "output_router_logits"]


@pytest.mark.parametrize(
    ("name", "what"),
    [("jamba", what) for what in LOSSES]
    + [pytest.param(n, LOSSES[-1], marks=pytest.mark.slow) for n in ("granitemoehybrid", "minimax")]
    + [("qwen3_next", LOSSES[-1])],
)
def test_losses_are_transformers_trainers(name, what, tmp_path):
    calls = []

    def func(outputs, labels, num_items_in_batch=None):
        calls.append(labels)
        return outputs.logits.float().pow(2).sum() / num_items_in_batch

    options = {what: 0.3} if what in ("label_smoothing_factor", "neftune_noise_alpha") else {}
    given = {what: func} if what == "compute_loss_func" else {}
    ids = torch.randint(3, VOCAB, (16, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row.where(row > 9, -100)} for row in ids]
    router = (
        {"output_router_logits": True, "router_aux_loss_coef": 0.5} if what == "output_router_logits" else {}
    )
    models = [build(name, **router) for _ in range(3)]
    accumulate = SGD | {
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
        "max_steps": 3,
    }
    for model, kind in zip(models, (Trainer, InitialStateTrainer, InitialStateTrainer), strict=True):
        control = {"intervention": "sp" if model is models[2] else None} if kind is not Trainer else {}
        kind(
            model, arguments(tmp_path, **accumulate, **options), train_dataset=data, **given, **control
        ).train()
    assert_same_weights(models[1], models[0], 1e-4)
    assert bool(calls) == (what == "compute_loss_func")
    for theirs, ours in zip(calls[: len(calls) // 3], calls[len(calls) // 3 :], strict=False):
        assert torch.equal(theirs[:, 1:], ours[:, 1:])
        assert (ours[:, 0] == -100).all()  # a row's first token is predicted from nothing
    with pytest.raises(AssertionError):
        assert_same_weights(models[2], models[0], 1e-4)  # the state enters
