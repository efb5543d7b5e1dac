from collections import Counter
from itertools import pairwise

import pytest
import torch
from corpora import distinct, make_corpus
from hypothesis import given
from hypothesis import strategies as st

from longroll.data import Lanes
from longroll.errors import LongrollError

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda sizes: max(sizes) > 1)


def rows(lanes: Lanes) -> list[list[dict[str, torch.Tensor]]]:
    """The items of each lane in order."""
    return [[lanes[at] for at in range(lane, len(lanes), lanes.lanes)] for lane in range(lanes.lanes)]


def predicted(item: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """The (input, target) pairs of an item; checks its form."""
    inputs, labels = item["input_ids"], item["shift_labels"]
    assert inputs.dtype == labels.dtype == torch.int64 and item["starts"].dtype == torch.bool
    assert item["starts"].shape == () and inputs.shape == labels.shape
    count = int((labels != -100).sum())
    assert (labels[count:] == -100).all() and (inputs[count:] == 0).all()  # padding is at the end only
    return list(zip(inputs[:count].tolist(), labels[:count].tolist(), strict=True))


@given(sizes, st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_predicts_every_successor_once_and_in_order(sizes, length, count, seed):
    documents = distinct(sizes)
    bigrams = [pair for document in documents for pair in pairwise(document)]
    place = {pair: at for at, pair in enumerate(bigrams)}
    lanes = Lanes(make_corpus(documents), length, count, seed=seed)
    assert len(lanes) == lanes.steps * count

    seen: Counter[tuple[int, int]] = Counter()
    for row in rows(lanes):
        last: tuple[int, int] | None = None  # the pair predicted last in this lane
        for item in row:
            assert item["input_ids"].shape == (length,)
            pairs = predicted(item)
            seen.update(pairs)
            assert (
                [place[pair] for pair in pairs] == list(range(place[pairs[0]], place[pairs[-1]] + 1))
                if pairs
                else 1
            )
            if not item["starts"]:
                assert last is not None and pairs[0][0] == last[1]  # goes on with the token predicted last
            last = pairs[-1] if pairs else None
    assert seen == Counter(bigrams)


@given(sizes, st.integers(1, 9), st.integers(1, 5), st.integers(1, 30))
def test_with_steps_no_lane_waits_and_epochs_are_even(sizes, length, count, steps):
    documents = distinct(sizes)
    lanes = Lanes(make_corpus(documents), length, count, steps=steps)
    assert lanes.steps == steps and len(lanes) == steps * count
    for row in rows(lanes):
        last = None
        for item in row:
            pairs = predicted(item)
            assert pairs
            assert item["starts"] or pairs[0][0] == last
            last = pairs[-1][1]


def test_documents_are_whole_when_there_are_enough():
    documents = distinct([20] * 12)
    lanes = Lanes(make_corpus(documents), 8, 3)
    starts = [item["input_ids"][0].item() for item in lanes if item["starts"]]
    assert sorted(starts) == [document[0] for document in documents]
    assert lanes.steps == 12  # 4 documents a lane of 3 windows: balanced, nobody waits


def test_one_long_document_feeds_all_lanes():
    lanes = Lanes(make_corpus(distinct([401])), 10, 4)
    assert lanes.steps == 10
    assert sorted(item["input_ids"][0].item() for item in (lanes[at] for at in range(4))) == [
        1,
        101,
        201,
        301,
    ]
    assert sum(bool(item["starts"]) for item in lanes) == 4


def test_a_rank_reads_its_own_rows():
    """Batches of all ranks together are consecutive, so a batch of `lanes` rows continues row by row."""
    lanes = Lanes(make_corpus(distinct([90] * 6)), 10, 6)
    loader = torch.utils.data.DataLoader(lanes, batch_size=6, drop_last=True)
    last = None
    for batch in loader:
        if last is not None:
            goes_on = ~batch["starts"]
            assert (batch["input_ids"][goes_on, 0] == last[goes_on]).all() and goes_on.any()
        last = batch["shift_labels"][:, -1]


def test_seed():
    corpus = make_corpus(distinct([9, 30, 5, 17, 22, 8, 40]))

    def ids(seed: int) -> list[int]:
        return torch.stack([item["input_ids"] for item in Lanes(corpus, 4, 2, steps=40, seed=seed)]).tolist()

    assert ids(0) == ids(0) != ids(1)


def test_errors():
    with pytest.raises(LongrollError, match="no document has two tokens"):
        Lanes(make_corpus([[1], [2]]), 4, 2)
    for numbers in ({"lanes": 0}, {"lanes": 1, "steps": 0}):
        with pytest.raises(LongrollError, match="at least one of each"):
            Lanes(make_corpus([[1, 2]]), 4, **numbers)
    with pytest.raises(LongrollError, match="`length` 0"):
        Lanes(make_corpus([[1, 2]]), 0, 1)
    with pytest.raises(IndexError):
        Lanes(make_corpus([[1, 2]]), 1, 1)[1]
