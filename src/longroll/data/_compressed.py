"""Files that may be compressed: gzip, bzip2, xz and Zstandard, by the last suffix of their names."""

import bz2
import gzip
import lzma
import zlib
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd"}
"""The first bytes of each format."""


class Unreadable(Exception):
    """A file that gives no text: a reason that files share, and what is particular to this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


def inner_name(path: Path) -> str:
    """Return the lower-case name of what `path` holds: without a suffix of compression."""
    name = path.name.lower()
    return next((name.removesuffix(suffix) for suffix in MAGIC if name.endswith(suffix)), name)


def open_bytes(path: Path) -> BinaryIO:
    """Open a file as a stream of its uncompressed bytes.

    Raises:
        Unreadable: no permission, or a compression that the name and the first bytes do not agree about.
    """
    suffix = next((suffix for suffix in MAGIC if path.name.lower().endswith(suffix)), "")
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as problem:
        raise unreadable(problem) from None
    found = next((name for name, magic in MAGIC.items() if head.startswith(magic)), "")
    if suffix and head and found != suffix:
        raise Unreadable("damaged", f"it is named {suffix} and holds other data")
    if found and not suffix:
        raise Unreadable("compressed", f"give it a name that ends in {found}")
    opened: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstandard}.get(suffix, open)
    stream: BinaryIO = opened(path, "rb")
    return stream


def _zstandard(path: Path, _: str) -> Any:
    """Return a stream of Zstandard's bytes, by pyarrow, which `datasets` needs anyway."""
    import pyarrow as pa

    return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")


def unreadable(problem: Exception) -> Unreadable:
    """Return what a failed read of a file says, as a reason."""
    if isinstance(problem, PermissionError):
        return Unreadable("no permission to read")
    if isinstance(problem, FileNotFoundError):
        return Unreadable("a broken link")
    said = getattr(problem, "strerror", None) or " ".join(str(problem).split()) or type(problem).__name__
    return Unreadable("damaged", said[:200])


DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged file raises; pyarrow's own errors are OSErrors."""
