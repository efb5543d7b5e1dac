"""The price of a repair: found where there is one, and not where there is none."""

import math

import pytest
import torch
from planted import TRAIN_LENGTH, planted_lm, texts_of_twin, twin_lm

from longroll import LongrollError, diagnose
from longroll.history import history, record
from longroll.measure.advice import after_repair
from longroll.measure.compare import Comparison, Difference, compare
from longroll.results import DiagnosisResult


def run(rows, *, label="run", fingerprint="a", **other) -> DiagnosisResult:
    """A diagnosis whose texts have these losses, in range and far."""
    mean = sum(rows) / len(rows)
    texts = {"fingerprint": fingerprint, "in_range": list(rows), "far": list(rows)}
    data = {"label": label, "verdict": "healthy", "train_length": 16, "max_position": 64, "texts": texts}
    levels = {"in_range": mean, "far": mean}
    return DiagnosisResult.from_json(data | {"levels": levels} | other)


def losses(seed: int, rows: int = 16, mean: float = 1.4, spread: float = 0.3) -> torch.Tensor:
    return mean + spread * torch.randn(rows, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("seed", range(5))
def test_a_cost_on_the_same_texts_shows_although_texts_differ_by_more(seed):
    base = losses(seed)
    repaired = base + 0.05 + losses(seed + 100, mean=0, spread=0.02)
    found = compare(run(repaired.tolist()), run(base.tolist(), label="base")).in_range
    assert found.paired and found.sign == 1
    assert found.low < (repaired - base).mean().item() < found.high
    assert found.mean == pytest.approx((repaired - base).mean().item())
    back = compare(run(base.tolist()), run(repaired.tolist()))
    assert back.in_range.sign == -1 and back.price.startswith("gains")


def test_no_cost_where_the_interval_holds_zero():
    signs = []
    for seed in range(40):
        base = losses(seed)
        found = compare(
            run((base + losses(seed + 100, mean=0, spread=0.02)).tolist()), run(base.tolist(), label="base")
        )
        signs.append(found.in_range.sign)
        assert ("no cost in range" in found.price) == (found.in_range.sign == 0)
    assert sum(map(abs, signs)) <= 7  # of 40, at a rate of 5 %, and a little more for bootstraps of 16


def test_other_texts_are_compared_by_their_means():
    found = compare(
        run(losses(0, 8).tolist()), run(losses(1, 16, mean=0.2).tolist(), fingerprint="b", label="base")
    ).in_range
    assert not found.paired and found.sign == 1 and found.low > 0.8
    same = compare(run(losses(0, 8).tolist()), run(losses(1, 16).tolist(), fingerprint="b")).in_range
    assert same.sign == 0 and same.high - same.low > 0.2


def test_older_files_hold_no_interval():
    old = run([1.0, 1.2], texts=None)
    found = compare(run([1.5, 1.7]), old)
    assert found.in_range.mean == pytest.approx(0.5) and found.in_range.low is None
    assert (
        found.in_range.sign == 0
        and "0.50 nats higher in range against run, without an interval" in found.price
    )


def test_runs_of_another_end_are_not_compared_there():
    assert compare(run([1.0, 1.2]), run([1.0, 1.2], max_position=128)).far is None


def test_a_loss_that_is_not_finite_is_said():
    found = compare(run([1.0, math.nan]), run([1.0, 1.2]))
    assert found.in_range.sign == 0 and "without a finite loss" in found.price


def test_the_sentence_names_the_price():
    texts = texts_of_twin()[:, :161]
    base = diagnose(twin_lm(), texts, train_length=TRAIN_LENGTH, explain=False)
    paid = diagnose(twin_lm(), texts.flip(1), train_length=TRAIN_LENGTH, explain=False, against=base)
    assert "no cost" not in paid.sentence and "nats in range against base" in paid.sentence
    same = diagnose(
        twin_lm(), texts, train_length=TRAIN_LENGTH, explain=False, against=base.to_json(), control=base
    )
    assert same.sentence.startswith("Holds to 160; no cost in range shows against base (0.000 to 0.000)")
    assert same.advice == "It holds: keep it."
    kept = same.to_json()["comparisons"]
    assert kept["against"]["in_range"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "paired": True}
    broken = diagnose(planted_lm(), texts, train_length=TRAIN_LENGTH, explain=False, against=base)
    assert broken.verdict != "healthy" and "in range against base" in broken.sentence
    assert broken.to_json()["comparisons"]["against"]["far"]["low"] > 0


def test_what_cannot_be_compared_is_refused():
    texts, other = texts_of_twin(), run([1.0] * 4, bytes_per_token=4.0)
    with pytest.raises(LongrollError, match="`against` was trained at 16 tokens and this model at 32"):
        diagnose(twin_lm(), texts, train_length=32, against=other)
    with pytest.raises(LongrollError, match=r"`control` has tokens of 4\.00 bytes"):
        diagnose(twin_lm(), texts, train_length=16, bytes_per_token=1.0, control=other)


def test_a_repaired_model_is_known_as_one(monkeypatch):
    lm, texts = twin_lm(), texts_of_twin()[:, :65]
    assert history(lm.model.config) == []
    monkeypatch.setattr(lm.model.config, "longroll", None, raising=False)
    record(lm.model.config, {"intervention": "none", "steps": 3})
    control = diagnose(lm, texts, train_length=TRAIN_LENGTH, explain=False)
    assert control.details["label"] == "none"
    assert control.advice.endswith(f"read {16 * TRAIN_LENGTH} positions or more (`length`).")
    record(lm.model.config, {"intervention": "sp", "steps": 5})
    assert [step["steps"] for step in history(lm.model.config)] == [3, 5]
    found = diagnose(lm, texts, train_length=TRAIN_LENGTH, explain=False)
    assert found.details["label"] == "sp" and found.to_json()["intervention"] == "sp"
    assert found.advice.startswith("It holds after State Passing") and "leave it alone" not in found.advice
    named = diagnose(lm, texts, train_length=TRAIN_LENGTH, explain=False, label="mine")
    assert named.details["label"] == "mine"


def difference(mean: float, half: float | None) -> Comparison:
    ends = (None, None) if half is None else (mean - half, mean + half)
    return Comparison("base", Difference(mean, *ends, True), None)


@pytest.mark.parametrize(
    ("mean", "half", "said"),
    [(0.5, 0.1, "at a price"), (0.01, 0.005, "keep it"), (0.5, 0.6, "keep it"), (0.5, None, "at a price")],
)
def test_a_price_is_decided_by_its_interval(mean, half, said):
    assert said in after_repair("m", "sp", difference(mean, half)).sentence


@pytest.mark.parametrize(("rival", "named"), [(None, False), (-0.1, False), (0.04, False), (0.06, True)])
def test_a_reading_that_beats_a_repair_is_named(rival, named):
    found = after_repair("m", "sp", difference(0.01, 0.005), rival).sentence
    assert "keep it" in found and ("0.06 nats lower still" in found) == named


@pytest.mark.parametrize("entry", [None, "sp", {"posttrain": "sp"}, {"posttrain": [3, {"steps": 1}]}, [1]])
def test_an_entry_of_another_form_tells_nothing(entry):
    config = type("Config", (), {"longroll": entry})()
    assert history(config) == []
    record(config, {"intervention": "tbptt"})
    assert history(config) == [{"intervention": "tbptt"}]
