"""BABILong: bAbI's facts scattered in order through a book, and a question about them.

Construction: booydar/babilong: babilong/babilong_utils.py (SentenceSampler, NoiseInjectionDataset),
babilong/metrics.py, data/create_tasks.py. Facts stand at sorted uniform gaps between the book's sentences,
one space before every sentence. The prompts are in longroll's own words, or BABILong's as lm-eval ships
them. What differs: sentences end at `.`, `!` or `?` before white space (there nltk's untrained Punkt), the
length counts the whole prompt exactly (there 300 tokens are set aside for instructions), and any books can
be the noise (there PG-19).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from longroll.data import Tokenizer, read_documents
from longroll.errors import LongrollError
from longroll.tasks._task import Sample, Task
from longroll.tasks.babi import Story, read_stories
from longroll.tasks.babilong_prompts import LABELS, SHORT, own_prompt
from longroll.tasks.official import babilong_prompt, check_prompts

QAS = tuple(LABELS)
"""The five of the leaderboard's mean."""
NEW_TOKENS = 20
SHORTEST = 10
"""Tokens of a sentence of noise, at least, as in the source."""

_END = re.compile(r"""(?<=[.!?])["'”’)\]]*\s+""")  # noqa: RUF001


class BABILong(Task):
    """One of the tasks qa1 to qa5.

    Args:
        tokenizer: the tokenizer of the model.
        qa: "qa1" to "qa5".
        stories: the facts, from `read_stories`.
        books: texts to hide them in; none: facts alone, BABILong's 0k.
        few_shot: a prompt with instructions and examples; otherwise text, question and "Answer:" alone.
        prompts: "own" words, or the "official" ones that lm-eval ships; these come with examples.
        chat_template: see `Task`.

    Raises:
        LongrollError: for an unknown `qa`, for no stories, and for official prompts without lm-eval or
            `few_shot`.
    """

    name = "babilong"

    def __init__(
        self,
        tokenizer: Tokenizer,
        qa: str,
        stories: Sequence[Story],
        books: Sequence[str] = (),
        *,
        few_shot: bool = True,
        prompts: str = "own",
        chat_template: bool = False,
    ) -> None:
        super().__init__(tokenizer, new_tokens=NEW_TOKENS, chat_template=chat_template)
        if qa not in LABELS:
            raise LongrollError(f"BABILong's {qa!r} is not one of {', '.join(QAS)}.")
        if not stories:
            raise LongrollError(f"There are no stories of {qa}.")
        self.qa, self.stories, self.books, self.few_shot = qa, stories, books, few_shot
        self.prompts = check_prompts(prompts)
        if prompts == "official" and not few_shot:
            raise LongrollError("`prompts` official come with examples: ask for `few_shot` too.")
        made = babilong_prompt if prompts == "official" else own_prompt
        before, self.tail = (made(qa) if few_shot else SHORT).split("{context}")
        self.head = self.begin(before)

    def sample(self, length: int, *, depth: float | None = None, rng: np.random.Generator) -> Sample:
        """Scatter the facts of a random story that fits; `length` counts prompt and answer, 0 asks for 0k.

        The facts have the places they get: `depth` means nothing here.
        """
        for number in rng.permutation(len(self.stories))[:1000]:
            story = self.stories[number]
            tail = self.ask(self.tail.format(question=story.question), "")
            answer = self.encode(f"{story.answer}." if self.chat_template else f" {story.answer}.")
            # each sentence, the first too, follows a space: pieces then tokenise as they do in running text
            facts = [self.encode(f" {fact}") for fact in story.facts]
            fixed = len(self.head) + sum(map(len, facts)) + len(tail) + len(answer)
            if length == 0 or not self.books or fixed <= length:
                break
        else:
            self._room(length, fixed)
        noise = list(self._noise(length - fixed, rng)) if self.books and length else []
        gaps = np.sort(rng.integers(len(noise) + 1, size=len(facts)))
        pieces: list[np.ndarray] = []
        for gap in range(len(noise) + 1):
            pieces += [fact for fact, at in zip(facts, gaps, strict=True) if at == gap] + noise[gap : gap + 1]
        prompt = np.concatenate([self.head, *pieces, tail])
        context = (len(self.head), len(prompt) - len(tail))
        return Sample(prompt, answer, story.answer, context, story.question, prefix=self.prefix)

    def _noise(self, tokens: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Return sentences of `tokens` tokens together, the last one cut to fit."""
        empty = 0  # looks into books since the last sentence
        while tokens > 0:
            empty += 1
            if empty > 1000:
                raise LongrollError(f"`books` hold no sentence of {SHORTEST} tokens or more.")
            book = self.books[int(rng.integers(len(self.books)))]
            start = int(rng.integers(len(book)))
            sentences = split_sentences(book[start : start + 10 * tokens + 1000])
            for sentence in sentences[1:-1]:  # cut ones
                ids = self.encode(f" {sentence}")[:tokens]
                if len(ids) < min(SHORTEST, tokens):
                    continue
                yield ids
                tokens, empty = tokens - len(ids), 0
                if tokens == 0:
                    break

    def score(
        self, sample: Sample, written: np.ndarray, forced: np.ndarray | None = None
    ) -> dict[str, float]:
        """Return the official metric."""
        output = self.tokenizer.decode(written)
        return {"accuracy": float(compare_answers(sample.target, output, sample.question, LABELS[self.qa]))}

    @property
    def chance(self) -> float:
        """One in as many labels as the question type has."""
        return 1 / len(LABELS[self.qa])

    def settings(self) -> dict[str, Any]:
        """With the prompt's form and digests of facts and noise."""
        digests = {"stories": _digest(map(str, self.stories)), "books": _digest(self.books)}
        return super().settings() | {"few_shot": self.few_shot, "prompts": self.prompts} | digests


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "replace"))
    return digest.hexdigest()[:16]


def compare_answers(target: str, output: str, question: str, labels: frozenset[str]) -> bool:
    """Return the official metric: the output names `target` and no other label of the task.

    Only the output before the first `.`, `<context>` or `<example>` counts, and labels that the question
    names are left aside. Source: booydar/babilong, babilong/metrics.py (`compare_answers`). lm-eval's
    version looks for the target anywhere: there an answer that names every place is right.
    """
    output = output.lower()
    for end in (".", "<context>", "<example>"):
        output = output.split(end)[0]
    named = {label for label in labels if label in output} - {
        label for label in labels if label in question.lower()
    }
    return named == {target.lower()}


def split_sentences(text: str) -> list[str]:
    """Return sentences, each on one line."""
    return [" ".join(sentence.split()) for sentence in _END.split(text) if sentence.strip()]


def open_babilong(
    tokenizer: Tokenizer, facts: str, books: str, kinds: Sequence[str], *, train: bool, **form: Any
) -> list[BABILong]:
    """Return the tasks named by `kinds`, with facts and books of one split.

    Args:
        tokenizer: the tokenizer of the model.
        facts: bAbI's files or BABILong's hub id, as for `read_stories`.
        books: what `longroll.data.read_documents` reads, or "none" for facts alone.
        kinds: some of "qa1" to "qa5".
        train: take the training split, or else the test split of the facts and the held-out books.
        form: `few_shot`, `prompts` and `chat_template` of `BABILong`.

    Raises:
        LongrollError: as `read_stories`, `read_documents` and `BABILong`.
    """
    texts = [] if books == "none" else list(read_documents(books, split="train" if train else "validation"))
    split = "train" if train else "test"
    return [BABILong(tokenizer, qa, read_stories(facts, qa, split), texts, **form) for qa in kinds]
