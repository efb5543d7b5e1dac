"""Text to token ids and back: bytes, or any Hugging Face tokenizer."""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import LongrollError
from ._hub import offline, why_not_there

BYTES = "bytes"
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


class Tokenizer(Protocol):
    """What the rest of longroll asks of a tokenizer."""

    @property
    def name(self) -> str:
        """What it was loaded from, for messages and results."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id it can give."""

    @property
    def separator_id(self) -> int | None:
        """The id between two documents (end of text); None if there is none."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, (T,) int32, without special tokens."""

    def decode(self, ids: Any) -> str:
        """The text of ids, (T,): an array, a tensor or a list."""


class ByteTokenizer:
    """The UTF-8 bytes of the text are its tokens: ids 0 to 255, no special ones."""

    name = BYTES
    vocab_size = 256
    separator_id = None

    def encode(self, text: str) -> np.ndarray:
        """The bytes of `text`, (T,) int32."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Any) -> str:
        """The text of byte ids, (T,); bytes that are not UTF-8 (a cut character) become U+FFFD.

        Raises:
            LongrollError: an id is no byte.
        """
        values = np.asarray(ids, dtype=np.int64)
        if values.size and not 0 <= values.min() <= values.max() < self.vocab_size:
            raise LongrollError(f"token ids {values.min()} to {values.max()} are not all bytes (0 to 255)")
        return values.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def bytes_per_token(self, text: str = "") -> float:
        """Exactly 1."""
        return 1.0


class HFTokenizer:
    """A transformers tokenizer behind the protocol above."""

    def __init__(self, tokenizer: Any, name: str):
        self.tokenizer = tokenizer
        self.name = name
        # added tokens may leave holes: the length of the vocabulary is not always the largest id + 1
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.separator_id: int | None = tokenizer.eos_token_id

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, (T,) int32, however long it is."""
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # "sequence longer than the maximum": the very purpose here
        )
        return np.asarray(encoded["input_ids"], dtype=np.int32)

    def decode(self, ids: Any) -> str:
        """The text of ids, (T,)."""
        return self.tokenizer.decode(np.asarray(ids).tolist(), clean_up_tokenization_spaces=False)

    def bytes_per_token(self, text: str) -> float:
        """UTF-8 bytes of `text` for each of its tokens."""
        return len(text.encode("utf-8", errors="replace")) / max(1, len(self.encode(text)))


def load_tokenizer(
    name_or_path: str | Path | None = None,
    *,
    model_path: str | Path | None = None,
    vocab_size: int | None = None,
) -> ByteTokenizer | HFTokenizer:
    """Load the tokenizer named, else the one beside the model, else bytes if the model's vocabulary fits.

    Args:
        name_or_path: "bytes", a folder or `tokenizer.json`, or a hub id; None: the model's own.
        model_path: the folder or hub id of the model.
        vocab_size: of the model; with 256 or fewer entries and no tokenizer beside it, tokens are bytes.

    Raises:
        LongrollError: there is none, or it cannot be loaded. Code from a repository is never run.
    """
    if name_or_path is not None:
        return ByteTokenizer() if name_or_path == BYTES else _load(name_or_path)
    if model_path is not None and _may_have_tokenizer(model_path):
        try:
            return _load(model_path)
        except LongrollError as problem:
            reason = str(problem)
    else:
        reason = f"there is no tokenizer beside the model {model_path}" if model_path else "no model is named"
    if vocab_size is not None and vocab_size <= ByteTokenizer.vocab_size:
        return ByteTokenizer()
    raise LongrollError(
        f"{reason.rstrip('.')}: name a tokenizer (`name_or_path`: a folder, a hub id or bytes; "
        "the state-spaces/mamba checkpoints use EleutherAI/gpt-neox-20b)"
    )


def check_vocabulary(max_id: int, model_vocab_size: int, *, tokenizer: str = "the tokenizer") -> None:
    """Check that every token is in the model's vocabulary.

    Args:
        max_id: the largest token id of the text (`Corpus.max_id`).
        model_vocab_size: rows of the model's embedding.
        tokenizer: its name, for the message.

    Raises:
        LongrollError: some tokens are outside the vocabulary of the model.
    """
    if max_id >= model_vocab_size:
        raise LongrollError(
            f"tokens outside the vocabulary of the model: {tokenizer} gives id {max_id}, the model has "
            f"{model_vocab_size} entries; name the model's own `tokenizer`"
        )


def _may_have_tokenizer(model_path: str | Path) -> bool:
    """Whether a tokenizer can be beside the model: a folder with one of its files, or a hub id."""
    path = Path(os.path.expanduser(model_path))
    return any((path / name).is_file() for name in _FILES) if path.exists() else isinstance(model_path, str)


def _load(name_or_path: str | Path) -> HFTokenizer:
    """Load a Hugging Face tokenizer from a folder, a tokenizer.json or the hub."""
    path = Path(os.path.expanduser(name_or_path))
    local, reason = path.exists(), None
    if not local and isinstance(name_or_path, Path):
        raise LongrollError(f"tokenizer {name_or_path}: no such file or folder")
    if not local and not offline():
        reason = why_not_there(str(name_or_path), "model")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loaded: Any
    try:
        if path.is_file():
            loaded = PreTrainedTokenizerFast(tokenizer_file=str(path))
        else:
            loaded = AutoTokenizer.from_pretrained(
                str(path) if local else str(name_or_path),
                local_files_only=local or offline() or reason is not None,  # then: what was downloaded before
                trust_remote_code=False,  # the default asks the user at the terminal
            )
    except Exception as problem:  # OSError, ValueError, KeyError, a parse error of the Rust library
        if reason:
            raise LongrollError(
                f"tokenizer {str(name_or_path)!r}: no such folder here, and {reason}"
            ) from None
        said = " ".join(str(problem).split())[:300]
        if "trust_remote_code" in str(problem):
            said = "it needs code from its repository, which longroll does not run; name a tokenizer.json"
        raise LongrollError(f"tokenizer {str(name_or_path)!r} cannot be loaded: {said}") from problem
    return HFTokenizer(loaded, str(name_or_path))
