"""Grids: intervals, resumption, what the figures draw; the official metric of BABILong."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zoo
from longroll import report
from longroll.data import ByteTokenizer
from longroll.errors import LongrollError
from longroll.report.style import PAPER_COLUMN, PHONE, WEB
from longroll.tasks import BABILong, Copying, Passkey, Row, Story, evaluate_grid, wilson
from longroll.tasks.babilong import compare_answers
from longroll.tasks.babilong_prompts import LABELS
from longroll.tasks.evaluate import fingerprint, grid, summary

BYTES = ByteTokenizer()
PLACES, PEOPLE = LABELS["qa1"], LABELS["qa5"]


@pytest.mark.parametrize(
    ("target", "output", "question", "labels", "right"),
    [
        ("office", "The most recent location of Mary is office", "Where is Mary?", PLACES, True),
        ("office", "The OFFICE.", "Where is Mary?", PLACES, True),
        # right by substring, wrong by the metric
        ("office", "kitchen or office", "Where is Mary?", PLACES, False),
        ("office", "bathroom bedroom garden hallway kitchen office", "Where is Mary?", PLACES, False),
        ("office", "I do not know. Perhaps the office", "Where is Mary?", PLACES, False),
        ("office", "a place <context> the office", "Where is Mary?", PLACES, False),
        ("office", "well\n<example>\nAnswer: office", "Where is Mary?", PLACES, False),
        # wrong by "only the target", right by the metric: the question's own labels are left aside
        ("bathroom", "Before the kitchen in the bathroom", "Where was it before the kitchen?", PLACES, True),
        ("bathroom", "Before the office in the bathroom", "Where was it before the kitchen?", PLACES, False),
        ("Fred", "Mary gave the apple to Fred", "Who did Mary give the apple to?", PEOPLE, True),
        ("Fred", "Bill gave the apple to Fred", "Who did Mary give the apple to?", PEOPLE, False),
        ("football", "The football", "What did Bill give to Jeff?", PEOPLE, True),
        ("office", "kitchen. No, the office", "Where is Mary?", PLACES, False),
        ("office", "", "Where is Mary?", PLACES, False),
        # a label inside a longer word counts, as in the source
        ("office", "the officer", "Where is Mary?", PLACES, True),
        # a target that the question names can never be right
        ("kitchen", "kitchen", "What is the kitchen south of?", PLACES, False),
    ],
)  # fmt: skip
def test_the_official_metric_of_babilong(target, output, question, labels, right):
    assert compare_answers(target, output, question, labels) is right


@given(samples=st.integers(1, 400), share=st.floats(0, 1))
def test_wilson_is_where_the_score_test_turns(samples, share):
    """p is in the interval exactly if |right/n - p| <= z sqrt(p (1 - p) / n)."""
    right = round(share * samples)
    low, high = wilson(right, samples)
    assert 0 <= low <= right / samples <= high <= 1
    for p in (low, high):
        if 0 < p < 1:
            z = abs(right / samples - p) / math.sqrt(p * (1 - p) / samples)
            assert math.isclose(z, 1.959964, rel_tol=1e-5)


def test_wilson_of_known_numbers():
    """R, binom::binom.confint(x, n, methods = "wilson")."""
    for (right, samples), (low, high) in {(0, 10): (0.0, 0.2775328), (5, 10): (0.2365931, 0.7634069)}.items():
        assert np.allclose(wilson(right, samples), (low, high), atol=1e-6)


def test_scores_between_0_and_1_get_a_bootstrap():
    values = [0.25, 0.5, 0.75, 1.0] * 8
    found = summary(values)
    assert found["mean"] == np.mean(values) and 0.5 < found["low"] < found["mean"] < found["high"] < 0.75


def test_cells_do_not_depend_on_batches_or_each_other():
    lm = zoo.lm_of("mamba2", vocab_size=256)
    task = Copying(BYTES)
    whole = evaluate_grid(lm, [Row(None, task)], [3, 9], samples=7, batch_size=7)
    single = evaluate_grid(lm, [Row(None, task)], [9], samples=7, batch_size=2)
    strip = [{k: v for k, v in cell.items() if k != "seconds"} for cell in (whole[1], single[0])]
    assert strip[0] == strip[1]
    assert set(whole[0]["scores"]) == {"forced_string", "forced_character", "free_string", "free_character"}


def test_an_interrupted_grid_goes_on_and_measures_nothing_twice():
    lm, seen = zoo.lm_of("mamba2", vocab_size=256), []
    rows = [Row(depth, Passkey(BYTES, instruction=False), depth) for depth in (0.1, 0.9)]
    whole = evaluate_grid(lm, rows, [150, 200], samples=3, save=lambda cells: seen.append(list(cells)))
    assert [len(cells) for cells in seen] == [1, 2, 3, 4]
    done = []
    again = evaluate_grid(lm, rows, [150, 200], samples=3, finished=seen[2], progress=done.append)
    key = {k: v for k, v in whole[3].items() if k != "seconds"}
    assert again[:3] == seen[2] and {k: v for k, v in again[3].items() if k != "seconds"} == key
    assert done == sorted(done) and done[-1] == 12


def test_only_the_key_itself_is_right():
    task = Passkey(BYTES, instruction=False)
    for number in range(5):
        sample = task.sample(300, rng=np.random.default_rng(number))
        assert task.score(sample, sample.answer) == {"accuracy": 1.0}
        assert task.score(sample, BYTES.encode(f"{sample.target} ")) == {"accuracy": 0.0}
        assert task.score(sample, sample.answer[:-1]) == {"accuracy": 0.0}


def test_kinds_get_their_mean():
    stories = [Story(("Mary moved to the office.",), "Where is Mary?", "office")]
    rows = [Row(qa, BABILong(BYTES, qa, stories)) for qa in ("qa1", "qa2")]
    cells = [
        {"length": 0, "row": qa, "scores": {"accuracy": {"mean": mean, "low": 0.0, "high": 1.0}}}
        for qa, mean in (("qa1", 0.5), ("qa2", 1.0))
    ]
    found = grid(cells, rows, [0], "accuracy")
    assert found["rows"] == ["qa1", "qa2", "mean"] and found["accuracy"] == [[0.5, 1.0, 0.75]]
    assert found["low"] == [[0.0, 0.0, None]] and found["lengths"] == [0]


def test_a_fingerprint_sees_one_changed_weight():
    one, other = zoo.lm_of("mamba2"), zoo.lm_of("mamba2")
    assert fingerprint(one) == fingerprint(other)
    with torch.no_grad():
        other.model.get_input_embeddings().weight[0, 0] += 1e-3
    assert fingerprint(one) != fingerprint(other)


def test_no_samples_is_refused():
    with pytest.raises(LongrollError, match="`samples` 0"):
        evaluate_grid(zoo.lm_of("mamba2"), [], [], samples=0)


def runs(**tables):
    return [
        {"label": label, "train_length": 256, "tasks": {"babilong": table}}
        for label, table in (("base", tables), ("sp", tables))
    ]


@pytest.mark.parametrize("look", [WEB, PHONE, PAPER_COLUMN], ids=lambda look: look.name)
def test_figures_of_kinds_and_of_one_row(look):
    several = runs(
        lengths=[0, 1024], rows=["qa1", "qa2", "mean"], accuracy=[[1, 0.5, 0.75], [0.2, 0.1, 0.15]]
    )
    drawn = report.to_svg(report.figures.task_figure(several, "babilong", look=look))
    assert "qa2" in drawn and "mean" in drawn and "depth" not in drawn
    one = runs(lengths=[128, 1024, 4096], accuracy=[[1.0], [0.5], [0.1]], low=[[0.9], [0.4], [0]],
               high=[[1], [0.6], [0.2]])  # fmt: skip
    drawn = report.to_svg(report.figures.task_figure(one, "babilong", look=look))
    assert "accuracy" in drawn and "trained to 256" in drawn
