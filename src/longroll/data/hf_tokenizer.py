"""A transformers tokenizer behind longroll's protocol."""

from functools import cached_property
from typing import Any

import numpy as np

from ..errors import LongrollError

_ANCHORS = ("\n", ".", "a")
"""Texts to stand before a piece, so that it is tokenised as inside running text."""
_CONTENT = "CONTENT-OF-THE-MESSAGE"


class HFTokenizer:
    """A transformers tokenizer behind the protocol `longroll.data.Tokenizer`.

    Args:
        tokenizer: a tokenizer of transformers.
        name: what it was loaded from.
        bos: begin documents with its BOS token; None: with what it adds itself with special tokens on.

    Raises:
        LongrollError: for `bos` where it has no BOS token, and for a tokenizer that fails at one letter.
    """

    def __init__(self, tokenizer: Any, name: str, *, bos: bool | None = None) -> None:
        self.tokenizer, self.name, self.bos = tokenizer, name, bos
        with _naming(name):
            # added tokens may leave holes: the length of the vocabulary is not always the largest id + 1
            self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
            self.separator_id: int | None = tokenizer.eos_token_id
        self.prefix_ids = self._prefix()

    def _prefix(self) -> tuple[int, ...]:
        if self.bos is False:
            return ()
        plain, whole = self.encode("a").tolist(), self._ids("a", special=True)
        places = [at for at in range(len(whole)) if whole[at : at + len(plain)] == plain]
        added = tuple(whole[: places[0]]) if plain and places else ()
        if not self.bos:
            return added
        first = self.tokenizer.bos_token_id
        if first is None:
            raise LongrollError(f"`bos`: the tokenizer {self.name} has no BOS token")
        return added if first in added else (first, *added)

    def encode(self, text: str) -> np.ndarray:
        """Return token ids of `text`, (T,) int32, however long it is, without special tokens."""
        return np.asarray(self._ids(text, special=False), dtype=np.int32)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        with _naming(self.name):
            encoded = self.tokenizer(
                text,
                add_special_tokens=special,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # "sequence longer than the maximum": the very purpose here
            )
            return list(encoded["input_ids"])

    @cached_property
    def _marks_beginnings(self) -> bool:
        """Whether a word at the beginning of a text has other ids than after a line break (SentencePiece)."""
        differs: bool = self._after("\n", "a") != self.encode("a").tolist()
        return differs

    def _after(self, anchor: str, text: str) -> list[int] | None:
        """Return ids of `text` where `anchor` stands before it; None if a token spans both."""
        before, whole = self.encode(anchor).tolist(), self.encode(anchor + text).tolist()
        return whole[len(before) :] if whole[: len(before)] == before else None

    def encode_inside(self, text: str) -> np.ndarray:
        """Return token ids of `text` as they are inside running text, (T,) int32, not marked as a
        beginning.
        """
        if text and self._marks_beginnings:
            for anchor in _ANCHORS:
                if (ids := self._after(anchor, text)) is not None:
                    return np.asarray(ids, dtype=np.int32)
        return self.encode(text)

    def decode(self, ids: Any) -> str:
        """Return the text of ids, (T,)."""
        with _naming(self.name):
            text: str = self.tokenizer.decode(np.asarray(ids).tolist(), clean_up_tokenization_spaces=False)
            return text

    def decode_inside(self, ids: Any) -> str:
        """Return the text of ids, (T,), as they go on with a text: with the space that begins a word, if
        any.
        """
        anchor = self.encode(_ANCHORS[-1]).tolist()
        before, whole = self.decode(anchor), self.decode([*anchor, *np.asarray(ids).tolist()])
        return whole.removeprefix(before) if whole.startswith(before) else self.decode(ids)

    def count_bytes(self, ids: Any) -> int:
        """Return UTF-8 bytes of the text of ids, (T,); the prefix and separators of documents stand for
        none.
        """
        ids = np.asarray(ids)
        none = [*self.prefix_ids, *([] if self.separator_id is None else [self.separator_id])]
        return len(self.decode(ids[~np.isin(ids, none)]).encode("utf-8", errors="replace"))

    def chat_frame(self) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids that the chat template puts before and after one message of the user.

        The tokens after the message ask for the answer. The template decides about BOS, unless `bos` was
        given.

        Raises:
            LongrollError: there is no chat template, or it does not give the message as it is.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise LongrollError(f"`chat_template`: the tokenizer {self.name} has no chat template")
        message = [{"role": "user", "content": _CONTENT}]
        try:
            text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        except Exception as problem:  # whatever a template in Jinja can raise
            said = " ".join(str(problem).split())[:200]
            raise LongrollError(f"`chat_template`: the template of {self.name} fails: {said}") from None
        before, *rest = text.split(_CONTENT)
        if len(rest) != 1:
            raise LongrollError(
                f"`chat_template`: the template of {self.name} gives the message {len(rest)} times, not once"
            )
        opening, first = self.encode(before), self.tokenizer.bos_token_id
        begins = bool(len(opening)) and opening[0] == first
        if self.bos and not begins:
            opening = np.concatenate([np.array(self.prefix_ids, dtype=np.int32), opening])
        return opening[1:] if self.bos is False and begins else opening, self.encode_inside(rest[0])

    def save(self, folder: Any) -> None:
        """Write the tokenizer's files into a folder."""
        self.tokenizer.save_pretrained(folder)


class _naming:
    """Turn whatever a tokenizer raises, Rust's panics too, into one line that names it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, problem: BaseException | None, _: Any) -> None:
        if problem is None or isinstance(problem, LongrollError) or not is_fault(problem):
            return
        said = " ".join(f"{problem or type(problem).__name__}".split())[:200]
        raise LongrollError(f"tokenizer {self.name!r} is damaged: {said}") from None


def is_fault(problem: BaseException) -> bool:
    """Return whether an exception is a failure, a Rust panic too, and not an interrupt or an exit."""
    return isinstance(problem, Exception) or type(problem).__name__ == "PanicException"
