"""Text of recipes/repair.py: token ids of books, rows of them in any order, and rows that test memory."""

from __future__ import annotations

import bz2
import lzma
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from longroll.files import write_whole

SPAN = 32  # tokens of a copied span; the first 8 of its second occurrence are the cue
CUE = 8
DEVELOPMENT = 8  # training books kept aside, to choose among arms
_SEEN = 200_000  # characters of a book that the BPE is made from


@dataclass(frozen=True)
class Books:
    """Books as token ids, one after another, each begun by id 0."""

    ids: np.ndarray
    """(N,) uint16."""
    offsets: np.ndarray
    """(books + 1,) int64."""

    def book(self, index: int) -> np.ndarray:
        """Token ids of a book."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    @property
    def count(self) -> int:
        """How many books."""
        return len(self.offsets) - 1

    def cut(self, length: int) -> Books:
        """The same tokens as documents of `length` + 1 tokens; what is left of a book is left out."""
        stops = [
            np.arange(a, b - length, length + 1) for a, b in zip(self.offsets, self.offsets[1:], strict=False)
        ]
        starts = np.concatenate(stops)
        ids = self.ids[starts[:, None] + np.arange(length + 1)].ravel()
        return Books(ids, np.arange(len(starts) + 1) * (length + 1))

    def save(self, path: Path) -> None:
        """Write the ids and offsets, compressed by LZMA: 1.2 bytes a token."""
        head = np.array([self.count, *self.offsets], dtype=np.int64).tobytes()
        packed = self.ids.astype("<u2").view(np.uint8).reshape(-1, 2).T.tobytes()  # low bytes, high bytes
        write_whole(path, lzma.compress(head + packed, preset=6))

    @classmethod
    def load(cls, path: Path) -> Books:
        """Read what `save` wrote."""
        data = np.frombuffer(lzma.decompress(path.read_bytes()), dtype=np.uint8)
        count = int(data[:8].view(np.int64)[0])
        offsets = data[8 : 8 * (count + 2)].view(np.int64).copy()
        packed = data[8 * (count + 2) :].reshape(2, -1)
        return cls(np.ascontiguousarray(packed.T).view("<u2").ravel().astype(np.uint16), offsets)


def prepare(text: Path, output: Path, *, vocabulary: int, seed: int = 0) -> None:
    """Tokenise books-extra.txt.bz2, books-train.tar.xz and books-valid.tar.xz of the folder `text`.

    Writes tokenizer.json, {extra,train,development,valid}.xz and cloze.npy, whose rows (1024, 257) end in the
    first and only token of a word that the 256 tokens before hold already (as LAMBADA's do).
    """
    output.mkdir(parents=True, exist_ok=True)
    raw = bz2.decompress((text / "books-extra.txt.bz2").read_bytes()).decode(errors="ignore")
    extra = [book for book in raw.split("\0") if len(book) > 1000]
    train, valid = (_members(text / f"books-{split}.tar.xz") for split in ("train", "valid"))
    order = np.random.default_rng(seed).permutation(len(train))
    sides = {
        "extra": [extra[i] for i in np.random.default_rng(seed).permutation(len(extra))],
        "train": [train[i] for i in order[DEVELOPMENT:]],
        "development": [train[i] for i in order[:DEVELOPMENT]],
        "valid": valid,
    }
    path = output / "tokenizer.json"
    if not path.exists():
        _make_tokenizer([*sides["train"], *sides["extra"]], vocabulary).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    for side, books in sides.items():
        if (output / f"{side}.xz").exists():
            continue
        ids: list[np.ndarray] = []
        for start in range(0, len(books), 32):
            encoded = tokenizer.encode_batch_fast(books[start : start + 32])
            ids += [np.array([0, *one.ids], dtype=np.uint16) for one in encoded]
        made = Books(np.concatenate(ids), np.cumsum([0, *map(len, ids)]))
        made.save(output / f"{side}.xz")
        print(side, made.count, "books", len(made.ids), "tokens", flush=True)
    np.save(output / "cloze.npy", cloze_rows(tokenizer, Books.load(output / "valid.xz"), 256, 1024, seed))


def _members(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        names = sorted(m.name for m in archive.getmembers() if m.isfile() and m.name.endswith(".txt"))
        return [archive.extractfile(name).read().decode() for name in names]  # type: ignore[union-attr]


def _make_tokenizer(books: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<eot>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((book[:_SEEN] for book in books[:150]), trainer)
    return tokenizer


def cloze_rows(tokenizer: Tokenizer, books: Books, length: int, count: int, seed: int) -> np.ndarray:
    """Rows (count, length + 1) of token ids that end in a word of 5 letters or more read before."""
    words = [tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size())]
    whole = np.array([w.startswith("Ġ") and len(w) > 5 and w[1:].isalpha() for w in words])
    goes_on = np.array([w[:1].isalpha() and not w.startswith("Ġ") for w in words])
    common = np.bincount(books.ids, minlength=len(words)).argsort()[::-1][:300]
    whole[common] = False
    random, rows = np.random.default_rng(seed), []
    for index in range(books.count):
        ids = books.book(index)
        ends = np.flatnonzero(whole[ids[:-1]] & ~goes_on[ids[1:]])
        ends = random.permutation(ends[ends >= length])
        good = (end for end in ends if ids[end] in ids[end - length : end])
        share = -(-count * (index + 1) // books.count) + (-count * index // books.count)
        rows += [ids[end - length : end + 1] for _, end in zip(range(share), good, strict=False)]
    return np.stack(rows[:count])


class Feed:
    """Rows of T + 1 tokens: each reads on in its text for some windows, then goes to another place.

    Args:
        books: read as one text, the separator between; a row that reads on stops at the end of a book.
        length: T.
        stay: (B,) windows that a row reads on; 1: a new place each step, 0: to the end of the book.
        depth: (B,) windows after which a row is said to start anew (`starts`) although its text does not, 0:
            never; None: rows start anew where their text does.
        copied: share of rows that hold a span of `SPAN` tokens twice.
        seed: of all choices.
        device: where the ids are kept.
    """

    def __init__(
        self,
        books: Books,
        length: int,
        stay: np.ndarray,
        depth: np.ndarray | None = None,
        *,
        copied: float = 0.0,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.ids = torch.from_numpy(books.ids.astype(np.int32)).to(device)
        self.length, self.stay, self.depth, self.copied = length, stay, depth, copied
        self.ends = books.offsets[1:]
        self.random = np.random.default_rng(seed)
        self.at = self._places(len(stay))
        self.read = self.random.integers(np.maximum(stay, 1))  # rows need not move on together
        self.old = np.zeros(len(stay), dtype=np.int64) if depth is None else self._ages(depth)

    def _places(self, count: int) -> np.ndarray:
        return self.random.integers(len(self.ids) - self.length - 1, size=count)

    def _ages(self, depth: np.ndarray) -> np.ndarray:
        return self.random.integers(np.maximum(depth, 1))

    def next(self) -> tuple[Tensor, Tensor]:
        """Tokens (B, T + 1) int64 on the device, and `starts` (B,) bool on the CPU."""
        rows = len(self.stay)
        book_end = self.ends[np.searchsorted(self.ends, self.at, side="right").clip(max=len(self.ends) - 1)]
        moves = (self.stay > 0) & (self.read >= self.stay)
        moves |= (self.stay != 1) & (self.at + self.length + 1 > book_end)
        self.at[moves] = self._places(int(moves.sum()))
        self.read[moves] = 0
        if self.depth is None:
            starts = moves
        else:
            starts = (self.depth > 0) & (self.old >= self.depth)
            self.old = np.where(starts, 0, self.old) + 1
        index = self.at[:, None] + np.arange(self.length + 1)
        for row in np.flatnonzero(self.random.random(rows) < self.copied):
            first = self.random.integers(self.length - 2 * SPAN + 1)
            second = self.random.integers(first + SPAN, self.length - SPAN + 1)
            index[row, second : second + SPAN] = index[row, first : first + SPAN]
        self.at = self.at + self.length
        self.read += 1
        tokens = self.ids[torch.from_numpy(index).to(self.ids.device)].long()
        return tokens, torch.from_numpy(starts)


def windows(books: Books, length: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` rows (count, length + 1) evenly over the books, and the book (count,) of each."""
    rows, of = [], []
    for index in range(books.count):
        ids = books.book(index).astype(np.int64)
        share = count * (index + 1) // books.count - count * index // books.count
        starts = np.linspace(0, len(ids) - length - 1, share, dtype=np.int64)
        rows += [ids[start : start + length + 1] for start in starts]
        of += [index] * share
    return torch.from_numpy(np.stack(rows)), torch.tensor(of)


def recall_rows(books: Books, distance: int, length: int, count: int) -> tuple[Tensor, Tensor]:
    """Rows that end in a span they held `distance` tokens before, and the same with another span there.

    A row is `length` tokens of a book, in whose first half a span of another book stands, the text in between
    and the span again. Returns (count, tokens) each.
    """
    before = length // 4
    texts, _ = windows(books, before + distance - 1, count)
    spans, _ = windows(books, SPAN - 1, 2 * count)
    spans = spans.roll(count // 2, 0)  # of other books than the texts
    texts, first, other = texts.clone(), spans[:count], spans[count:]
    told, untold = texts.clone(), texts.clone()
    told[:, before : before + SPAN], untold[:, before : before + SPAN] = first, other
    return torch.cat([told, first], dim=1), torch.cat([untold, first], dim=1)
