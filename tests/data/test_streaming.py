"""Lanes of a stream: every token once, in lanes that go on; what cannot be read is said."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from longroll import LongrollError
from longroll.data import StreamingLanes


@pytest.mark.parametrize("seed", range(5))
def test_every_prediction_is_made_once_and_lanes_go_on(seed):
    random = np.random.default_rng(seed)
    sizes, lanes, length = random.integers(1, 30, 12), int(random.integers(1, 5)), int(random.integers(1, 9))
    ends = np.cumsum(sizes)
    documents = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    data = StreamingLanes(documents, length, lanes)
    for _ in range(2):  # a list can be read again
        items = list(data)
        assert len(items) % lanes == 0
        seen, last = [], [None] * lanes
        for number, item in enumerate(items):
            lane, real = number % lanes, item["shift_labels"] != -100
            ids, targets = item["input_ids"][real].tolist(), item["shift_labels"][real].tolist()
            assert all(b == a + 1 for a, b in zip(ids, targets, strict=True))
            seen += targets
            assert bool(item["starts"]) == (not ids or ids[0] in {d[0] for d in documents})
            if ids and not item["starts"]:
                assert ids[0] == last[lane]
            last[lane] = targets[-1] if ids else None
        assert sorted(seen) == sorted(t for d in documents for t in d[1:].tolist())


def test_rows_of_a_streaming_data_set():
    from datasets import Dataset

    rows = Dataset.from_list([{"input_ids": list(range(3, 9)), "text": "x"}] * 3).to_iterable_dataset()
    assert len(list(StreamingLanes(rows, 4, 2))) == 2 * 2 + 2 * 2
    with pytest.raises(LongrollError, match="input_ids"):
        next(iter(StreamingLanes([{"text": "x"}], 4, 2)))


def test_what_cannot_be_read():
    with pytest.raises(LongrollError, match="two tokens"):
        next(iter(StreamingLanes([[1], []], 4, 2)))
    with pytest.raises(LongrollError, match="0 lanes"):
        StreamingLanes([], 4, 0)
    data = DataLoader(StreamingLanes([torch.arange(9)] * 4, 4, 2), batch_size=2, num_workers=2)
    with pytest.raises(Exception, match="dataloader_num_workers"):
        list(data)
