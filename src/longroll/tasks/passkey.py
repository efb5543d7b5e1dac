"""Passkey retrieval: a five-digit number told once, anywhere in a long text, and asked for at its end.

Prompt: epfml/landmark-attention, llama/run_test.py (Mohtashami & Jaggi 2023): description, noise, needle,
noise, question, a line each. As in later work (and the paper, section 4) the key always has five digits, and
the answer is right if the greedy tokens are exactly those of the key.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from longroll.data import Tokenizer
from longroll.tasks._task import Sample, Task
from longroll.tasks.haystack import Haystack, NoiseHaystack

INSTRUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


class Passkey(Task):
    """The passkey task.

    Args:
        tokenizer: of the model.
        haystack: what the key is hidden in; default: the noise of the source.
        instruction: begin with the source's description of the task.
    """

    name = "passkey"
    stationary = False

    def __init__(
        self, tokenizer: Tokenizer, *, haystack: Haystack | None = None, instruction: bool = True
    ) -> None:
        super().__init__(tokenizer)
        self.haystack = haystack or NoiseHaystack(tokenizer)
        self.head = self.encode(INSTRUCTION) if instruction else np.empty(0, dtype=np.int32)
        self.question = self.encode(QUESTION)

    def sample(self, length: int, *, depth: float | None = None, rng: np.random.Generator) -> Sample:
        """Hide a random key; `length` counts prompt and answer."""
        key = str(rng.integers(10_000, 100_000))
        depth = rng.random() if depth is None else depth
        needle, answer = self.encode(NEEDLE.format(key=key)), self.encode(f" {key}")
        fixed = [self.head, needle, self.question, answer]
        room = self._room(length, sum(map(len, fixed)))
        before, after = self.haystack.around(round(depth * room), room - round(depth * room), rng)
        prompt = np.concatenate([self.head, before, needle, after, self.question])
        return Sample(prompt, answer, key, (len(self.head), len(prompt) - len(self.question)))

    def score(
        self, sample: Sample, written: np.ndarray, forced: np.ndarray | None = None
    ) -> dict[str, float]:
        """1 if the first tokens written are those of the key."""
        return {"accuracy": float(np.array_equal(written[: len(sample.answer)], sample.answer))}

    def settings(self) -> dict[str, Any]:
        """With the haystack and whether the task is described."""
        return super().settings() | {"haystack": self.haystack.name, "instruction": bool(len(self.head))}
