"""What a needle is hidden in: one sentence over and over, or real text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from longroll.data import Corpus, Tokenizer

NOISE = (
    "Leaves drift over the pond. A clock ticks in the hall. Bread cools by the window. The road bends left. "
    "Then all is quiet."
)
"""Five short sentences about nothing that is asked for, as the passkey task and RULER repeat."""


HAYSTACK_TOKENS = 1 << 22
"""Tokens read of a text to hide needles in; a longer prompt repeats them."""


class Haystack(Protocol):
    """Gives text of any length to hide a needle in."""

    name: str

    def around(self, before: int, after: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Exactly `before` tokens to stand before the needle and `after` tokens to stand after it."""


class NoiseHaystack:
    """`NOISE` repeated, starting again after the needle, cut wherever the length asks for it."""

    name = "noise"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.first, self.rest = tokenizer.encode_inside(NOISE), tokenizer.encode_inside(f" {NOISE}")

    def around(self, before: int, after: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return repetitions for both sides; nothing is drawn."""
        return self._repeat(before), self._repeat(after)

    def _repeat(self, tokens: int) -> np.ndarray:
        left = max(0, tokens - len(self.first))
        return np.concatenate([self.first[:tokens], np.resize(self.rest, left)])


class TextHaystack:
    """Running text from a random place of a corpus; it begins again where the corpus ends."""

    def __init__(self, corpus: Corpus, name: str) -> None:
        self.ids = corpus.joined(prefix=False)
        self.name = name

    def around(self, before: int, after: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return one run of text, divided."""
        start = int(rng.integers(len(self.ids)))
        places = np.arange(start, start + before + after) % len(self.ids)
        text = self.ids[places]
        return text[:before], text[before:]


def open_haystack(
    source: str,
    tokenizer: Tokenizer,
    *,
    split: str,
    seed: int = 0,
    progress: Callable[[int, int | None], None] | None = None,
) -> Haystack:
    """Return noise, or the text of a source: the same for prompts of any length, so that a grid can grow.

    Args:
        source: "noise", or what `longroll.data.read_documents` reads.
        tokenizer: the tokenizer of the model.
        split: "train" or "validation".
        seed: random seed of the order of the documents.
        progress: called with the number of tokens read and the number to read.

    Raises:
        LongrollError: for a source without text.
    """
    if source == "noise":
        return NoiseHaystack(tokenizer)
    corpus = Corpus.from_source(
        source, tokenizer, split=split, max_tokens=HAYSTACK_TOKENS, seed=seed, progress=progress
    )
    return TextHaystack(corpus, source)
