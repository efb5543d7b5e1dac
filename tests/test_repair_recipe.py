"""The parts of recipes/repair.py: rows of text, arms, and the figures of a table."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longroll.interventions import StatePassing
from longroll.state import RecurrentState, StateKey

sys.path.append(str(Path(__file__).parent.parent / "recipes"))

from repair_arms import KINDS, SCREENS, Arm, Mixed, arm_of, at_zero, design
from repair_table import Model, scores_table
from repair_text import SPAN, Books, Feed, recall_rows, windows

T = 80


def books(sizes=(700, 2000, 900)) -> Books:
    ids = np.arange(sum(sizes), dtype=np.uint16)  # each token says where it is
    return Books(ids, np.cumsum([0, *sizes]))


def test_books_come_back_from_their_file(tmp_path):
    made = books()
    made.save(tmp_path / "books.xz")
    read = Books.load(tmp_path / "books.xz")
    assert np.array_equal(read.ids, made.ids) and np.array_equal(read.offsets, made.offsets)
    assert np.array_equal(read.book(1), made.ids[700:2700])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_reads_on_until_it_is_said_to_start(kind):
    arm, made = Arm(kind, rows=18), books((9000, 30_000, 20_000))
    stay, depth = arm.places()
    feed = Feed(made, T, stay, depth, seed=1)
    before, moved, started = None, 0, 0
    for _ in range(40):
        tokens, starts = feed.next()
        assert tokens.shape == (18, T + 1)
        assert (tokens[:, 1:] - tokens[:, :-1] == 1).all()  # one run of text
        if before is not None:
            on = tokens[:, 0] == before
            reads_on = torch.from_numpy(stay != 1)
            if depth is None:
                assert (starts == ~on)[reads_on].all()
            crosses = np.searchsorted(made.offsets, tokens[:, 0].numpy(), "right") != np.searchsorted(
                made.offsets, tokens[:, -1].numpy(), "right"
            )
            assert not (torch.from_numpy(crosses) & on & reads_on).any()
            moved, started = moved + int((~on).sum()), started + int(starts.sum())
        before = tokens[:, -1]
    assert moved
    if kind == "sp-depths":
        assert started == pytest.approx(39 * 18 * (2 - 2.0**-8) / 9, rel=0.25)  # 1 + 1/2 + ... over 9 rungs


def test_copied_spans_are_in_their_share_of_the_rows():
    feed = Feed(books((6000,)), T, np.ones(64, dtype=np.int64), copied=0.25, seed=0)
    copied = 0
    for _ in range(20):
        tokens, _ = feed.next()
        broken = tokens[:, 1:] - tokens[:, :-1] != 1
        for row in tokens[broken.any(1)]:
            _, counts = row.unique(return_counts=True)
            assert (counts == 2).sum() == SPAN
            copied += 1
    assert copied / (20 * 64) == pytest.approx(0.25, abs=0.05)


def test_recall_rows_end_in_a_span_told_once_or_not_at_all():
    told, untold = recall_rows(books((3000, 3000, 3000, 3000)), 100, T, 8)
    assert told.shape == untold.shape == (8, T // 4 + 100 + SPAN)
    span = told[:, -SPAN:]
    assert (told[:, T // 4 : T // 4 + SPAN] == span).all()
    assert (untold[:, -SPAN:] == span).all()
    assert not any(torch.isin(row[:-SPAN], row[-SPAN:]).any() for row in untold)


def test_windows_are_spread_over_all_books():
    rows, of = windows(books(), T, 9)
    assert rows.shape == (9, T + 1)
    assert of.bincount().tolist() == [3, 3, 3]


@pytest.mark.parametrize("screen", SCREENS)
def test_arms_are_named_for_what_they_vary(screen):
    arms = design(screen)
    assert len({arm.name for arm in arms}) == len(arms)
    assert [arm_of(arm.name) for arm in arms] == arms
    with pytest.raises(SystemExit, match="speeed"):
        arm_of("sp speeed=3")


def state(values):
    return RecurrentState({StateKey(0, "recurrent"): torch.tensor(values)[:, None, None].float()})


def test_mixed_rows_keep_to_their_halves():
    mixed, whole = (
        Mixed(),
        {"input_ids": torch.zeros(4, 3), "starts": torch.tensor([False, True, False, True])},
    )
    assert mixed.initial_state(whole) is None
    mixed.observe(state([1, 2, 3, 4]))
    chosen = mixed.initial_state(whole)
    assert chosen is not None
    assert chosen[StateKey(0, "recurrent")].flatten().tolist() == [1, 0, 3, 4]  # the second half passes on
    assert at_zero(chosen, 4, torch.device("cpu")).tolist() == [False, True, False, False]
    assert at_zero(None, 2, torch.device("cpu")).all()
    assert isinstance(mixed.halves[1], StatePassing)


def result(label, inside, near, far, *, kind="none", rate=1e-4, **arm):
    arm = {"kind": kind, "rate": rate, "steps": 500, "rows": 32, "seed": 0, "train": "all", "keep": 0} | arm
    return {
        "label": label, "arm": arm, "plan": {"length": 8}, "at": 64, "in_range": [inside] * 3,
        "octaves": [[0, 8], [8, 16], [16, 32], [32, 64], [64, 128], [128, 256], [256, 512]],
        "by_octave": [[v] * 3 for v in (inside, near, near, 9, 9, 9, far)],
        "read_on": [far] * 3, "read_fresh": [near] * 3,
        "development": {"in_range": inside, "beyond": far},
    }  # fmt: skip


def test_the_price_is_against_the_best_plain_steps_and_the_gap_against_the_lowest_octave():
    found = {
        "base": result("base", 4.0, 3.9, 6.0) | {"arm": {}},
        "none a": result("none a", 4.1, 3.8, 6.0),
        "none b": result("none b", 4.0, 3.9, 5.0, rate=1e-3),
        "none c": result("none c", 3.0, 3.0, 3.0, rows=16),  # another budget
        "sp": result("sp", 4.04, 4.0, 3.85, kind="sp"),
    }
    model = Model(found)
    assert model.control is found["none b"]
    assert model.price(found["sp"]) == pytest.approx((1.0, 1.0, 1.0))
    assert model.gap(found["sp"])[0] == pytest.approx(3.85 - 3.9)
    assert model.excess(found["sp"])[0] == pytest.approx(3.85 - 3.9)
    assert [r["label"] for r in model.arms()][:2] == ["none c", "sp"]
    assert model.difficulty() == pytest.approx(0.0)  # base and control read every text at 3.9
    for harder in ("base", "none b"):
        found[harder]["read_fresh"] = [4.1] * 3
    assert model.difficulty() == pytest.approx(0.2)


def test_scores_are_compared_with_the_controls_on_the_same_items():
    def scored(sets, right):
        figures = {"blimp": sum(sets) / 2, "lambada_books": 0.5, "lambada_books_perplexity": 9.0}
        figures |= {"wikitext_paragraphs": 7.0, "wikitext_articles": 8.0}
        tasks = {f"blimp_{i}": {"acc": acc} for i, acc in enumerate(sets)}
        return {"figures": figures, "tasks": tasks | {"lambada_books": {"right": right}}}

    models = {"one": {"control": scored([0.5, 0.6], "0110"), "arm": scored([0.6, 0.7], "0010")}}
    rows = scores_table(models, {"control": "plain", "arm": "repaired", "late": "cut off"}, "control")
    *_, plain, repaired = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows.splitlines()]
    assert plain[:6] == ["one", "plain", "55.00", "", "50.00", ""]
    assert repaired[3] == "+10.00 [+10.00, +10.00]" and repaired[5].startswith("-25.00 [")


def test_books_are_cut_into_documents_of_one_length_and_one_book():
    cut = books().cut(99)
    assert (np.diff(cut.offsets) == 100).all() and cut.count == 7 + 20 + 9
    assert np.array_equal(cut.book(7), np.arange(700, 800))


def test_passages_end_in_a_word_that_they_hold_before_their_last_sentence():
    pytest.importorskip("lm_eval", reason="pip install 'longroll[lm-eval]'")
    from repair_lm_eval import BEFORE, articles, paragraphs, passages

    plain = "The ship lay in the harbour, and nobody had seen the captain since the morning bell. "
    text = plain * 4 + "They waited until dark for the captain.\n\nA short one about the captain.\n"
    (found, *others) = passages(text)
    assert found == (plain * 4 + "They waited until dark for the captain").replace("\n", " ")
    assert len(found.split()) > BEFORE and not others
    page = " = One = \n \n First " + "line " * 20 + "\n = = Part = = \n Short . \n = Two = \n \n Other \n"
    assert [len(part) for part in articles(page)] == [page.index(" = Two"), len(page) - page.index(" = Two")]
    assert [part.split()[0] for part in paragraphs(page)] == ["First"]
