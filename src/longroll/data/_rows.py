"""Files that hold one document in each row: JSON, JSON lines, CSV, TSV and Parquet, each also compressed."""

import csv
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import LongrollError
from ._compressed import DAMAGE, Unreadable, inner_name, open_bytes

logger = logging.getLogger("longroll")

LINES = (".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
ROWS = (*LINES, *TABLES, ".json", ".parquet")
LONGEST_CELL = 2**31 - 1  # csv's own limit is 128 KiB, less than a long document

Row = Mapping[str, Any]


def is_rows(path: Path) -> bool:
    """Return whether the name of `path` says that it holds one document in each row."""
    return inner_name(path).endswith(ROWS)


def read_rows(path: Path, text_column: str | None) -> Iterator[str]:
    """Return the text of each row; rows without text are left out, with a warning that counts them.

    Raises:
        LongrollError: the file is damaged or may not be read, or has no such column.
    """
    name = inner_name(path)
    if name.endswith(".parquet"):
        return _parquet(path, text_column)
    table = next((delimiter for suffix, delimiter in TABLES.items() if name.endswith(suffix)), None)
    if table:
        what, rows = "a table", _table(path, table)
    elif name.endswith(LINES):
        what, rows = "lines of JSON", _lines(path)
    else:
        what, rows = "JSON", _json(path)
    return texts(_readable(rows, path, what), text_column, str(path))


def read_columns(path: Path, column: str) -> Iterator[Row]:
    """Return the rows of a file as they are, for columns that hold no text; of Parquet only `column`.

    Raises:
        LongrollError: the file is damaged or may not be read.
    """
    name = inner_name(path)
    if name.endswith(".parquet"):
        return _parquet_rows(path, column)
    return _readable(_lines(path) if name.endswith(LINES) else _json(path), path, "rows of JSON")


def texts(rows: Iterable[Row], text_column: str | None, where: str) -> Iterator[str]:
    """Return the text of each of `rows`; the column is chosen by the first one."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    strings = [name for name, value in first.items() if isinstance(value, str)]
    column = choose_column(list(first), strings, text_column, where)
    number = without = 0
    for number, row in enumerate(chain([first], rows), start=1):
        text = row.get(column)
        if text is None:
            without += 1
            continue
        if not isinstance(text, str):
            raise LongrollError(
                f"{where}: column {column!r} of row {number} holds {type(text).__name__}, not text: "
                "name the column of text by `text_column`"
            )
        # JSON can hold halves of surrogate pairs, which are in no encoding: they become "?"
        yield text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
    if without:
        logger.warning("%s: %d of %d rows have no text in column %r", where, without, number, column)


def choose_column(columns: Sequence[str], strings: Sequence[str], asked: str | None, where: str) -> str:
    """Return the column of text: the one asked for, else `text`, else `content`, else the only one of
    strings.
    """
    for name in (asked,) if asked is not None else ("text", "content"):
        if columns.count(name) == 1:
            return name
    if asked is None and len(strings) == 1:
        return strings[0]
    problem = "does not say which column holds the text" if asked is None else f"has no column {asked!r}"
    if asked in columns:
        problem = f"has {columns.count(asked)} columns called {asked!r}"
    names = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "")
    raise LongrollError(f"{where} {problem}: name one by `text_column`; it has {names or 'none'}")


def _readable(rows: Iterator[Row], path: Path, what: str) -> Iterator[Row]:
    """Return `rows`, with every way in which reading a file can fail as one line."""
    try:
        yield from rows
    except (*DAMAGE, Unreadable, UnicodeError, csv.Error) as problem:
        said = " ".join(f"{problem or type(problem).__name__}".split())[:200]
        raise LongrollError(f"{path} cannot be read as {what}: {said}") from None


def _open_text(path: Path) -> io.TextIOWrapper:
    """Return a stream of the characters of a file in UTF-8, or in UTF-16 or UTF-32 if it begins by saying
    so.
    """
    with open_bytes(path) as file:
        encoding = encoding_of(file.read(4))
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, newline="")


def encoding_of(head: bytes) -> str:
    """Return the encoding that the byte order mark of a text tells; UTF-8 without one."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    return "utf-16" if head[2:] and head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"


def _parsed(text: str, where: str) -> Any:
    """Return what a piece of JSON holds."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        raise LongrollError(f"{where} is not JSON ({problem.msg})") from None
    except (ValueError, RecursionError) as problem:  # a number of thousands of digits, thousands of brackets
        raise LongrollError(f"{where} cannot be read as JSON ({str(problem)[:100]})") from None


def _lines(path: Path) -> Iterator[Row]:
    """Return the objects of a JSON-lines file."""
    with _open_text(path) as file:
        yield from _objects(enumerate(file, start=1), path)


def _objects(lines: Iterable[tuple[int, str]], path: Path) -> Iterator[Row]:
    """Return the objects of numbered lines."""
    for number, line in lines:
        if line.strip():
            row = _parsed(line, f"{path}: line {number}")
            if not isinstance(row, dict):
                raise LongrollError(f"{path}: line {number} is not a JSON object with named columns")
            yield row


def _json(path: Path) -> Iterator[Row]:
    """Return the rows of a .json file: an array or lines of objects, an object of columns, or one object."""
    with _open_text(path) as file:
        numbered = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        start = list(zip(range(2), numbered, strict=False))
        if len(start) == 2 and _is_object(start[0][1][1]):
            yield from _objects(chain((line for _, line in start), numbered), path)
            return
        whole = "".join(chain((line for _, (_, line) in start), (line for _, line in numbered)))
    if not whole:
        return
    found = _parsed(whole, str(path))
    rows = _columns(found) if isinstance(found, dict) else found
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise LongrollError(f"{path} holds no rows with named columns: give an array of JSON objects")
    yield from rows


def _is_object(line: str) -> bool:
    """Return whether a line is a JSON object by itself."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _columns(found: dict[str, Any]) -> list[Row]:
    """Return the rows of an object whose columns are of one length (lists, or pandas' objects); else one
    row.
    """
    columns = [list(value.values()) if isinstance(value, dict) else value for value in found.values()]
    if columns and all(isinstance(column, list) for column in columns) and len(set(map(len, columns))) == 1:
        return [dict(zip(found, row, strict=True)) for row in zip(*columns, strict=True)]
    return [found]


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    """Return the rows of a table with a header; a .csv without any comma in its header may use ; or tabs."""
    csv.field_size_limit(LONGEST_CELL)
    with _open_text(path) as file:
        header = file.readline()
        if delimiter == "," and "," not in header:
            delimiter = next((mark for mark in ";\t" if mark in header), delimiter)
        read = csv.reader(chain([header], file), delimiter=delimiter, strict=True)
        names = next(read, [])
        for cells in read:
            if not cells:
                continue
            if len(cells) != len(names):
                raise LongrollError(
                    f"{path}: line {read.line_num} has {len(cells)} cells and the header {len(names)}: "
                    "quote the cells that hold a delimiter"
                )
            yield _Cells(names, cells)


class _Cells(dict[str, str]):
    """A row of a table; listing it gives every name of the header, also one that stands there twice."""

    def __init__(self, names: list[str], cells: list[str]) -> None:
        super().__init__(zip(names, cells, strict=True))
        self.names = names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)


def _parquet_source(path: Path) -> Any:
    """Return the file, or its bytes where it is compressed."""
    import pyarrow as pa

    if path.name.lower().endswith(".parquet"):
        return path
    with open_bytes(path) as file:
        return pa.BufferReader(file.read())


def _parquet_rows(path: Path, column: str) -> Iterator[Row]:
    """Return the rows of a Parquet file's column, a few at a time."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pa.parquet.ParquetFile(_parquet_source(path)) as table:
            columns = [name for name in table.schema_arrow.names if name == column]
            for batch in table.iter_batches(batch_size=64, columns=columns) if columns else ():
                yield from batch.to_pylist()
    except (pa.ArrowException, *DAMAGE, Unreadable) as problem:
        said = " ".join(str(problem).split())[:200]
        raise LongrollError(f"{path} cannot be read as Parquet: {said}") from None


def _parquet(path: Path, text_column: str | None) -> Iterator[str]:
    """Return the text of a Parquet file's rows, a few at a time and no other column."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pa.parquet.ParquetFile(_parquet_source(path)) as table:
            schema = table.schema_arrow
            strings = [field.name for field in schema if _is_text(field.type)]
            column = choose_column(schema.names, strings, text_column, str(path))
            if column not in strings:
                raise LongrollError(
                    f"{path}: column {column!r} holds {schema.field(column).type}, not text: "
                    "name the column of text by `text_column`"
                )
            without = 0
            for batch in table.iter_batches(batch_size=64, columns=[column]):
                without += batch.column(0).null_count
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
            if without:
                rows = table.metadata.num_rows
                logger.warning("%s: %d of %d rows have no text in column %r", path, without, rows, column)
    except (pa.ArrowException, *DAMAGE, Unreadable, UnicodeError) as problem:
        said = " ".join(str(problem).split())[:200]
        raise LongrollError(f"{path} cannot be read as Parquet: {said}") from None


def _is_text(kind: Any) -> bool:
    """Return whether a column of this Arrow type holds strings, as they are or as codes of a few values."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
