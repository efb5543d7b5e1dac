"""The words that recipes/tracking.py trains on are those of the library."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "recipes"))

from steps import fit
from tracking import Words, products_of, summary

from longroll import RecurrentLM, StatePassing
from longroll.conformance import tiny
from longroll.data import HFTokenizer
from longroll.tasks import StateTracking, tracking_tokenizer

TOKENIZER = HFTokenizer(tracking_tokenizer(), "tracking")


def _words(task, **how):
    how = {"pieces": 1, "seed": 3, "device": torch.device("cpu")} | how
    return Words(task, 24, 40, **how)


@pytest.mark.parametrize("group", ["parity", "z7", "s3-swaps", "s5"])
def test_labels_are_the_products_of_the_elements_before(group):
    task = StateTracking(TOKENIZER, group)
    batch = _words(task)(0)
    ids, labels = batch["input_ids"].numpy(), batch["shift_labels"].numpy()
    assert (ids[:, 0] == task.start).all() and (labels[:, 0] == -100).all() and batch["starts"].all()
    places = {int(token): i for i, token in enumerate(task.elements)}
    asked = 0
    for row, told in zip(ids, labels, strict=True):
        read = np.array([places.get(int(token), 0) for token in row[1:]])
        asked += int((row[1:] == task.ask_id).sum())
        assert set(read) <= {0, *task.drawn.tolist()}
        assert (task.elements[task.products(read)] == told[1:]).all()
    assert 20 < asked < 110  # a sixteenth of 920


def test_a_word_goes_on_over_its_pieces():
    task = StateTracking(TOKENIZER, "s3")
    words = _words(task, pieces=3)
    parts = [words(step) for step in range(3)]
    starts = [bool(part["starts"].all()) for part in parts]
    assert starts == [True, False, False]
    ids, labels = (
        torch.cat([part[name] for part in parts], dim=1).numpy() for name in ("input_ids", "shift_labels")
    )
    places = {int(token): i for i, token in enumerate(task.elements)}
    read = np.array([places.get(int(token), 0) for token in ids[0, 1:]])
    assert (task.elements[task.products(read)] == labels[0, 1:]).all()
    assert (words(3)["input_ids"].numpy() != ids[:, :24]).any()  # no word comes twice


def test_a_curriculum_begins_with_swaps():
    task = StateTracking(TOKENIZER, "s5")
    words = _words(task, curriculum=10)
    swaps = {int(task.elements[i]) for i in StateTracking(TOKENIZER, "s5-swaps").drawn}
    first, last = (set(words(step)["input_ids"][:, 1:].flatten().tolist()) for step in (0, 10))
    assert first <= swaps | {task.ask_id} and len(last) > 100


def test_products_do_not_depend_on_their_bracketing():
    table = torch.from_numpy(StateTracking(TOKENIZER, "s4").table)
    elements = torch.randint(24, (5, 37), generator=torch.Generator().manual_seed(0))
    state, found = elements[:, 0], products_of(table, elements)
    for t in range(1, 37):
        state = table[state, elements[:, t]]
        assert (found[:, t] == state).all()


def test_steps_learn_and_end_once_learned():
    task = StateTracking(TOKENIZER, "z2")
    torch.manual_seed(0)
    lm = RecurrentLM(tiny.build("mamba2", vocab_size=TOKENIZER.vocab_size))
    told = fit(lm, _words(task), StatePassing(), steps=40, learning_rate=1e-2)
    losses = [loss for _, loss in told["losses"]]
    assert told["steps"] == 40 and losses[-1] < losses[0]
    for warm, ended in ((0, 10), (25, 30)):
        told = fit(lm, _words(task), None, steps=40, learning_rate=1e-2, learned=10.0, warm=warm)
        assert told["steps"] == ended


def test_a_summary_has_the_seeds_of_each_cell():
    runs = [
        {"family": "gla", "group": "z3", "intervention": "sp", "seed": seed, "accuracy": [[14, a, a]]}
        for seed, a in ((0, 0.5), (1, 1.0))
    ]
    (row,) = summary(runs)
    assert row["accuracy"] == [[14, 0.75, 0.25, 0.75, 0.25]]
