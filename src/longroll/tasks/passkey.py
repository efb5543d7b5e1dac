"""Passkey retrieval: a five-digit number stated once, anywhere in a long text, and asked for at its end.

Construction: epfml/landmark-attention, llama/run_test.py (Mohtashami & Jaggi 2023): description, noise,
needle, noise, question, a line each; the words are longroll's own. As in later work (and the paper, section
4) the key always has five digits, and the answer is right if what is written greedily is the key.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from longroll.data import Tokenizer
from longroll.tasks._task import Sample, Task
from longroll.tasks.haystack import Haystack, NoiseHaystack

INSTRUCTION = (
    "Somewhere in the text below a secret number is told; nothing else in it matters. Keep the number in "
    "mind: the last line asks for it.\n"
)
NEEDLE = "\nThe secret number is {key}. Write it down: {key} is the secret number.\n"
QUESTION = "\nWhich secret number was told?"
CUE = "The secret number is"


class Passkey(Task):
    """The passkey task.

    Args:
        tokenizer: the tokenizer of the model.
        haystack: what the key is hidden in; default: the noise of the source.
        instruction: begin with a description of the task.
        chat_template: see `Task`; the model's message begins with `CUE`.

    Raises:
        LongrollError: as `Task`, and for a tokenizer that cannot write digits.
    """

    name = "passkey"
    stationary = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        haystack: Haystack | None = None,
        instruction: bool = True,
        chat_template: bool = False,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self._check_written("1234567890")
        self.haystack = haystack or NoiseHaystack(tokenizer)
        self.instruction = instruction
        self.head = self.begin(INSTRUCTION if instruction else "")
        self.question = self.ask(QUESTION, CUE)

    def sample(self, length: int, *, depth: float | None = None, rng: np.random.Generator) -> Sample:
        """Hide a random key; `length` counts prompt and answer."""
        key = str(rng.integers(10_000, 100_000))
        depth = rng.random() if depth is None else depth
        needle, answer = self.encode(NEEDLE.format(key=key)), self.encode(f" {key}")
        fixed = [self.head, needle, self.question, answer]
        room = self._room(length, sum(map(len, fixed)))
        before, after = self.haystack.around(round(depth * room), room - round(depth * room), rng)
        prompt = np.concatenate([self.head, before, needle, after, self.question])
        context = (len(self.head), len(prompt) - len(self.question))
        return Sample(prompt, answer, key, context, prefix=self.prefix)

    def score(
        self, sample: Sample, written: np.ndarray, forced: np.ndarray | None = None
    ) -> dict[str, float]:
        """1 if what was written begins with the key and no further digit, whatever its tokens are.

        Where the right answer has a space before the key, so must this one.
        """
        read = self.tokenizer.decode_inside
        text, expected = read(written[: len(sample.answer)]), read(sample.answer)
        number = text.lstrip()
        spaced = text[:1].isspace() or not expected[:1].isspace()
        right = number.startswith(sample.target) and not number[len(sample.target) :][:1].isdigit()
        return {"accuracy": float(spaced and right)}

    def settings(self) -> dict[str, Any]:
        """With the haystack and whether the task is described."""
        own = {"prompts": "own", "haystack": self.haystack.name, "instruction": self.instruction}
        return super().settings() | own
