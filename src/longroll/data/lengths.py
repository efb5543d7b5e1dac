"""How long the documents of a text are, from as many whole documents as it takes to tell."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import LongrollError
from ._tokenizers import Tokenizer
from .corpus import Corpus, Progress, encode

ENCODED = 2**16
"""Tokens of a document that are encoded at least; of one that is far longer, the length is a proportion."""


@dataclass(frozen=True)
class DocumentLengths:
    """Tokens of whole documents, whatever a run reads of them."""

    tokens: np.ndarray
    """(documents,) int64; a very long document counts by its characters."""
    whole: bool
    """Whether the text has no other documents."""

    @classmethod
    def count(
        cls, texts: Iterable[str], tokenizer: Tokenizer, enough: int, *, progress: Progress | None = None
    ) -> "DocumentLengths":
        """Count documents one after another, until they hold `enough` tokens.

        Args:
            texts: the documents.
            tokenizer: its prefix (BOS) counts.
            enough: tokens; the last document is counted whole.
            progress: called after each document with the tokens so far, and `enough`.

        Raises:
            LongrollError: no text has a token.
        """
        found: list[int] = []
        total, whole = 0, True
        for text in texts:
            if total >= enough:
                whole = False
                break
            ids, _, size = encode(text, tokenizer, ENCODED)
            if len(ids):
                found.append(len(tokenizer.prefix_ids) + size)
                total += found[-1]
            if progress is not None:
                progress(total, enough)
        if not found:
            raise LongrollError("the text has no tokens: name another source")
        return cls(np.array(found, dtype=np.int64), whole)

    @classmethod
    def of(cls, corpus: Corpus, read: int) -> "DocumentLengths":
        """Return the lengths of a corpus that a run is to read.

        Args:
            corpus: one that `max_tokens` have cut stands for a longer text, unless the run reads it again.
            read: tokens that the run reads.
        """
        lengths, rest = corpus.lengths, corpus.rest
        if rest is None or corpus.tokens < read:
            return cls(lengths, whole=True)
        lengths[-1] += rest
        return cls(lengths, whole=False)
