"""RULER's variable tracking: which variables hold a value that is passed from one to the next.

Construction: NVIDIA/RULER, scripts/data/synthetic/variable_tracking.py (Hsieh et al. 2024, arXiv 2404.06654):
one chain of 4 hops, names of 5 letters, a value of 5 digits, assignments in order at random places between
lines of noise, 30 new tokens, `string_match_all`: the share of the names that is written. The words are
longroll's own.
"""

from __future__ import annotations

import string
from itertools import pairwise
from typing import Any

import numpy as np

from longroll.data import Tokenizer
from longroll.errors import LongrollError
from longroll.tasks._task import Sample, Task
from longroll.tasks.haystack import NOISE

INSTRUCTION = "Between the lines below variables are set. Keep in mind which of them hold which number.\n"
FIRST, NEXT = "VAR {name} = {value}\n", "VAR {name} = VAR {before}\n"
QUESTION = "Which variables hold the number {value}?"
CUE = "The variables that hold {value} are:"
NEW_TOKENS = 30
HOPS = 4


class Variables(Task):
    """Variable tracking. Depth means nothing here.

    Args:
        tokenizer: the tokenizer of the model.
        hops: times that the value is passed on.
        new_tokens: what the model may write; it counts towards the length, as in RULER.
        chat_template: see `Task`.

    Raises:
        LongrollError: for fewer than one hop, and a tokenizer that cannot write letters.
    """

    name = "variables"
    stationary = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        hops: int = HOPS,
        new_tokens: int = NEW_TOKENS,
        chat_template: bool = False,
    ) -> None:
        super().__init__(tokenizer, new_tokens=new_tokens, chat_template=chat_template)
        self._check_written(string.ascii_uppercase)
        if hops < 1:
            raise LongrollError(f"`hops` {hops}: a value is passed on at least once.")
        self.hops, self.reserved = hops, new_tokens
        self.head, self.line = self.begin(INSTRUCTION), self.encode(f"{NOISE}\n")

    def sample(self, length: int, *, depth: float | None = None, rng: np.random.Generator) -> Sample:
        """Scatter the chain over lines; `length` counts prompt and `new_tokens`, and is met from below."""
        self._room(length, self.hops + 1)  # before so many names are drawn
        value = str(rng.integers(10_000, 100_000))
        chain = ["".join(rng.choice(list(string.ascii_uppercase), size=5)) for _ in range(self.hops + 1)]
        told = [FIRST.format(name=chain[0], value=value)]
        told += [NEXT.format(name=name, before=before) for before, name in pairwise(chain)]
        needles = [self.encode(line) for line in told]
        question = self.ask(QUESTION.format(value=value), CUE.format(value=value))
        fixed = len(self.head) + sum(map(len, needles)) + len(question) + self.reserved
        lines = self._room(length, fixed) // len(self.line)
        pieces = scattered(self.line, lines, needles, rng)
        prompt = np.concatenate([self.head, *pieces, question])
        context = (len(self.head), len(prompt) - len(question))
        answer = self.encode(f" {' '.join(chain)}")
        return Sample(prompt, answer, " ".join(chain), context, prefix=self.prefix)

    def score(
        self, sample: Sample, written: np.ndarray, forced: np.ndarray | None = None
    ) -> dict[str, float]:
        """Share of the names that are anywhere in what was written, in either case, as in the source."""
        text, names = self.tokenizer.decode(written).upper(), sample.target.split()
        return {"accuracy": sum(name in text for name in names) / len(names)}

    def settings(self) -> dict[str, Any]:
        """With whose words the prompts are in."""
        return super().settings() | {"prompts": "own", "hops": self.hops}


def scattered(
    line: np.ndarray, lines: int, needles: list[np.ndarray], rng: np.random.Generator
) -> list[np.ndarray]:
    """Return lines of noise with needles between them, in order, at places drawn uniformly."""
    places = np.sort(rng.integers(lines + 1, size=len(needles)))
    counts = np.diff(np.concatenate([[0], places, [lines]]))
    pieces = [np.resize(line, counts[0] * len(line))]
    for needle, count in zip(needles, counts[1:], strict=True):
        pieces += [needle, np.resize(line, count * len(line))]
    return pieces
