"""InitialStateMixin around TRL's SFTTrainer: its loss, our states; what cannot be is refused by name."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_trainer import assert_same_weights, data_for, quick_collections, train
from transformers import Trainer, TrainingArguments

from longroll import InitialStateMixin, InitialStateTrainer, LongrollError, StatePassing
from zoo import VOCAB, build, lm_of

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

__all__ = ["quick_collections"]  # a fixture of each test here


class SFT(InitialStateMixin, trl.SFTTrainer):
    """Notes the state, the batch and the loss of each step, and the weights before it."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        before = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        start = getattr(self.intervention, "passed", None)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.__dict__.setdefault("seen", []).append((before, start, dict(inputs), loss.detach()))
        return loss


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def texts(rows=24, seed=0, **columns):
    random = torch.Generator().manual_seed(seed)

    def text(low, high):
        size = int(torch.randint(low, high, (), generator=random))
        return " ".join(f"w{i}" for i in torch.randint(2, VOCAB, (size,), generator=random).tolist())

    return datasets.Dataset.from_list(
        [{n: text(*sizes) for n, sizes in columns.items()} for _ in range(rows)]
    )


def sft(tmp_path, tokenizer, data, model=None, intervention="sp", cls=SFT, trainer=None, **options):
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "max_length": 32,
    }
    made = cls(
        build("mamba2") if model is None else model,
        trl.SFTConfig(**(defaults | options)),
        train_dataset=data,
        processing_class=tokenizer,
        intervention=intervention,
        **(trainer or {}),
    )
    made.train()
    return made


def document_by_document(before, start, inputs):
    """The loss that TRL wants, each document read alone by longroll, a row's first from its state."""
    lm = lm_of("mamba2")
    lm.model.load_state_dict({n.removeprefix("base_model.model."): t for n, t in before.items()})
    lm.model.eval()
    total, items = 0.0, 0
    for row, (ids, labels) in enumerate(zip(inputs["input_ids"], inputs["labels"], strict=True)):
        real = (
            inputs["attention_mask"][row].bool()
            if "attention_mask" in inputs
            else torch.ones_like(ids).bool()
        )
        ids, labels = ids[real], labels[real]
        cuts = inputs["cu_seq_lens_q"].tolist() if "cu_seq_lens_q" in inputs else [0, len(ids)]
        for a, b in itertools.pairwise(cuts):
            state = start.rows([row % start.batch_size]) if start is not None and a == 0 else None
            with torch.no_grad():
                logits, _ = lm(ids[None, a:b], state)
            total += F.cross_entropy(logits[0, :-1], labels[a + 1 : b], reduction="sum").item()
            items += int((labels[a + 1 : b] != -100).sum())
    return total / items


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"text": (4, 14)}, {}),
        ({"prompt": (3, 8), "completion": (2, 6)}, {}),
        ({"text": (4, 14)}, {"packing": True}),
        ({"text": (4, 14)}, {"padding_free": True, "max_length": None}),
        ({"text": (4, 14)}, {"packing": True, "packing_strategy": "wrapped"}),
        ({"prompt": (3, 8), "completion": (2, 6)}, {"gradient_checkpointing": True}),
    ],
    ids=["padded", "completion_only", "packed", "padding_free", "wrapped", "checkpointing"],
)
def test_its_loss_is_that_of_each_document_from_its_state(columns, options, tmp_path, tokenizer):
    trainer = sft(tmp_path, tokenizer, texts(**columns), **options)
    assert len(trainer.seen) == 4 and trainer.intervention.passed is not None
    apart = []
    for before, start, inputs, loss in trainer.seen:
        expected = document_by_document(before, start, inputs)
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        apart.append(abs(document_by_document(before, None, inputs) - expected))
    assert max(apart[1:]) > 1e-3  # the state enters


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_sft(tmp_path, tokenizer):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=True)
    data = texts(text=(4, 14))
    trainer = sft(tmp_path, tokenizer, data, trainer={"peft_config": config}, learning_rate=0.0)
    for _, start, inputs, loss in trainer.seen:  # B is zero: the base model's loss
        expected = document_by_document(build("mamba2").state_dict(), start, inputs)
        assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_without_an_intervention_it_is_the_host(tmp_path, tokenizer):
    class Host(trl.SFTTrainer):
        def __init__(self, *args, intervention=None, **kwargs):
            super().__init__(*args, **kwargs)

    data = datasets.Dataset.from_list([{"input_ids": list(range(2, 14)), "labels": list(range(2, 14))}] * 8)
    ours = sft(tmp_path, tokenizer, data, intervention=None)
    hosts = sft(tmp_path, tokenizer, data, cls=Host)
    assert_same_weights(ours.model, hosts.model, 1e-5)


def test_around_transformers_trainer_it_is_our_trainer(tmp_path):
    class Plain(InitialStateMixin, Trainer):
        pass

    one, other = build("mamba2"), build("mamba2")
    train(one, StatePassing(), data_for("sp"), tmp_path, spy=Plain)
    train(other, StatePassing(), data_for("sp"), tmp_path)
    assert_same_weights(one, other, 1e-4)


@pytest.mark.parametrize("base", [InitialStateMixin, InitialStateTrainer], ids=lambda c: c.__name__)
def test_the_other_order_of_classes_is_refused(base, tmp_path, tokenizer):
    with pytest.raises(LongrollError, match=r"\(InitialStateMixin, SFTTrainer\)"):
        sft(tmp_path, tokenizer, texts(text=(4, 9)), cls=type("Wrong", (trl.SFTTrainer, base), {}))


def test_our_loss_in_the_place_of_sfts_is_refused(tmp_path, tokenizer):
    both = type("Both", (InitialStateTrainer, trl.SFTTrainer), {})
    with pytest.raises(LongrollError, match=r"Both\(InitialStateMixin, SFTTrainer\)"):
        sft(tmp_path, tokenizer, texts(text=(4, 9)), cls=both)


@pytest.mark.parametrize("name", ["DPOTrainer", "GRPOTrainer", "RLOOTrainer", "RewardTrainer"])
def test_trainers_of_pairs_are_refused(name, tmp_path):
    host = getattr(trl, name)
    with pytest.raises(LongrollError, match=name):
        type("Pairs", (InitialStateMixin, host), {})(build("mamba2"), TrainingArguments(str(tmp_path)))


def test_hosts_with_losses_of_their_own(tmp_path):
    class Host(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            ids = inputs["input_ids"]
            return sum(model(input_ids=i, labels=i).loss for i in (ids, ids))

    class Other(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(input_ids=inputs["input_ids"].flip(1), labels=inputs["input_ids"]).loss

    class Never(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return next(model.parameters()).sum()

    class Own(Trainer):
        """A loss without labels."""

        def compute_loss(self, model, inputs, *args, **kwargs):
            assert "labels" not in inputs
            return model(input_ids=inputs["input_ids"]).logits.float().pow(2).mean()

    made = type("Mixed", (InitialStateMixin, Own), {})
    train(build("mamba2"), StatePassing(), [{"input_ids": [3, 4, 5]}] * 8, tmp_path, spy=made)
    for host, said in ((Host, "several times"), (Other, "other rows"), (Never, "did not call")):
        with pytest.raises(LongrollError, match=said):
            made = type("Mixed", (InitialStateMixin, host), {})
            train(build("mamba2"), StatePassing(), data_for("sp"), tmp_path, spy=made)
