"""Read held-out text for a short while: whether a model breaks, and what it reads in range and far out."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor

from longroll import ranks
from longroll.data import Corpus, long_sequences
from longroll.errors import LongrollError
from longroll.measure._position_loss import position_loss
from longroll.measure.advice import ENOUGH
from longroll.measure.excess_loss import excess_loss
from longroll.measure.judge import judge
from longroll.model import RecurrentLM
from longroll.results import fingerprint_of_arrays

TEXTS, FEWEST = 8, 4
"""Long texts that are read, and the fewest that are enough for an interval."""
BEGINNINGS = 64
"""Windows of the training length that the loss in range is a mean over, at most."""
LENGTHS = (64, 32, ENOUGH)
"""Training lengths of a long text, the longest that the text has first."""


@dataclass(frozen=True)
class Reading:
    """What held-out data say of a model; losses in nats a token."""

    in_range: float
    """Mean over [0, T) from the zero state."""
    far: float
    """Mean over the farthest data."""
    holds: bool
    """Whether the far loss is level: no damage is above its interval."""
    sentence: str
    """The verdict in words."""
    read: str
    """Description of the text that was read."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain data for results."""
        return asdict(self)


class HeldOutData(Protocol):
    """Data that training does not read, to tell whether a model holds."""

    @property
    def fingerprint(self) -> str:
        """Identifies the data."""

    def read(self, lm: RecurrentLM) -> Reading:
        """Measure a model in evaluation mode. Every rank calls this and gets the same reading."""


@dataclass(frozen=True)
class HeldOut:
    """Long texts, and beginnings of texts, of a corpus that training does not read.

    Raises:
        LongrollError: for texts of fewer than 16 training lengths, which do not tell whether a model holds.
    """

    texts: Tensor
    """(B, L + 1)."""
    beginnings: Tensor
    """(N, T + 1)."""
    joined: bool
    """Whether a text is of several documents."""
    seed: int = 0
    """Random seed of the bootstrap."""
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        length, least = self.texts.shape[1] - 1, min(LENGTHS) * (self.beginnings.shape[1] - 1)
        if length < least:
            raise LongrollError(
                f"`texts` of {length} tokens do not tell whether a model holds: give texts of {least} or "
                "more."
            )
        found = fingerprint_of_arrays([self.texts.numpy(), self.beginnings.numpy()])
        object.__setattr__(self, "fingerprint", found)

    @classmethod
    def from_corpus(cls, corpus: Corpus, train_length: int, *, seed: int = 0) -> HeldOut | None:
        """Take the longest texts that a corpus gives: of whole documents, else of joined ones.

        Args:
            corpus: the corpus of the validation side of a text.
            train_length: T.
            seed: random seed of the draw.

        Returns:
            None where the corpus has no 4 texts of 16 training lengths, which is too little to tell whether a
            model holds.
        """
        for joined, times in product((False, True), LENGTHS):
            count = _available(corpus, times * train_length, joined)
            if count >= FEWEST:
                break
        else:
            return None
        count, beginnings = min(TEXTS, count), min(BEGINNINGS, _available(corpus, train_length, joined))
        return cls(
            long_sequences(corpus, times * train_length, count, concatenate=joined, seed=seed),
            long_sequences(corpus, train_length, beginnings, concatenate=joined, seed=seed),
            joined,
            seed,
        )

    @property
    def tokens(self) -> int:
        """Tokens that one reading takes, about: each long text is read once, and a part of it afresh."""
        return self.texts.numel() + self.beginnings.numel()

    @torch.no_grad()
    def read(self, lm: RecurrentLM) -> Reading:
        """Measure a model in evaluation mode; texts are dealt to the ranks, each of which must call this.

        Args:
            lm: the model.
        """
        began = time.perf_counter()
        train_length, length = self.beginnings.shape[1] - 1, self.texts.shape[1] - 1
        near = position_loss(lm, self.beginnings, dealt=True)
        carried = position_loss(lm, self.texts, dealt=True)
        ends, excess = excess_loss(lm, self.texts, carried, train_length, dealt=True)
        judged = judge(carried, ends, excess, train_length, seed=self.seed)
        kind = "texts of joined documents" if self.joined else "texts"
        reading = Reading(
            near.between(0, train_length),
            carried.between(length // 2, length),
            not judged.suffers,
            judged.sentence(),
            f"{len(self.texts)} held-out {kind} of {length:,} tokens",
            time.perf_counter() - began,
        )
        return ranks.on_first(lambda: reading)


def _available(corpus: Corpus, length: int, joined: bool) -> int:
    """Return sequences of `length` + 1 tokens that `long_sequences` gives, at least."""
    if joined:
        return int(corpus.tokens // (length + 1))
    prefix = len(corpus.prefix_ids)
    step = length + 1 - prefix
    return int(((corpus.lengths - prefix).clip(0) // step).sum()) if step > 0 else 0
