"""Lanes: document-contiguous data, where row b of a batch goes on where row b of the last one ended."""

import heapq
from itertools import pairwise

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import LongrollError
from ..sizes import check_bytes
from .corpus import Corpus
from .windows import Item, _positive

IGNORED = -100  # the label that cross-entropy leaves out
PADDING = 0


class Lanes(Dataset[Item]):
    """`lanes` readers, each of which reads whole documents one after another, `length` tokens a step.

    Item k * lanes + l is step k of lane l. A Trainer that reads in this order (train_sampling_strategy
    "sequential", drop_last, batches of all ranks together = `lanes`) sees in row b of step k + 1 the
    continuation of row b of step k, on every rank.

    An item has `input_ids` (length,) and `shift_labels` (length,), the next token of the same document, both
    int64, and `starts` (), bool: this window begins a document, the carried state must be set back. A
    document's last window is padded (id 0, label -100). The last token of a document has no target.

    Every token that follows another in its document is predicted exactly once an epoch. The documents of an
    epoch are dealt to the lanes longest first, each to the lane with the least to read, and every lane
    shuffles its own. A document longer than a lane's share of the corpus (a single book) is dealt in pieces
    of that share, so that no lane reads the same text or none: each piece begins with `starts` and the prefix
    of a document, no prediction is lost, only what came before the piece. Where the lanes of the last epoch
    end is not level: without `steps`, lanes that are done wait (windows of padding, `starts` True) for the
    others; with `steps`, the next epoch is dealt on top, so that no lane ever waits.
    """

    def __init__(self, corpus: Corpus, length: int, lanes: int, *, steps: int | None = None, seed: int = 0):
        """Deal the documents.

        Args:
            corpus: tokenised text.
            length: predicted tokens of a window.
            lanes: rows of the batch, of all ranks together.
            steps: how many windows every lane gives; None: one epoch.
            seed: random seed of the dealing and of the order.

        Raises:
            LongrollError: no document has two tokens, or a number is not positive.
        """
        if lanes < 1 or (steps is not None and steps < 1):
            raise LongrollError(f"{lanes} lanes, {steps} steps: there must be at least one of each")
        if steps is not None:
            check_bytes(f"`steps` {steps} of {lanes} lanes", 64 * steps * lanes, "ask for fewer steps")
        self.length, self.lanes = _positive(length), lanes
        self.ids, pieces = _pieces(corpus, self.length, lanes)
        if not len(pieces):
            raise LongrollError("no document has two tokens, so none can be predicted: give more text")
        self.windows = _deal(pieces, self.length, lanes, steps, seed)
        self.steps: int = self.windows.shape[0]

    def __len__(self) -> int:
        return self.steps * self.lanes

    def __getitem__(self, index: int) -> Item:
        index = range(len(self))[index]
        start, size, starts = self.windows[index // self.lanes, index % self.lanes].tolist()
        return padded_window(self.ids[start : start + size + 1], self.length, starts=bool(starts))


def padded_window(ids: np.ndarray, length: int, *, starts: bool) -> Item:
    """Return the item of a window of tokens and the one after them, (at most length + 1,), padded on the
    right.
    """
    input_ids = torch.full((length,), PADDING, dtype=torch.int64)
    shift_labels = torch.full((length,), IGNORED, dtype=torch.int64)
    size = max(0, len(ids) - 1)
    if size:
        tokens = torch.from_numpy(ids.astype(np.int64))
        input_ids[:size], shift_labels[:size] = tokens[:-1], tokens[1:]
    return {"input_ids": input_ids, "shift_labels": shift_labels, "starts": torch.tensor(starts)}


def _pieces(corpus: Corpus, length: int, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what is dealt: ids, and of each piece its first token among them and how many after it are
    predicted.

    The pieces are (pieces, 2) int64.
    """
    sizes = corpus.lengths - 1
    share = max(
        1, -(-int(np.sum(-(-sizes // length))) // lanes) * length
    )  # predictions of a lane's fair share
    ids, offsets = corpus.ids, corpus.offsets
    if corpus.prefix_ids and (sizes > share).any():
        ids, offsets = _divided(corpus, share + 1)
    pieces = [
        (start + done, min(share, stop - 1 - start - done))
        for start, stop in pairwise(offsets.tolist())
        for done in range(0, stop - 1 - start, share)
    ]
    return ids, np.array(pieces, dtype=np.int64).reshape(-1, 2)


def _divided(corpus: Corpus, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and offsets of the documents in pieces of at most `most` tokens, each with the prefix."""
    prefix = np.array(corpus.prefix_ids, dtype=np.int32)
    room = max(1, most - len(prefix))
    texts = (corpus.document(index)[len(prefix) :] for index in range(corpus.documents))
    pieces = [
        np.concatenate([prefix, text[at : at + room]]) for text in texts for at in range(0, len(text), room)
    ]
    return np.concatenate(pieces), np.cumsum([0, *map(len, pieces)])


def _deal(pieces: np.ndarray, length: int, lanes: int, steps: int | None, seed: int) -> np.ndarray:
    """Return the windows of the lanes, (steps, lanes, 3) int64: first token, predicted tokens, whether it
    starts.
    """
    costs = -(-pieces[:, 1] // length)
    dealt: list[list[int]] = [[] for _ in range(lanes)]
    heap = [(0, lane) for lane in range(lanes)]  # (windows so far, lane): the least loaded lane is on top
    epoch = 0
    while epoch == 0 or (steps is not None and heap[0][0] < steps):
        random = np.random.default_rng([seed, epoch])
        shuffled = random.permutation(len(pieces))
        longest_first = shuffled[np.argsort(-costs[shuffled], kind="stable")]
        hands: list[list[int]] = [[] for _ in range(lanes)]
        for piece in longest_first.tolist():
            load, lane = heap[0]
            hands[lane].append(piece)
            heapq.heapreplace(heap, (load + int(costs[piece]), lane))
        for lane, hand in enumerate(hands):
            dealt[lane] += random.permutation(np.array(hand, dtype=np.int64)).tolist()
        epoch += 1

    wanted = max(load for load, _ in heap) if steps is None else steps
    windows = np.zeros((wanted, lanes, 3), dtype=np.int64)
    windows[:, :, 2] = 1  # a waiting lane starts from zero: a state after padding must not be carried
    for lane, hand in enumerate(dealt):
        read = _windows(pieces[hand], length)[:wanted]
        windows[: len(read), lane] = read
    return windows


def _windows(pieces: np.ndarray, length: int) -> np.ndarray:
    """Return the windows of pieces one after another, (windows, 3) int64."""
    counts = -(-pieces[:, 1] // length)
    number = np.arange(counts.sum()) - np.repeat(
        np.cumsum(counts) - counts, counts
    )  # of a window in its piece
    first, size = np.repeat(pieces, counts, axis=0).T
    done = number * length
    return np.stack([first + done, np.minimum(length, size - done), number == 0], axis=1)
