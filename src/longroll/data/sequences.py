"""Long sequences to measure on."""

import logging

import numpy as np
import torch

from ..errors import LongrollError
from ._tokenizers import Tokenizer
from .corpus import Corpus

logger = logging.getLogger("longroll")


def long_sequences(
    corpus: Corpus, length: int, count: int, *, concatenate: bool = False, seed: int = 0
) -> torch.Tensor:
    """Take sequences of whole long documents, drawn by `seed`.

    Each is the beginning of a document of at least `length` + 1 tokens. If there are not `count` such
    documents, further disjoint pieces of the very long ones follow, in rounds: second pieces, third pieces.
    Every sequence begins with the prefix of a document (BOS), wherever in its document it is from.

    Args:
        corpus: tokenised text.
        length: predicted tokens of a sequence.
        count: sequences asked for. If fewer can be had, but at least 2, those are given, with a warning.
        concatenate: join all documents in a shuffled order, the separator between, and cut that instead:
            any length can be had, of text that does not hang together throughout.
        seed: random seed of the order.

    Returns:
        (count, length + 1) int64.

    Raises:
        LongrollError: there is not enough text.
    """
    if length < 1 or count < 1:
        raise LongrollError(f"`length` {length}, `count` {count}: both are at least 1")
    order = np.random.default_rng(seed).permutation(corpus.documents)
    size = length + 1
    if size <= len(corpus.prefix_ids):
        raise LongrollError(
            f"`length` {length}: a document begins with {len(corpus.prefix_ids)} tokens of its own"
        )
    if size > corpus.tokens + corpus.documents:  # with separators; more than numpy counts, perhaps
        found: list[np.ndarray] = []
    elif concatenate:
        found = _cut(corpus, corpus.joined(order), size, count)
    else:
        found = _pieces(corpus, order, size, count)

    if len(found) < min(count, 2):
        raise LongrollError(f"{_shortage(corpus, length, count)}; {_mends(concatenate)}")
    if len(found) < count:
        logger.warning("%s; going on with %d sequences", _shortage(corpus, length, count), len(found))
    return torch.from_numpy(np.stack(found).astype(np.int64))


def bytes_per_token(tokens: torch.Tensor, tokenizer: Tokenizer) -> float:
    """Return the UTF-8 bytes that a predicted token of these texts stands for, on average.

    Nats per token / this / ln 2 = bits per byte.

    Args:
        tokens: (B, T + 1); the first of each is not predicted.
        tokenizer: that made them.

    Raises:
        LongrollError: the tokens stand for no text at all.
    """
    predicted = tokens[:, 1:].numpy()
    size = sum(map(tokenizer.count_bytes, predicted))
    if not size:
        raise LongrollError(f"the tokens of these texts stand for no text by tokenizer {tokenizer.name}")
    return size / predicted.size


def _cut(corpus: Corpus, joined: np.ndarray, size: int, count: int) -> list[np.ndarray]:
    """Return at most `count` pieces of `size` tokens of joined documents, one after another."""
    prefix = np.array(corpus.prefix_ids, dtype=np.int32)
    pieces: list[np.ndarray] = []
    at = 0
    while len(pieces) < count:
        lead = prefix[:0] if np.array_equal(joined[at : at + len(prefix)], prefix) else prefix
        stop = at + size - len(lead)
        if stop > len(joined):
            break
        pieces.append(np.concatenate([lead, joined[at:stop]]))
        at = stop
    return pieces


def _pieces(corpus: Corpus, order: np.ndarray, size: int, count: int) -> list[np.ndarray]:
    """Return at most `count` disjoint pieces of `size` tokens: the first of each document, then the second,
    ...
    """
    prefix = np.array(corpus.prefix_ids, dtype=np.int32)
    step = size - len(prefix)
    pieces: list[np.ndarray] = []
    available = (corpus.lengths[order] - len(prefix)) // step
    for number in range(int(available.max())):
        for index in order[available > number]:
            if len(pieces) == count:
                return pieces
            text = corpus.document(int(index))[len(prefix) :]
            pieces.append(np.concatenate([prefix, text[number * step : (number + 1) * step]]))
    return pieces


def _shortage(corpus: Corpus, length: int, count: int) -> str:
    """Return the numbers of a text that is too short."""
    enough = int((corpus.lengths > length).sum())
    return (
        f"not enough text: asked for {count} sequences of {length} tokens, which take one token more each; "
        f"{enough} of {corpus.documents} documents are as long, "
        f"the longest has {len(corpus.longest())} tokens, all together {corpus.tokens}"
    )


def _mends(concatenate: bool) -> str:
    """Return what the user can do about it."""
    join = "" if concatenate else "join documents by `concatenate`, "
    return f"ask for a smaller `length` or `count`, {join}or give more text"
