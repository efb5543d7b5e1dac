"""Lanes over a stream of documents, which may be larger than memory."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import LongrollError
from .lanes import padded_window
from .windows import Item, _positive


class StreamingLanes(IterableDataset[Item]):
    """`longroll.data.Lanes` of a stream: each lane reads whole documents, one after another.

    Items come as those of `Lanes`: step after step, in each step lane after lane, with `input_ids`,
    `shift_labels` and `starts`. One document a lane is in memory. The documents are read in their order:
    shuffle the stream, and repeat it for several epochs (`max_steps` of Trainer says when to stop). At the
    end of the stream, lanes that are done wait for the others.

    Args:
        documents: token ids of one document each, (T,) arrays or lists, or rows with `input_ids`, as a
            streaming data set of `datasets` gives them. An iterable that is not an iterator can be read
            several times.
        length: predicted tokens of a window.
        lanes: rows of the batch, of all ranks together.

    Raises:
        LongrollError: for numbers below 1; while reading, for a stream without a document of two tokens, rows
            without `input_ids`, and several workers, which would each read all of the stream.
    """

    def __init__(self, documents: Iterable[Any], length: int, lanes: int) -> None:
        if lanes < 1:
            raise LongrollError(f"{lanes} lanes: there must be at least one.")
        self.documents, self.length, self.lanes = documents, _positive(length), lanes

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise LongrollError(
                f"{worker.num_workers} workers would each read all of the stream: set dataloader_num_workers "
                "to 1 or 0."
            )
        documents = (ids for ids in map(_token_ids, self.documents) if len(ids) > 1)
        left: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * self.lanes  # what a lane has still to read
        any_read = False
        while True:
            step = []
            for lane, ids in enumerate(left):
                starts = len(ids) < 2
                if starts:
                    ids = next(documents, ids[:0])
                step.append(padded_window(ids[: self.length + 1], self.length, starts=starts))
                left[lane] = ids[self.length :]
                any_read |= len(ids) > 1
            if not any_read:
                raise LongrollError("The stream has no document of two tokens: nothing can be predicted.")
            if all(bool((item["shift_labels"] == -100).all()) for item in step):
                return
            yield from step


def _token_ids(document: Any) -> np.ndarray:
    if isinstance(document, Mapping):
        if "input_ids" not in document:
            raise LongrollError(f"The rows of the stream have no `input_ids` but {', '.join(document)}.")
        document = document["input_ids"]
    return np.asarray(document, dtype=np.int64)
