"""Text to token ids and back: bytes, a Hugging Face tokenizer, or a vocabulary of RWKV World."""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import LongrollError
from ._hub import offline, why_not_there
from .hf_tokenizer import HFTokenizer, is_fault
from .rwkv_tokenizer import RWKVTokenizer

BYTES = "bytes"
_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt",
    "vocab.txt", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_RWKV_FILES = "rwkv_vocab*.txt"
WORLD = "rwkv_vocab_v20230424.txt"
"""The vocabulary of RWKV World, as its repositories on the hub name it."""


class Tokenizer(Protocol):
    """Interface of a tokenizer."""

    @property
    def name(self) -> str:
        """What it was loaded from, for messages and results."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id it can give."""

    @property
    def separator_id(self) -> int | None:
        """The id between two documents (end of text); None if there is none."""

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The ids that every document begins with (BOS); none for many tokenizers."""

    def encode(self, text: str) -> np.ndarray:
        """Return token ids of `text`, (T,) int32, without special tokens."""

    def encode_inside(self, text: str) -> np.ndarray:
        """Return token ids of `text` as they are inside running text, (T,) int32: not marked as a
        beginning.
        """

    def decode(self, ids: Any) -> str:
        """Return the text of ids, (T,): an array, a tensor or a list."""

    def decode_inside(self, ids: Any) -> str:
        """Return the text of ids, (T,), as they go on with a text: with the space that begins a word, if
        any.
        """

    def count_bytes(self, ids: Any) -> int:
        """Return UTF-8 bytes of the text of ids, (T,)."""

    def chat_frame(self) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids that the chat template puts before and after one message of the user."""

    def save(self, folder: Any) -> None:
        """Write what `load_tokenizer` finds into a folder."""


class ByteTokenizer:
    """The UTF-8 bytes of the text are its tokens: ids 0 to 255, no special ones."""

    name = BYTES
    vocab_size = 256
    separator_id = None
    prefix_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> np.ndarray:
        """Return the bytes of `text`, (T,) int32."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.int32)

    encode_inside = encode

    def decode(self, ids: Any) -> str:
        """Return the text of byte ids, (T,); bytes that are not UTF-8 (a cut character) become U+FFFD.

        Raises:
            LongrollError: an id is not a byte.
        """
        values = np.asarray(ids, dtype=np.int64)
        if values.size and not 0 <= values.min() <= values.max() < self.vocab_size:
            raise LongrollError(f"token ids {values.min()} to {values.max()} are not all bytes (0 to 255)")
        return values.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    decode_inside = decode

    def count_bytes(self, ids: Any) -> int:
        """Return how many ids there are."""
        return len(ids)

    def chat_frame(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes have no chat template."""
        raise LongrollError("`chat_template`: the tokens are bytes, which have no chat template")

    def save(self, folder: Any) -> None:
        """Bytes need no file."""


def load_tokenizer(
    name_or_path: str | Path | None = None,
    *,
    model_path: str | Path | None = None,
    vocab_size: int | None = None,
    bos: bool | None = None,
    trust_remote_code: bool = False,
) -> ByteTokenizer | HFTokenizer | RWKVTokenizer:
    """Load the tokenizer named, else the one beside the model, else bytes if the model's vocabulary fits.

    Args:
        name_or_path: "bytes", a folder, a `tokenizer.json`, a vocabulary of RWKV World (.txt), or a hub id;
            None: the model's own.
        model_path: the folder, the .pth file or the hub id of the model.
        vocab_size: entries of the vocabulary of the model; with 256 or fewer entries and no tokenizer beside
            it, tokens are bytes.
        bos: begin every document with BOS or not; None: as the tokenizer does with its special tokens on.
        trust_remote_code: run code that comes with the tokenizer.

    Raises:
        LongrollError: there is none, it cannot be loaded or is damaged, it needs code that may not run, or it
            has no BOS and `bos` asks for one.
    """
    if name_or_path is not None:
        if name_or_path == BYTES:
            return _bytes(bos)
        return _load(name_or_path, bos, trust_remote_code)
    reason = "no model is named"
    if model_path is not None:
        path = Path(os.path.expanduser(model_path))
        if not path.exists() and isinstance(model_path, str):
            try:
                return _load(model_path, bos, trust_remote_code)
            except LongrollError as problem:
                if _downloaded(model_path):  # it is there and does not load: no reason for bytes
                    raise
                reason = str(problem)
        elif (found := _beside(path)) is not None:
            return _load(found, bos, trust_remote_code, name=str(model_path))
        else:
            reason = f"there is no tokenizer beside the model {model_path}"
    if vocab_size is not None and vocab_size <= ByteTokenizer.vocab_size:
        return _bytes(bos)
    raise LongrollError(
        f"{reason.rstrip('.')}: name a tokenizer (`name_or_path`: a folder, a hub id, a vocabulary file of "
        "RWKV World or bytes; state-spaces/mamba checkpoints use EleutherAI/gpt-neox-20b, RWKV World models "
        "rwkv_vocab_v20230424.txt)"
    )


def _bytes(bos: bool | None) -> ByteTokenizer:
    if bos:
        raise LongrollError("`bos`: the tokens are bytes, and none of them begins a text")
    return ByteTokenizer()


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


def _beside(path: Path) -> Path | None:
    """Return the tokenizer of a local model: its folder, a vocabulary of RWKV World in it, or None.

    A .pth file may lie among files of others, so the folder must hold what `save_pretrained` always writes.
    """
    folder = path if path.is_dir() else path.parent
    vocabularies = sorted(folder.glob(_RWKV_FILES))
    # the vocabulary file itself, rather than code that reads it
    if vocabularies and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return vocabularies[0]
    files = _FILES if path.is_dir() else ("tokenizer_config.json",)
    return folder if any((folder / name).is_file() for name in files) else None


def _hub_vocabulary(name: str) -> Path | None:
    """Return the vocabulary of RWKV World in a hub repository, downloaded; None if it has none."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, WORLD, local_files_only=offline()))
    except Exception:  # not there, or not reachable: the HTTP client's own errors differ between releases
        return None


def _downloaded(name: str) -> bool:
    """Return whether files of the tokenizer of this hub id are on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in _FILES)
    except HFValidationError:
        return False


def _load(
    name_or_path: str | Path, bos: bool | None, trust_remote_code: bool, *, name: str | None = None
) -> HFTokenizer | RWKVTokenizer:
    """Load a tokenizer from a folder, a file or the hub."""
    path = Path(os.path.expanduser(name_or_path))
    name = name or str(name_or_path)
    local, reason = path.exists(), None
    if not local and isinstance(name_or_path, Path):
        raise LongrollError(f"tokenizer {name_or_path}: no such file or folder")
    if path.is_file() and path.suffix == ".txt":
        return RWKVTokenizer(path, bos=bos)
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
                trust_remote_code=trust_remote_code,  # the default asks the user at the terminal
            )
    except BaseException as problem:  # OSError, ValueError, KeyError, a parse error or a panic of Rust's
        if not is_fault(problem):
            raise
        if reason:
            raise LongrollError(f"tokenizer {name!r}: no such folder here, and {reason}") from None
        said = " ".join(str(problem).split())[:300] or type(problem).__name__
        if "trust_remote_code" in str(problem):
            if not local and (vocabulary := _hub_vocabulary(str(name_or_path))) is not None:
                return RWKVTokenizer(vocabulary, bos=bos)
            said = (
                "it needs code from its repository, which longroll does not run unless `trust_remote_code` "
                "is set; a tokenizer.json needs none"
            )
        raise LongrollError(f"tokenizer {name!r} cannot be loaded: {said}") from problem
    return HFTokenizer(loaded, name, bos=bos)
