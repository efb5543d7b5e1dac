"""Tokenised documents in one flat array."""

from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import LongrollError
from ._tokenizers import Tokenizer
from .documents import STDLIB, read_documents

Progress = Callable[[int, int | None], None]
"""Called after each document with the tokens so far and the tokens asked for (None: all there are)."""

CHARACTERS_A_TOKEN = 16  # far more than any tokenizer makes of ordinary text


@dataclass(frozen=True)
class Corpus:
    """Documents as token ids: document i is `ids[offsets[i]:offsets[i + 1]]`, never empty."""

    ids: np.ndarray
    """(tokens,) int32."""
    offsets: np.ndarray
    """(documents + 1,) int64."""
    bytes: int
    """UTF-8 bytes of the text of all tokens."""
    separator_id: int | None = None
    """The token between documents where they are joined; None: nothing stands between them."""
    tokenizer: str = ""
    """The tokenizer's name."""
    prefix_ids: tuple[int, ...] = ()
    """What every document begins with (BOS), as the tokenizer has it."""
    rest: int | None = None
    """Tokens of the last document that `max_tokens` left out, by its characters if it is huge; None: the
    whole text was read."""

    @classmethod
    def from_source(
        cls,
        source: str | Path = STDLIB,
        tokenizer: Tokenizer | None = None,
        *,
        split: str = "train",
        max_tokens: int | None = None,
        seed: int = 0,
        text_column: str | None = None,
        progress: Progress | bool | None = None,
    ) -> "Corpus":
        """Read and tokenise only as much of `source` as asked; see `read_documents` for sources and splits.

        Args:
            source: the source of the text.
            tokenizer: None: bytes.
            split: "train", "validation" or "all", or a hub dataset's own.
            max_tokens: stop when exactly this many are there, in the midst of a document; None: read all.
            seed: random seed of the order in which files are read, so that a limit takes a fair sample of
                them.
            text_column: the column of text of rows.
            progress: a function, or True for a bar on the terminal.

        Raises:
            LongrollError: as `read_documents`.
        """
        texts = read_documents(source, split=split, text_column=text_column, seed=seed)
        return cls.from_texts(texts, tokenizer, max_tokens=max_tokens, progress=progress)

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        tokenizer: Tokenizer | None = None,
        *,
        max_tokens: int | None = None,
        progress: Progress | bool | None = None,
    ) -> "Corpus":
        """Tokenise documents until `max_tokens` are there; the last one is cut to give exactly as many.

        Every document begins with the tokenizer's prefix (BOS).

        Raises:
            LongrollError: no text has a token, or `max_tokens` is not positive.
        """
        if tokenizer is None:
            from ._tokenizers import ByteTokenizer

            tokenizer = ByteTokenizer()
        if max_tokens is not None and max_tokens < 1:
            raise LongrollError(f"`max_tokens` {max_tokens}: ask for at least one token")
        ids, offsets, size = array("i"), array("q", [0]), 0  # grow in place: one copy of the tokens in memory
        rest: int | None = None
        prefix = np.array(tokenizer.prefix_ids, dtype=np.int32)
        with _reporting(progress, max_tokens) as report:
            for text in texts:
                left = None if max_tokens is None else max_tokens - len(ids)
                found, found_bytes, whole = encode(text, tokenizer, left and max(1, left - len(prefix)))
                if len(found):
                    ids.frombytes(np.concatenate([prefix, found])[:left].tobytes())
                    offsets.append(len(ids))
                    size += found_bytes
                report(len(ids), max_tokens)
                if len(ids) == max_tokens:
                    rest = len(prefix) + whole - int(offsets[-1] - offsets[-2])
                    break
        if not ids:
            raise LongrollError("the text has no tokens: name another source")
        return cls(
            np.frombuffer(ids, dtype=np.int32),
            np.frombuffer(offsets, dtype=np.int64),
            size,
            tokenizer.separator_id,
            tokenizer.name,
            tokenizer.prefix_ids,
            rest,
        )

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """How many tokens they have together."""
        return len(self.ids)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes a token stands for, on average: nats per token / this / ln 2 = bits per byte."""
        return self.bytes / self.tokens

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, (documents,) int64."""
        return np.diff(self.offsets)

    @property
    def max_id(self) -> int:
        """The largest token id, for `check_vocabulary`."""
        return int(self.ids.max())

    def document(self, index: int) -> np.ndarray:
        """Return the ids of one document, (T,) int32, a view; negative indices count from the end."""
        index = range(self.documents)[index]
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def longest(self) -> np.ndarray:
        """Return the ids of the longest document, (T,) int32, a view."""
        return self.document(int(self.lengths.argmax()))

    def joined(self, order: np.ndarray | None = None, *, prefix: bool = True) -> np.ndarray:
        """Return all documents one after another with the separator between them, (N,) int32.

        Args:
            order: the order of the documents, (documents,); None: as they are.
            prefix: each with the prefix that it begins with.
        """
        start = 0 if prefix else len(self.prefix_ids)
        if order is None and self.separator_id is None and not start:
            return self.ids
        between = [] if self.separator_id is None else [np.array([self.separator_id], dtype=np.int32)]
        pieces: list[np.ndarray] = []
        for index in range(self.documents) if order is None else order:
            pieces += [self.document(int(index))[start:], *between]
        return np.concatenate(pieces[: len(pieces) - len(between)])


def encode(text: str, tokenizer: Tokenizer, limit: int | None) -> tuple[np.ndarray, int, int]:
    """Return at most `limit` tokens of `text`, the bytes they stand for, and how many tokens `text` has."""
    characters = len(text)
    if limit is not None and len(text) > CHARACTERS_A_TOKEN * limit:
        # a huge document is not tokenised whole for its beginning
        head = text[: CHARACTERS_A_TOKEN * limit]
        ids = tokenizer.encode(head)
        if len(ids) <= limit:
            head, ids = text, tokenizer.encode(text)
        text = head
    else:
        ids = tokenizer.encode(text)
    ids = np.asarray(ids, dtype=np.int32)
    whole = round(len(ids) * characters / max(1, len(text)))
    size = len(text.encode("utf-8", errors="replace"))
    if limit is not None and len(ids) > limit:
        size = round(size * limit / len(ids))  # exact for bytes, a fair share for other tokens
        ids = ids[:limit]
    return ids, size, whole


@contextmanager
def _reporting(progress: Progress | bool | None, max_tokens: int | None) -> Iterator[Progress]:
    """Return the function to call after each document: the one given, a rich bar, or nothing."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda tokens, asked: None
        return
    from rich.progress import Progress as Bar

    with Bar(transient=True) as bar:
        task = bar.add_task("Reading text", total=max_tokens)
        yield lambda tokens, asked: bar.update(task, completed=tokens)
