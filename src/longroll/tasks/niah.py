"""RULER's niah_single_1: a magic number for a word, told once between lines of noise.

Construction: NVIDIA/RULER, scripts/data/synthetic/niah.py and constants.py (haystack "repeat", one needle,
one query, words as keys, seven digits as values), scripts/eval/synthetic/constants.py (`string_match_all`).
The words are longroll's own, or RULER's as lm-eval ships them. Two things differ: the haystack grows line by
line to the longest that fits (there in steps of 5 or 25 lines), and keys come from a short list of ours
(there from the package wonderwords); only one key stands in a prompt, so it makes no difference which.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from longroll.data import Tokenizer
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
        prompts: "own" words, or the "official" ones that lm-eval ships.
        chat_template: see `Task`; the model's message begins with the cue, as in RULER.

    Raises:
        LongrollError: for other `prompts`, and official ones without lm-eval.
    """

    name = "niah"
    stationary = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        new_tokens: int = NEW_TOKENS,
        prompts: str = "own",
        chat_template: bool = False,
    ) -> None:
        super().__init__(tokenizer, new_tokens=new_tokens, chat_template=chat_template)
        self.prompts, self.reserved = check_prompts(prompts), new_tokens
        self.words = niah_wording() if prompts == "official" else OWN
        self.head, self.line = self.begin(self.words.instruction), self.encode(f"{self.words.noise}\n")

    def sample(self, length: int, *, depth: float | None = None, rng: np.random.Generator) -> Sample:
        """Hide a number between lines; `length` counts the prompt and `new_tokens`, and is met from below."""
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

    def score(
        self, sample: Sample, written: np.ndarray, forced: np.ndarray | None = None
    ) -> dict[str, float]:
        """1 if the number is anywhere in what was written."""
        return {"accuracy": float(sample.target in self.tokenizer.decode(written))}

    def settings(self) -> dict[str, Any]:
        """With whose words the prompts are in."""
        return super().settings() | {"prompts": self.prompts}
