"""Chat data: conversations through the tokenizer's template, with the loss on the assistant's answers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import LongrollError
from ._rows import is_rows, read_columns
from ._split import ONE_IN, deal
from .corpus import Corpus
from .hf_tokenizer import HFTokenizer
from .lanes import IGNORED, Lanes, _windows, padded_window
from .windows import Item, Rounds, _positive

COLUMN = "messages"

Message = Mapping[str, Any]
"""`role` and `content`, as chat templates read them."""


@dataclass(frozen=True)
class ChatCorpus(Corpus):
    """Conversations as token ids, and which of them are of answers."""

    answers: np.ndarray = field(kw_only=True)
    """(tokens,) bool, true at the tokens of the assistant's answers, their end included."""

    @classmethod
    def from_conversations(
        cls,
        conversations: Iterable[Sequence[Message]],
        tokenizer: HFTokenizer,
        *,
        max_tokens: int | None = None,
    ) -> "ChatCorpus":
        """Tokenise whole conversations until `max_tokens` are there.

        Raises:
            LongrollError: a tokenizer without a chat template, a conversation that the template refuses, or
                none with an answer.
        """
        ids: list[np.ndarray] = []
        answers: list[np.ndarray] = []
        size = tokens = 0
        rest = None
        for number, messages in enumerate(conversations, start=1):
            found, learned, text = _tokenised(messages, tokenizer, number)
            if len(found) > 1 and learned[1:].any():
                ids.append(found)
                answers.append(learned)
                size, tokens = size + len(text.encode("utf-8", errors="replace")), tokens + len(found)
            if max_tokens is not None and tokens >= max_tokens:
                rest = 0
                break
        if not ids:
            raise LongrollError(
                "No conversation has an answer of the role assistant: there is nothing to learn."
            )
        offsets = np.cumsum([0, *map(len, ids)]).astype(np.int64)
        joined = np.concatenate(ids).astype(np.int32)
        return cls(
            joined, offsets, size, tokenizer.separator_id, tokenizer.name, rest=rest,
            answers=np.concatenate(answers),
        )  # fmt: skip


def is_chat(source: str | Path, column: str | None = None) -> bool:
    """Return whether `source` is a local file of rows whose first one holds messages in `column`
    ("messages").
    """
    path = Path(source).expanduser()
    try:
        if not (path.is_file() and is_rows(path)):
            return False
        first = next(iter(read_columns(path, column or COLUMN)), None)
    except (OSError, LongrollError):
        return False
    return first is not None and _are_messages(first.get(column or COLUMN))


def read_conversations(
    path: str | Path, *, column: str | None = None, split: str = "all"
) -> Iterator[list[Message]]:
    """Return the conversations of a file of rows.

    Args:
        path: a file of rows.
        column: the column of messages; None: `messages`.
        split: "all"; "train" or "validation": conversations with an answer, of which one in each ten is
            validation; the last of fewer than ten; an only one is train.

    Raises:
        LongrollError: a row without messages, and no conversation for validation.
    """
    found = _conversations(Path(path), column or COLUMN)
    if split == "all":
        yield from found
        return
    talks = filter(_has_answer, found)
    head = list(islice(talks, ONE_IN))
    if len(head) < 2 and split == "validation":
        raise LongrollError(f"{path}: a validation split wants two conversations with an answer, or more.")
    if len(head) < ONE_IN:
        last = max(1, len(head) - 1)
        yield from head[:last] if split == "train" else head[last:]
        return
    yield from deal(chain(head, talks), split)


def _conversations(path: Path, column: str) -> Iterator[list[Message]]:
    """Return the conversations of the rows of a file."""
    for number, row in enumerate(read_columns(path.expanduser(), column), start=1):
        messages = row.get(column)
        if not _are_messages(messages):
            raise LongrollError(
                f"{path}: column {column!r} of row {number} holds no messages: a list of objects with "
                "`role` and `content`"
            )
        yield messages  # type: ignore[misc]


class ChatWindows(Dataset[Item]):
    """Windows of single conversations in a shuffled order, for all interventions but TBPTT.

    A conversation longer than `length` is cut into windows; those without an answer are left out. An item has
    `input_ids`, `shift_labels` (the next token where it is of an answer, else -100) and `attention_mask`, all
    (length,), and `starts` ().

    Args:
        corpus: tokenised conversations.
        length: T, tokens of a window.
        seed: random seed of the order.
        num_items: how many items to give, every window again and again in a new order; None: each once.
    """

    def __init__(
        self, corpus: ChatCorpus, length: int, *, seed: int = 0, num_items: int | None = None
    ) -> None:
        self.corpus, self.length = corpus, _positive(length)
        pieces = np.stack([corpus.offsets[:-1], corpus.lengths - 1], axis=1)
        windows = _windows(pieces, length)
        learned = np.concatenate([[0], np.cumsum(corpus.answers)])
        start, size = windows[:, 0], windows[:, 1]
        self.windows = windows[learned[start + size + 1] > learned[start + 1]]
        if not len(self.windows):
            raise LongrollError(
                f"no window of {length} tokens holds an answer: give conversations with answers"
            )
        self.order = Rounds(len(self.windows), seed, num_items)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Item:
        start, size, starts = self.windows[self.order[index]].tolist()
        return _item(self.corpus, start, size, self.length, starts=bool(starts))


class ChatLanes(Lanes):
    """`Lanes` over conversations, for TBPTT: as `ChatWindows`, each window after the one before it."""

    def __init__(
        self, corpus: ChatCorpus, length: int, lanes: int, *, steps: int | None = None, seed: int = 0
    ) -> None:
        super().__init__(corpus, length, lanes, steps=steps, seed=seed)
        self.corpus = corpus

    def __getitem__(self, index: int) -> Item:
        index = range(len(self))[index]
        start, size, starts = self.windows[index // self.lanes, index % self.lanes].tolist()
        return _item(self.corpus, start, size, self.length, starts=bool(starts))


def _item(corpus: ChatCorpus, start: int, size: int, length: int, *, starts: bool) -> Item:
    tokens = slice(start, start + size + 1)
    item = padded_window(corpus.ids[tokens] if size else corpus.ids[:0], length, starts=starts)
    learned = torch.from_numpy(corpus.answers[tokens][1:])
    item["shift_labels"][:size][~learned[:size]] = IGNORED
    item["attention_mask"] = (torch.arange(length) < max(1, size)).long()  # a lane that waits reads one token
    return item


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) and "role" in message for message in value)
    )


def _has_answer(messages: Sequence[Message]) -> bool:
    return any(message["role"] == "assistant" and message.get("content") for message in messages)


def _tokenised(
    messages: Sequence[Message], tokenizer: HFTokenizer, number: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Return ids (T,), whether each is of an answer (T,), and the text of a conversation."""
    inner = tokenizer.tokenizer
    if not getattr(inner, "chat_template", None):
        raise LongrollError(
            f"The text is chat data and the tokenizer {tokenizer.name} has no chat template: name one that "
            "has by `tokenizer`."
        )
    if not getattr(inner, "is_fast", False):
        raise LongrollError(
            f"Chat data need a fast tokenizer, which {tokenizer.name} is not: give a tokenizer.json."
        )

    def rendered(upto: int, ask: bool = False) -> str:
        try:
            text: str = inner.apply_chat_template(
                list(messages[:upto]), tokenize=False, add_generation_prompt=ask
            )
            return text
        except Exception as problem:  # whatever a template in Jinja can raise
            said = " ".join(str(problem).split())[:200]
            raise LongrollError(
                f"The chat template of {tokenizer.name} refuses row {number}: {said}"
            ) from None

    text = rendered(len(messages))
    spans = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = rendered(place, ask=True) if place else "", rendered(place + 1)
        if not (text.startswith(after) and after.startswith(before)):
            raise LongrollError(
                f"The chat template of {tokenizer.name} gives the answers of row {number} another text as "
                "the conversation goes on, so the loss cannot be placed on them: cut the row after its first "
                "answer."
            )
        spans.append((len(before), len(after)))
    encoded = inner(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    at = np.array([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
    answers = np.zeros(len(at), dtype=bool)
    for start, stop in spans:
        answers |= (at >= start) & (at < stop)
    return np.asarray(encoded["input_ids"], dtype=np.int32), answers, text
