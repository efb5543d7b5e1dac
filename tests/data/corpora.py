"""Small corpora for the tests of this folder."""

import numpy as np

from longroll.data import Corpus


def make_corpus(documents: list[list[int]], separator_id: int | None = None) -> Corpus:
    """A corpus of documents given as lists of ids."""
    ids = np.array([id for document in documents for id in document], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    return Corpus(ids, offsets, len(ids), separator_id)


def distinct(sizes: list[int]) -> list[list[int]]:
    """Documents in which no id occurs twice, so that a pair of ids tells its place."""
    ids = iter(range(1, sum(sizes) + 1))
    return [[next(ids) for _ in range(size)] for size in sizes]
