"""The causal test: the planted head carries the damage, a sound model has none to explain."""

import math

import pytest
from planted import PLANTED, TRAIN_LENGTH, planted_lm, texts_of_twin, twin_lm

from longroll.errors import LongrollError
from longroll.measure._coverage import Head, coverage
from longroll.measure._state_ablation import DAMAGE, CausalTest, Recovery, causal, state_ablation


@pytest.fixture(scope="module")
def planted_coverage():
    return coverage(planted_lm(), texts_of_twin(), TRAIN_LENGTH)


@pytest.mark.parametrize("mode", ["rescale", "swap"])
def test_planted_head_carries_the_damage(planted_coverage, mode):
    done = []
    found = causal(
        planted_lm(),
        texts_of_twin(),
        planted_coverage,
        TRAIN_LENGTH,
        mode=mode,
        candidates=3,
        progress=done.append,
    )
    assert found.damage > 0.5
    assert found.together[-1].heads == [PLANTED]
    assert found.together[-1].recovered > 0.8
    others = [r for r in found.alone if r.heads not in ([PLANTED], [Head(PLANTED.layer, None)])]
    assert others and all(abs(r.recovered) < 0.1 for r in others)
    # by a whole layer as by its guilty head alone
    layer = next(r for r in found.alone if r.heads == [Head(PLANTED.layer, None)])
    assert layer.recovered == pytest.approx(found.together[-1].recovered, abs=0.1)
    assert found.sentence.startswith("One head carries") and str(PLANTED) in found.sentence
    assert done == sorted(done)


def test_a_sound_model_has_no_damage_to_explain():
    lm, texts = twin_lm(), texts_of_twin()
    found = causal(lm, texts, coverage(lm, texts, TRAIN_LENGTH), TRAIN_LENGTH)
    assert found.all_heads is None and found.alone == []
    assert found.sentence.startswith("No damage")


@pytest.mark.parametrize("length", [2 * TRAIN_LENGTH, 2 * TRAIN_LENGTH + 1, 39, 40, 3 * TRAIN_LENGTH - 1])
def test_texts_of_two_to_three_training_lengths_are_measured(length):
    texts = texts_of_twin()[:, : length + 1]
    found = state_ablation(planted_lm(), texts, coverage(planted_lm(), texts, TRAIN_LENGTH), TRAIN_LENGTH)
    assert math.isfinite(found.damage)
    if found.damage <= DAMAGE:
        assert found.explained is None and found.all_heads is None
        return
    shares = [*found.alone, *found.together, found.all_heads]
    assert all(math.isfinite(x) for share in shares for x in (share.recovered, share.low, share.high))
    assert found.explained and found.together[-1].heads == [PLANTED]


def recovery(share: float, *heads: tuple[int, int | None]) -> Recovery:
    return Recovery([Head(*head) for head in heads], share, share - 0.1, share + 0.1)


def test_sentences():
    several = CausalTest(
        2.0,
        [recovery(0.4, (0, 1))],
        [recovery(0.4, (0, 1)), recovery(0.84, (0, 1), (2, 0))],
        recovery(0.9, (0, None)),
        "rescale",
    )
    assert several.sentence.startswith("These 2 heads carry 84 % of the damage")
    spread = CausalTest(
        2.0, [recovery(0.2, (0, 1))], [recovery(0.2, (0, 1))], recovery(0.9, (0, None)), "rescale"
    )
    assert spread.sentence.startswith("None alone does the damage: layer 0 head 1 carries 20 %")
    elsewhere = CausalTest(
        2.0, [recovery(0.1, (0, 1))], [recovery(0.1, (0, 1))], recovery(0.1, (0, None)), "swap"
    )
    assert elsewhere.sentence.startswith("The range of the states does not explain")
    untold = CausalTest(2.0, [], [], Recovery([Head(0, None)], 0.1, -0.3, 0.5), "swap")
    assert untold.explained is None and "too few or too short" in untold.sentence
    nowhere = CausalTest(0.06, [], [], Recovery([Head(0, None)], 1.67, 0.2, 3.3), "rescale")
    assert "167 % (20 % to 330 %) of a damage of 0.06 nats: measure more" in nowhere.sentence
    broken = CausalTest(2.0, [], [], recovery(math.nan, (0, None)), "rescale")
    assert broken.explained is None and "not finite" in broken.sentence
    rows = several.table()
    assert [row["what"] for row in rows] == ["layer 0 head 1", "layer 0 head 1 + layer 2 head 0", "all heads"]
    assert math.isclose(rows[0]["recovered"], 0.4)
    assert several.to_json()["together"][1]["heads"] == [[0, 1], [2, 0]]


def test_refusals(planted_coverage):
    with pytest.raises(LongrollError, match="too few"):
        causal(planted_lm(), texts_of_twin()[:, :20], planted_coverage, TRAIN_LENGTH)
    with pytest.raises(LongrollError, match="`train_length`"):
        causal(planted_lm(), texts_of_twin(), planted_coverage)
    with pytest.raises(LongrollError, match="rescale, swap"):
        causal(planted_lm(), texts_of_twin(), planted_coverage, TRAIN_LENGTH, mode="erase")
