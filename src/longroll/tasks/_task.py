"""Base classes of the tasks: a sample, and a task that makes and scores samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from longroll.data import Tokenizer
from longroll.errors import LongrollError
from longroll.sizes import check_bytes

TRAINING, EVALUATION = 1, 2
"""Streams of random numbers that never meet."""
_LONG = 2**28  # tokens from which the memory of a prompt is looked at


def random_of(stream: int, *numbers: int) -> np.random.Generator:
    """Return the generator of one sample, given by its stream and numbers."""
    return np.random.default_rng([stream, *numbers])


def own_tokens(tokenizer: Tokenizer, words: Sequence[str], *, task: str, what: str, mend: str) -> np.ndarray:
    """Return the id of each word, (N,) int32.

    Raises:
        LongrollError: for a word that is several tokens, or the token of another one (the unknown token).
    """
    found: dict[int, str] = {}
    for word in words:
        ids = tokenizer.encode_inside(word)
        if len(ids) != 1 or int(ids[0]) in found:
            raise LongrollError(
                f"{task} needs a token for each {what}, and {tokenizer.name} has none for {word!r}: {mend}."
            )
        found[int(ids[0])] = word
    return np.array(list(found), dtype=np.int32)


@dataclass(frozen=True)
class Sample:
    """One prompt and its answer, as token ids.

    A prompt is put together of pieces that were tokenised one by one, so its length is exact for any
    tokenizer and a million tokens take no longer to make than to copy.
    """

    prompt: np.ndarray
    """(T,) int32."""
    answer: np.ndarray
    """(A,) int32: what a model is trained to write after the prompt."""
    target: str
    """The text or label that the score looks for."""
    context: tuple[int, int]
    """Start and stop of the haystack, needle included, in the prompt; before it stands the instruction,
    after it the question."""
    question: str = ""
    """The question, where the score needs it."""
    prefix: int = 0
    """Tokens at the beginning of the prompt that begin any text (BOS)."""
    learned: np.ndarray | None = None
    """(A,) which tokens of the answer a model is trained on; None: all."""

    @property
    def tokens(self) -> np.ndarray:
        """Prompt and answer, (T + A,) int32."""
        return np.concatenate([self.prompt, self.answer])


class Task:
    """Makes samples of any length, and scores what a model wrote.

    A subclass says how in `sample` and `score`. The same `rng` always gives the same sample.

    A prompt begins with what the tokenizer begins every document with (BOS).

    Args:
        tokenizer: the tokenizer of the model.
        new_tokens: how many tokens the model may write; None: as many as the answer has.
        chat_template: hand the prompt over as a message of the user, in the tokenizer's chat template.

    Raises:
        LongrollError: for `chat_template` and a tokenizer without one.
    """

    name: ClassVar[str] = "task"
    metric: ClassVar[str] = "accuracy"
    """The score that tables and figures show."""
    unit: ClassVar[str] = "tokens"
    """What lengths count."""
    forced: ClassVar[bool] = False
    """Whether `score` needs the model's argmax after each token of the right answer."""
    stationary: ClassVar[bool] = True
    """Whether the text after an answer is like the text before: else its final state begins no text."""

    def __init__(
        self, tokenizer: Tokenizer, *, new_tokens: int | None = None, chat_template: bool = False
    ) -> None:
        self.tokenizer, self.new_tokens, self.chat_template = tokenizer, new_tokens, chat_template
        self.opening = np.array(tokenizer.prefix_ids, dtype=np.int32)
        self.closing = np.empty(0, dtype=np.int32)
        if chat_template:
            self.opening, self.closing = tokenizer.chat_frame()

    @property
    def chance(self) -> float | None:
        """What a guess among the possible answers scores; None where that is nearly 0."""
        return None

    @property
    def stop_id(self) -> int | None:
        """The token that ends what the model writes."""
        return self.tokenizer.separator_id

    def sample(self, length: int, *, depth: float | None = None, rng: np.random.Generator) -> Sample:
        """Make one sample.

        Args:
            length: tokens of prompt and answer together.
            depth: where the answer stands in the haystack, 0 (first) to 1 (last); None: anywhere.
            rng: random generator of everything that is drawn.

        Raises:
            LongrollError: not even an empty haystack fits into `length`.
        """
        raise LongrollError(f"{type(self).__name__} must say how it makes a sample.")

    def score(
        self, sample: Sample, written: np.ndarray, forced: np.ndarray | None = None
    ) -> dict[str, float]:
        """Return scores by name, 0 to 1 each; `metric` is one of them.

        Args:
            sample: the sample.
            written: ids the model wrote, (new_tokens,) or fewer if it stopped.
            forced: its argmax at each place of the right answer, (A,), if `self.forced`.
        """
        raise LongrollError(f"{type(self).__name__} must say how it scores.")

    def settings(self) -> dict[str, Any]:
        """Return what has to be the same for two results to be comparable."""
        return {
            "task": self.name,
            "tokenizer": self.tokenizer.name,
            "new_tokens": self.new_tokens,
            "prefix_ids": list(self.tokenizer.prefix_ids),
            "chat_template": self.chat_template,
        }

    def begin(self, text: str) -> np.ndarray:
        """Return token ids of what begins the prompt, (T,) int32: the prefix or the frame of a chat, then
        `text`.
        """
        inside = self.chat_template or not text
        return np.concatenate([self.opening, self.encode(text) if inside else self.tokenizer.encode(text)])

    def ask(self, question: str, cue: str) -> np.ndarray:
        """Return token ids of what ends the prompt, (T,) int32: the question, and the beginning of its
        answer.

        In a chat the answer begins in the model's message.
        """
        if not self.chat_template:
            return self.encode(f"{question} {cue}" if cue else question)
        return np.concatenate([self.encode(question), self.closing, self.encode(cue)])

    @property
    def prefix(self) -> int:
        """Tokens of `opening` that begin any text: BOS."""
        ids = self.tokenizer.prefix_ids
        return len(ids) if tuple(self.opening[: len(ids)].tolist()) == ids else 0

    def encode(self, text: str) -> np.ndarray:
        """Return token ids of a piece inside a prompt, (T,) int32."""
        return self.tokenizer.encode_inside(text)

    def _check_written(self, text: str) -> None:
        """Refuse a tokenizer that cannot write what an answer is made of."""
        read = "".join(self.tokenizer.decode_inside(self.encode(f" {text}")).split())
        if text.upper() not in read.upper():
            raise LongrollError(
                f"The tokenizer ({self.tokenizer.name}) writes {text!r} as {read!r}, so that no answer of "
                f"{self.name} can be read: take a tokenizer of text (`tokenizer`)."
            )

    def _room(self, length: int, fixed: int) -> int:
        """Return tokens left for the haystack."""
        if length > _LONG:
            check_bytes(f"`length` {length}", 4 * length, "ask for a shorter one")
        if length < fixed:
            raise LongrollError(
                f"length {length}: a {self.name} prompt of this tokenizer ({self.tokenizer.name}) takes at "
                f"least {fixed} tokens; ask for longer ones (`length`)."
            )
        return length - fixed
