"""Shuffled windows of joined documents: the data of ordinary training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import LongrollError
from .corpus import Corpus

Item = dict[str, torch.Tensor]


class Windows(Dataset[Item]):
    """Windows of `length` predicted tokens in a shuffled order.

    The documents are joined, with the tokenizer's separator between if it has one, and cut into windows;
    window i is predicted at positions i * length + 1 ... (i + 1) * length of the joined text, so that the
    target after a window's last token is the first token of the next window and none is lost. The rest
    at the end, less than one window, is not used.

    An item has `input_ids` (length,) and `shift_labels` (length,), the token after each, both int64, and
    `starts` (), bool, always True: no window continues another.
    """

    def __init__(self, corpus: Corpus, length: int, *, seed: int = 0, num_items: int | None = None):
        """Cut the corpus and draw the order.

        Args:
            corpus: tokenised text.
            length: predicted tokens of a window.
            seed: random seed of the order.
            num_items: how many items to give: every window once in a new order, again and again; None: once.

        Raises:
            LongrollError: there is not one whole window.
        """
        self.length = _positive(length)
        self.ids = corpus.joined()
        self.windows = (len(self.ids) - 1) // self.length
        if self.windows < 1:
            raise LongrollError(
                f"a window of {length} tokens needs {length + 1} tokens of text, "
                f"and there are {len(self.ids)}: ask for a smaller `length` or give more text"
            )
        self.order = Rounds(self.windows, seed, num_items)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Item:
        start = self.order[index] * self.length
        # + 1: the token after the last input is its target
        ids = torch.from_numpy(self.ids[start : start + self.length + 1].astype(np.int64))
        return {"input_ids": ids[:-1], "shift_labels": ids[1:], "starts": torch.tensor(True)}


class Rounds(Sequence[int]):
    """The numbers below `size`, each once in a drawn order, and again and again in new ones.

    The orders of two rounds exist at a time: a run of any length takes no more memory.

    Args:
        size: how many numbers.
        seed: random seed of the orders.
        items: how many numbers to give in all; None: one round.
    """

    def __init__(self, size: int, seed: int, items: int | None = None) -> None:
        self.size, self.seed = size, seed
        self.items = size if items is None else items
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: Any) -> Any:
        number, place = divmod(range(self.items)[index], self.size)
        if number not in self._orders:
            kept = list(self._orders.items())[-1:]
            self._orders = dict(kept) | {number: self._order(number)}
        return int(self._orders[number][place])

    def _order(self, number: int) -> np.ndarray:
        return np.random.default_rng([self.seed, number]).permutation(self.size)


def _positive(length: int) -> int:
    """Check the length of a window."""
    if length < 1:
        raise LongrollError(f"`length` {length}: a window has at least one token")
    return length
