"""Files that hold one document a row: .jsonl, .jsonl.gz and .parquet, read as a stream."""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import LongrollError

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
PARQUET = (".parquet",)


def is_rows(path: Path) -> bool:
    """Whether the name of `path` says that it holds one document a row."""
    return path.name.lower().endswith(LINES + PARQUET)


def read_rows(path: Path, text_column: str | None) -> Iterator[str]:
    """The text of each row; rows whose text is null are left out.

    Raises:
        LongrollError: the file is damaged, or has no such column.
    """
    if path.name.lower().endswith(PARQUET):
        return _parquet(path, text_column)
    return texts(_lines(path), text_column, str(path))


def texts(rows: Iterable[Mapping[str, Any]], text_column: str | None, where: str) -> Iterator[str]:
    """The text of each of `rows`; the column is chosen by the first one."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    strings = [name for name, value in first.items() if isinstance(value, str)]
    column = choose_column(list(first), strings, text_column, where)
    for number, row in enumerate(chain([first], rows), start=1):
        text = row.get(column)
        if text is None:
            continue
        if not isinstance(text, str):
            raise LongrollError(
                f"{where}: column {column!r} of row {number} holds {type(text).__name__}, not text: "
                "name the column of text with --text-column"
            )
        # JSON can hold halves of surrogate pairs, which are in no encoding: they become "?"
        yield text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def choose_column(columns: Sequence[str], strings: Sequence[str], asked: str | None, where: str) -> str:
    """The column of text: the one asked for, else `text`, else `content`, else the only one of strings."""
    for name in (asked,) if asked else ("text", "content"):
        if name in columns:
            return name
    if not asked and len(strings) == 1:
        return strings[0]
    problem = f"has no column {asked!r}" if asked else "does not say which column holds the text"
    raise LongrollError(
        f"{where} {problem}: name one with --text-column; it has {', '.join(columns) or 'none'}"
    )


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSON-lines file, gzipped or not."""
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as problem:
                    raise LongrollError(f"{path}: line {number} is not JSON ({problem.msg})") from None
                if not isinstance(row, dict):
                    raise LongrollError(f"{path}: line {number} is not a JSON object with named columns")
                yield row
    except (OSError, EOFError, UnicodeDecodeError) as problem:
        raise LongrollError(f"{path} cannot be read as lines of JSON: {problem}") from None


def _parquet(path: Path, text_column: str | None) -> Iterator[str]:
    """The text of a Parquet file's rows, a few at a time and no other column."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pa.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            strings = [field.name for field in schema if str(field.type) in ("string", "large_string")]
            column = choose_column(schema.names, strings, text_column, str(path))
            if column not in strings:
                raise LongrollError(
                    f"{path}: column {column!r} holds {schema.field(column).type}, not text: "
                    "name the column of text with --text-column"
                )
            for batch in file.iter_batches(batch_size=64, columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pa.ArrowException, OSError) as problem:
        raise LongrollError(f"{path} cannot be read as Parquet: {problem}") from None
