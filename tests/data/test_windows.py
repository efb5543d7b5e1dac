import pickle
from itertools import pairwise

import pytest
import torch
from corpora import make_corpus
from hypothesis import given
from hypothesis import strategies as st

from longroll.data import Windows
from longroll.errors import LongrollError

documents = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=30), min_size=1, max_size=8)


@given(documents, st.integers(1, 7), st.sampled_from([None, 0]), st.integers(0, 3))
def test_every_target_once(documents, length, separator_id, seed):
    joined: list[int] = []
    for document in documents:
        joined += ([separator_id] if joined and separator_id is not None else []) + document
    corpus = make_corpus(documents, separator_id)
    if len(joined) <= length:
        with pytest.raises(LongrollError, match="smaller `length`"):
            Windows(corpus, length, seed=seed)
        return
    windows = Windows(corpus, length, seed=seed)
    pairs = []
    for item in windows:
        assert item["input_ids"].shape == item["shift_labels"].shape == (length,)
        assert item["input_ids"].dtype == item["shift_labels"].dtype == torch.int64
        assert item["starts"].dtype == torch.bool and item["starts"].item()
        pairs += zip(item["input_ids"].tolist(), item["shift_labels"].tolist(), strict=True)
    used = (len(joined) - 1) // length * length
    assert sorted(pairs) == sorted(pairwise(joined[: used + 1]))
    # each item is one stretch of the text, its labels one further
    starts = range(0, used, length)
    assert sorted(item["input_ids"].tolist() for item in windows) == sorted(
        joined[s : s + length] for s in starts
    )


def test_num_items_never_runs_dry():
    corpus = make_corpus([list(range(101))])
    windows = Windows(corpus, 10, seed=3, num_items=35)
    firsts = [item["input_ids"][0].item() for item in windows]
    assert len(windows) == len(firsts) == 35
    rounds = [firsts[at : at + 10] for at in range(0, 30, 10)]
    assert all(sorted(one) == list(range(0, 100, 10)) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    assert firsts[:10] == [item["input_ids"][0].item() for item in Windows(corpus, 10, seed=3)]
    assert firsts != [item["input_ids"][0].item() for item in Windows(corpus, 10, seed=4, num_items=35)]
    assert len(Windows(corpus, 10, num_items=4)) == 4


def test_collates_and_pickles():
    from transformers import default_data_collator

    windows = pickle.loads(pickle.dumps(Windows(make_corpus([list(range(50))]), 8)))
    batch = default_data_collator([windows[0], windows[-1]])
    assert batch["input_ids"].shape == batch["shift_labels"].shape == (2, 8) and batch["starts"].shape == (2,)


def test_errors():
    with pytest.raises(LongrollError, match="needs 11 tokens of text, and there are 10"):
        Windows(make_corpus([list(range(10))]), 10)
    with pytest.raises(LongrollError, match="`length` 0"):
        Windows(make_corpus([[1, 2]]), 0)
    with pytest.raises(IndexError):
        Windows(make_corpus([[1, 2]]), 1)[1]
