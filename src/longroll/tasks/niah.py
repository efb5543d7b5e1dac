"""RULER's needles: niah_single_1, a number for a name, stated once between lines of noise, and its variants.

`multikey` states the numbers of three other names too (niah_multikey_1). `multivalue` states four numbers of
one name, and all are asked for (niah_multivalue). RULER's haystack of these variants is essays; here it is
noise.

Construction: NVIDIA/RULER, scripts/data/synthetic/niah.py and constants.py (haystack "repeat", one needle,
one query, words as keys, seven digits as values), scripts/eval/synthetic/constants.py (`string_match_all`).
The words are longroll's own, or RULER's as lm-eval ships them. Two things differ: the haystack grows line by
line to the longest that fits (there in steps of 5 or 25 lines), and keys come from a short list in this file
(there from the package wonderwords); only one key stands in a prompt, so it makes no difference which.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from longroll.data import Tokenizer
from longroll.errors import LongrollError
from longroll.tasks._task import Sample, Task
from longroll.tasks.haystack import NOISE
from longroll.tasks.official import Wording, check_prompts, niah_wording

OWN = Wording(
    instruction="The lines below hide a number that belongs to a name. Keep it in mind for the question.\n",
    needle="The number that belongs to {key} is {value}.\n",
    question="Which number belongs to {key}?",
    cue="The number that belongs to {key} is",
    noise=NOISE,
)
SEVERAL = "Which numbers belong to {key}?"
SEVERAL_CUE = "The numbers that belong to {key} are"
NEW_TOKENS = 128

_ADJECTIVES = (
    "brave calm eager fancy gentle happy jolly kind lively nice proud silly tall witty young zealous"
)
_NOUNS = "apple bridge candle desert engine forest garden harbor island jacket kitten ladder mirror needle"


NEEDLES = ("single", "multikey", "multivalue")
MANY = 4
"""Needles of `multikey` and `multivalue`, as in RULER."""


class Niah(Task):
    """RULER's niah_single_1, niah_multikey_1 and niah_multivalue.

    Args:
        tokenizer: the tokenizer of the model.
        needles: `single`, `multikey` or `multivalue`; needles after the first stand anywhere.
        new_tokens: what the model may write; it counts towards the length, as in RULER.
        prompts: "own" words, or the "official" ones that lm-eval ships.
        chat_template: see `Task`; the model's message begins with the cue, as in RULER.

    Raises:
        LongrollError: for other `needles` or `prompts`, official ones without lm-eval, official ones for
            several needles, and a tokenizer that cannot write digits.
    """

    name = "niah"
    stationary = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        needles: str = "single",
        new_tokens: int = NEW_TOKENS,
        prompts: str = "own",
        chat_template: bool = False,
    ) -> None:
        super().__init__(tokenizer, new_tokens=new_tokens, chat_template=chat_template)
        self._check_written("1234567890")
        if needles not in NEEDLES:
            raise LongrollError(f"`needles` {needles} is not one of {', '.join(NEEDLES)}.")
        if needles != "single" and prompts == "official":
            raise LongrollError(f"`prompts` official has no words for `needles` {needles}: take own.")
        self.needles = needles
        self.prompts, self.reserved = check_prompts(prompts), new_tokens
        self.words = niah_wording() if prompts == "official" else OWN
        self.head, self.line = self.begin(self.words.instruction), self.encode(f"{self.words.noise}\n")

    def sample(self, length: int, *, depth: float | None = None, rng: np.random.Generator) -> Sample:
        """Hide a number between lines; `length` counts the prompt and `new_tokens`, and is met from below."""
        if self.needles != "single":
            return self._several(length, depth, rng)
        key = f"{rng.choice(_ADJECTIVES.split())}-{rng.choice(_NOUNS.split())}"
        value = str(rng.integers(1_000_000, 10_000_000))
        needle = self.encode(self.words.needle.format(key=key, value=value))
        answer = self.encode(f" {value}")
        question = self.ask(self.words.question.format(key=key), self.words.cue.format(key=key))
        fixed = len(self.head) + len(needle) + len(question) + self.reserved
        lines = self._room(length, fixed + len(self.line)) // len(self.line) + 1
        # as in the source, never after the last line, unless a depth asks for it
        before = int(rng.integers(lines)) if depth is None else round(depth * lines)
        pieces = [self.head, *[self.line] * before, needle, *[self.line] * (lines - before), question]
        prompt = np.concatenate(pieces)
        context = (len(self.head), len(prompt) - len(question))
        return Sample(prompt, answer, value, context, prefix=self.prefix)

    def _several(self, length: int, depth: float | None, rng: np.random.Generator) -> Sample:
        words = [f"{a}-{n}" for a in _ADJECTIVES.split() for n in _NOUNS.split()]
        asked, *others = map(str, rng.choice(words, size=MANY, replace=False))
        values = [str(value) for value in rng.choice(np.arange(1_000_000, 10_000_000), MANY, replace=False)]
        keys = [asked, *others] if self.needles == "multikey" else [asked] * MANY
        needles = [
            self.encode(self.words.needle.format(key=key, value=value))
            for key, value in zip(keys, values, strict=True)
        ]
        wanted = values if self.needles == "multivalue" else values[:1]
        text, cue = (SEVERAL, SEVERAL_CUE) if len(wanted) > 1 else (self.words.question, self.words.cue)
        question = self.ask(text.format(key=asked), cue.format(key=asked))
        fixed = len(self.head) + sum(map(len, needles)) + len(question) + self.reserved
        lines = self._room(length, fixed) // len(self.line)
        first = int(rng.integers(lines + 1)) if depth is None else round(depth * lines)
        places = np.array([first, *rng.integers(lines + 1, size=MANY - 1)])
        pieces, stood = [self.head], 0
        for i in places.argsort(kind="stable"):
            pieces += [np.resize(self.line, (places[i] - stood) * len(self.line)), needles[i]]
            stood = places[i]
        pieces += [np.resize(self.line, (lines - stood) * len(self.line)), question]
        prompt = np.concatenate(pieces)
        context = (len(self.head), len(prompt) - len(question))
        answer = self.encode(f" {', '.join(wanted)}")
        return Sample(prompt, answer, " ".join(wanted), context, prefix=self.prefix)

    def score(
        self, sample: Sample, written: np.ndarray, forced: np.ndarray | None = None
    ) -> dict[str, float]:
        """Share of the numbers asked for that are anywhere in what was written."""
        text, wanted = self.tokenizer.decode(written), sample.target.split()
        return {"accuracy": sum(value in text for value in wanted) / len(wanted)}

    def settings(self) -> dict[str, Any]:
        """With whose words the prompts are in, and the needles where there are several."""
        several = {} if self.needles == "single" else {"needles": self.needles}
        return super().settings() | {"prompts": self.prompts} | several
