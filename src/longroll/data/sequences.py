"""Long sequences to measure on."""

import logging

import numpy as np
import torch

from ..errors import LongrollError
from .corpus import Corpus

logger = logging.getLogger("longroll")


def long_sequences(
    corpus: Corpus, length: int, count: int, *, concatenate: bool = False, seed: int = 0
) -> torch.Tensor:
    """Take sequences of whole long documents, drawn by `seed`.

    Each is the beginning of a document of at least `length` + 1 tokens. If there are not `count` such
    documents, further disjoint pieces of the very long ones follow, in rounds: second pieces, third pieces.

    Args:
        corpus: of the text.
        length: predicted tokens of a sequence.
        count: sequences asked for. If fewer can be had, but at least 2, those are given, with a warning.
        concatenate: join all documents in a shuffled order, the separator between, and cut that instead:
            any length can be had, of text that does not hang together throughout.
        seed: of the order.

    Returns:
        (count, length + 1) int64.

    Raises:
        LongrollError: there is not enough text.
    """
    if length < 1 or count < 1:
        raise LongrollError(f"`length` {length}, `count` {count}: both are at least 1")
    order = np.random.default_rng(seed).permutation(corpus.documents)
    size = length + 1
    if concatenate:
        joined = corpus.joined(order)
        found = [joined[at : at + size] for at in range(0, len(joined) - length, size)][:count]
    else:
        found = _pieces(corpus, order, size, count)

    if len(found) < min(count, 2):
        raise LongrollError(f"{_shortage(corpus, length, count)}; {_mends(concatenate)}")
    if len(found) < count:
        logger.warning("%s; going on with %d sequences", _shortage(corpus, length, count), len(found))
    return torch.from_numpy(np.stack(found).astype(np.int64))


def _pieces(corpus: Corpus, order: np.ndarray, size: int, count: int) -> list[np.ndarray]:
    """At most `count` disjoint pieces of `size` tokens: the first of each document, then the second, ..."""
    pieces: list[np.ndarray] = []
    available = corpus.lengths[order] // size
    for number in range(int(available.max())):
        for index in order[available > number]:
            if len(pieces) == count:
                return pieces
            pieces.append(corpus.document(int(index))[number * size : (number + 1) * size])
    return pieces


def _shortage(corpus: Corpus, length: int, count: int) -> str:
    """The numbers of a text that is too short."""
    enough = int((corpus.lengths > length).sum())
    return (
        f"not enough text: asked for {count} sequences of {length} tokens, which take one token more each; "
        f"{enough} of {corpus.documents} documents are as long, "
        f"the longest has {len(corpus.longest())} tokens, all together {corpus.tokens}"
    )


def _mends(concatenate: bool) -> str:
    """What the user can do about it."""
    join = "" if concatenate else "join documents by `concatenate`, "
    return f"ask for a smaller `length` or `count`, {join}or give more text"
