"""The vocabulary files of RWKV World models (`rwkv_vocab_v20230424.txt`): greedy longest match over bytes.

Format: BlinkDL/ChatRWKV, tokenizer/rwkv_tokenizer.py: a line is an id, a Python literal (str or bytes) and
its length in bytes. Id 0, which the file leaves out, ends a text.
"""

import ast
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LongrollError

END = 0


class RWKVTokenizer:
    """A World vocabulary behind the protocol `longroll.data.Tokenizer`.

    Args:
        path: the path of the vocabulary file.
        bos: begin documents with id 0, which ends a text and stands before each in training; None: no.

    Raises:
        LongrollError: for a file that is not such a vocabulary; it names the line.
    """

    def __init__(self, path: str | Path, *, bos: bool | None = None) -> None:
        self.path, self.name = Path(path), str(path)
        self.tokens = _read(self.path)
        self.vocab_size = max(self.tokens) + 1
        self.separator_id: int | None = None if END in self.tokens else END
        if bos and self.separator_id is None:
            raise LongrollError(f"`bos`: the vocabulary {self.name} uses id 0, which would begin a text")
        self.prefix_ids = (END,) if bos else ()
        self._texts = {END: b""} | self.tokens
        self._ids = {token: id for id, token in self.tokens.items()}
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {start: sorted(sizes, reverse=True) for start, sizes in lengths.items()}

    def encode(self, text: str) -> np.ndarray:
        """Return token ids of `text`, (T,) int32.

        Raises:
            LongrollError: a byte of the text has no token.
        """
        data, found, at = text.encode("utf-8", errors="replace"), [], 0
        ids, lengths = self._ids, self._lengths
        while at < len(data):
            for size in lengths.get(data[at : at + 2], (1,)):
                id = ids.get(data[at : at + size])
                if id is not None:
                    break
            else:
                size, id = 1, ids.get(data[at : at + 1])
            if id is None:
                raise LongrollError(f"the vocabulary {self.name} has no token for byte 0x{data[at]:02x}")
            found.append(id)
            at += size
        return np.array(found, dtype=np.int32)

    encode_inside = encode

    def decode(self, ids: Any) -> str:
        """Return the text of ids, (T,); a separator gives no text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            LongrollError: an id is not in the vocabulary.
        """
        return self._bytes(ids).decode("utf-8", errors="replace")

    decode_inside = decode

    def count_bytes(self, ids: Any) -> int:
        """Return the number of bytes that ids, (T,), stand for."""
        return len(self._bytes(ids))

    def _bytes(self, ids: Any) -> bytes:
        try:
            return b"".join(self._texts[id] for id in np.asarray(ids).tolist())
        except KeyError as missing:
            raise LongrollError(f"the vocabulary {self.name} has no token {missing}") from None

    def chat_frame(self) -> tuple[np.ndarray, np.ndarray]:
        """A vocabulary file has no chat template."""
        raise LongrollError(f"`chat_template`: the vocabulary file {self.name} has no chat template")

    def save(self, folder: Any) -> None:
        """Copy the vocabulary file into a folder."""
        from ..files import write_whole

        write_whole(Path(folder) / self.path.name, self.path.read_bytes())


def _read(path: Path) -> dict[int, bytes]:
    """Return the tokens of a vocabulary file by their ids."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as problem:
        raise LongrollError(f"tokenizer {path} cannot be read: {problem}") from None
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            start, end = line.index(" "), line.rindex(" ")
            token = ast.literal_eval(line[start + 1 : end])
            token = token.encode() if isinstance(token, str) else token
            id, size = int(line[:start]), int(line[end:])
            if not isinstance(token, bytes) or len(token) != size or id < 0 or id in tokens:
                raise ValueError
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise LongrollError(
                f"tokenizer {path}, line {number}: not a line of an RWKV vocabulary (an id, a Python "
                "literal, its length in bytes)"
            ) from None
        tokens[id] = token
    if not tokens:
        raise LongrollError(f"tokenizer {path} is empty: it has no token")
    return tokens
