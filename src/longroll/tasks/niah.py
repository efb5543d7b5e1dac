"""RULER's niah_single_1: a magic number for a word, told once between lines of noise.

Source: NVIDIA/RULER, scripts/data/synthetic/niah.py and constants.py (haystack "repeat", one needle, one
query, words as keys, seven digits as values), scripts/eval/synthetic/constants.py (`string_match_all`). Two
things differ: the haystack grows line by line to the longest that fits (there in steps of 5 or 25 lines),
and keys come from a short list of ours (there from the package wonderwords); only one key stands in a
prompt, so it makes no difference which.
"""

from __future__ import annotations

import numpy as np

from longroll.data import Tokenizer
from longroll.tasks._task import Sample, Task
from longroll.tasks.haystack import NOISE

INSTRUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n"
)
NEEDLE = "One of the special magic numbers for {key} is: {value}.\n"
QUESTION = (
    "What is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
NEW_TOKENS = 128

_ADJECTIVES = (
    "brave calm eager fancy gentle happy jolly kind lively nice proud silly tall witty young zealous"
)
_NOUNS = "apple bridge candle desert engine forest garden harbor island jacket kitten ladder mirror needle"


class Niah(Task):
    """RULER's niah_single_1.

    Args:
        tokenizer: of the model.
        new_tokens: what the model may write; it counts towards the length, as in RULER.
    """

    name = "niah"
    stationary = False

    def __init__(self, tokenizer: Tokenizer, *, new_tokens: int = NEW_TOKENS) -> None:
        super().__init__(tokenizer, new_tokens=new_tokens)
        self.reserved = new_tokens
        self.head, self.line = self.encode(INSTRUCTION), self.encode(f"{NOISE}\n")

    def sample(self, length: int, *, depth: float | None = None, rng: np.random.Generator) -> Sample:
        """Hide a number between lines; `length` counts the prompt and `new_tokens`, and is met from below."""
        key = f"{rng.choice(_ADJECTIVES.split())}-{rng.choice(_NOUNS.split())}"
        value = str(rng.integers(1_000_000, 10_000_000))
        needle, answer = self.encode(NEEDLE.format(key=key, value=value)), self.encode(f" {value}")
        question = self.encode(QUESTION.format(key=key))
        fixed = len(self.head) + len(needle) + len(question) + self.reserved
        lines = self._room(length, fixed + len(self.line)) // len(self.line) + 1
        # as in the source, never after the last line, unless a depth asks for it
        before = int(rng.integers(lines)) if depth is None else round(depth * lines)
        pieces = [self.head, *[self.line] * before, needle, *[self.line] * (lines - before), question]
        prompt = np.concatenate(pieces)
        return Sample(prompt, answer, value, (len(self.head), len(prompt) - len(question)))

    def score(
        self, sample: Sample, written: np.ndarray, forced: np.ndarray | None = None
    ) -> dict[str, float]:
        """1 if the number is anywhere in what was written."""
        return {"accuracy": float(sample.target in self.tokenizer.decode(written))}
