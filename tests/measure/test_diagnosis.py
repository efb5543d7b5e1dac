"""The diagnosis as a whole: planted faults explained and advised on, sound models left alone."""

import json

import numpy as np
import pytest
import torch
from planted import PLANTED, TRAIN_LENGTH, planted_lm, texts_of_twin, twin_lm
from transformers import Mamba2Config, Mamba2ForCausalLM

import zoo
from longroll import RecurrentLM, diagnose, position_loss
from longroll.data import ByteTokenizer, Corpus, DocumentLengths, Windows, long_sequences
from longroll.measure.advice import advise, of_ablation
from longroll.measure.explain import StateWatch, explain_coverage
from longroll.measure.iid import IIDTest
from longroll.measure.judge import TOLERANCE
from longroll.measure.stationarity import EndDrift
from longroll.state import StateKey


def test_a_planted_head_is_explained():
    long = DocumentLengths(np.array([24 * TRAIN_LENGTH] * 20), whole=True)
    found = diagnose(planted_lm(), texts_of_twin(), train_length=TRAIN_LENGTH, documents=long)
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert found.verdict != "healthy"
    assert data["coverage"]["ranking"][0] == str(PLANTED)
    assert data["coverage"]["causal_sentence"].startswith("One head carries")
    assert str(PLANTED) in data["coverage"]["causal_sentence"]
    assert found.advice.startswith(
        "Repair it by TBPTT: documents of 16 or more windows of 16 tokens hold 100 %"
    )
    assert data["advice"]["intervention"] == "tbptt" and data["advice"]["seconds"] > 0
    assert data["advice"]["command"].endswith(" --train-length 16 --force --output repaired")
    remembered = data["remembrance"]
    assert remembered["starts"][0] == 0 and remembered["ends"][-1] == 384
    assert remembered["mean"][0][-1] == 0


def test_sound_models_raise_no_alarm():
    """20 seeds, each with texts of its own; the loss of the twin on them has no reason to rise."""
    texts = texts_of_twin(160)
    for seed in range(20):
        rows = texts[8 * seed : 8 * seed + 8]
        found = diagnose(twin_lm(), rows, train_length=TRAIN_LENGTH, seed=seed, explain=seed == 0)
        assert found.verdict == "healthy", found.sentence
        assert found.advice.startswith("Leave it alone")


def test_a_model_with_ordinary_decays_is_left_alone():
    """Trained at T = 32 from transformers' own initialisation: such small models hold (paper.md)."""
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=256, hidden_size=48, num_hidden_layers=2, state_size=16, head_dim=24, num_heads=4,
        n_groups=1, chunk_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    lm = RecurrentLM(Mamba2ForCausalLM(config), name="ordinary")
    length, rows, steps = 32, 64, 120
    corpus = Corpus.from_source("stdlib", ByteTokenizer(), split="train", max_tokens=length * rows * steps)
    batches = torch.utils.data.DataLoader(Windows(corpus, length, num_items=rows * steps), batch_size=rows)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=6e-3)
    losses = []
    for batch in batches:
        logits, _ = lm(batch["input_ids"])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 3.0 < 5.0 < losses[0]  # it has learned something that a state could spoil
    texts = Corpus.from_source("stdlib", ByteTokenizer(), split="validation")
    found = diagnose(lm.eval(), long_sequences(texts, 2048, 16), train_length=length, explain=False)
    assert found.verdict == "healthy", found.sentence
    assert found.advice.startswith("Leave it alone")


def test_a_model_that_only_reads_worse_than_afresh_is_told_so():
    found = advise("m", 16, breaks=False, iid=IID, ends=EndDrift(0.0, 0.5), tokens_per_second=1e4)
    assert found.intervention is None and found.command is None
    assert "leave it alone; a repair by recipe longroll (TBPTT for documents of 16 or more" in found.sentence
    found = advise(
        "m", 16, breaks=False, iid=IID, ends=EndDrift(0.0, 0.5), tokens_per_second=1e4, severity=0.46
    )
    assert found.intervention == "longroll" and "posttrain m" in found.command
    assert found.sentence.startswith("It keeps its level because far text is easier. Repair it by")


def test_a_hybrid_whose_attention_breaks_is_not_sent_to_repair_its_states():
    lm = zoo.lm_of("granitemoehybrid")
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.mul_(3)
    rows = texts_of(lm)
    seen = [0]

    def note(_module, inputs):
        seen[0] = inputs[1].seen if len(inputs) > 1 and inputs[1] is not None else 0

    lm.register_forward_pre_hook(note)
    attention = next(m for name, m in lm.model.named_modules() if name.endswith("self_attn"))
    attention.o_proj.register_forward_hook(lambda _m, _i, out: out * 31 if seen[0] >= TRAIN_LENGTH else out)
    found = diagnose(lm, rows, train_length=TRAIN_LENGTH, chunk_size=TRAIN_LENGTH)
    assert found.severity > TOLERANCE
    assert "does not explain the damage" in found.to_json()["coverage"]["causal_sentence"]
    assert found.advice.startswith("Its recurrent states are not the cause")


@pytest.mark.parametrize(("length", "said"), [(28, "measure at least 32"), (384, "No damage to explain")])
def test_what_cannot_be_told_is_not_blamed(length, said):
    """Texts below 2 T, and a model without damage."""
    texts = texts_of_twin()[:, : length + 1]
    watch = StateWatch(planted_lm(), length, TRAIN_LENGTH, seed=0)
    carried = position_loss(twin_lm(), texts, stops=watch.stops, watch=watch)
    section = explain_coverage(twin_lm(), texts, carried, watch, TRAIN_LENGTH, healthy=False)
    assert said in section["causal_sentence"] and section.get("explained") is None


@torch.no_grad()
def texts_of(lm: RecurrentLM, rows: int = 8, length: int = 192) -> torch.Tensor:
    """Texts that a model finds natural within a few tokens."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(zoo.VOCAB, (rows, 1), generator=generator)
    for _ in range(length):
        logits, _ = lm(text[:, -(TRAIN_LENGTH // 2) :])
        text = torch.cat([text, torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator)], dim=1)
    return text


def test_the_control_has_no_state_to_repair():
    data = diagnose(zoo.lm_of("llama"), zoo.tokens(4, 65), train_length=16).to_json()
    assert data["states"] is None and "coverage" not in data and data["advice"]["intervention"] is None
    assert len(data["remembrance"]["ends"]) == 4


KEY = StateKey(0, "recurrent")
IID = IIDTest({KEY: torch.tensor([9.0, 9.5])}, {KEY: torch.tensor([10.0, 10.0])})
LOW_RANK = IIDTest({KEY: torch.tensor([3.0, 9.5])}, {KEY: torch.tensor([10.0, 10.0])})


@pytest.mark.parametrize(
    ("iid", "ends", "intervention", "reason"),
    [
        (LOW_RANK, EndDrift(0.0, 0.5), "sp", "50 % of its heads have states that are not IID"),
        (IID, EndDrift(0.0, 0.5), "sp", "Fitted Noise repaired the loss less"),
        (IID, EndDrift(0.4, 0.001), "fitted", "State Passing is the wrong tool"),
        (LOW_RANK, EndDrift(0.4, 0.001), "fitted", "check the result"),
    ],
)
def test_advice_follows_the_evidence(iid, ends, intervention, reason):
    short = DocumentLengths(np.array([255 * 16] * 200), whole=True)
    found = advise("my model", 256, documents=short, iid=iid, ends=ends, tokens_per_second=1e4)
    assert found.intervention == intervention and reason in found.sentence
    assert "'my model'" in found.command
    assert ("--intervention fitted" in found.command) == (intervention == "fitted")
    assert found.tokens == 500 * 16 * 256
    assert found.seconds == pytest.approx(found.tokens * 3.5 / 1e4)
    assert "12 minutes" in found.sentence and "reset" not in found.sentence
    severe = advise("m", 256, iid=iid, ends=ends, tokens_per_second=1e4, severity=4.474).sentence
    assert "4.47 nats lower from the last T tokens alone (`reading` reset)" in severe
    held = {"what": "all heads", "recovered": 0.97, "low": 0.95, "high": 0.99}
    assert "(`reading` clip) win back 97 %" in of_ablation(found, held).sentence
    assert of_ablation(found, held | {"low": 0.5}) == of_ablation(found, None) == found
