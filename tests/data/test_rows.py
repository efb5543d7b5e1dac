import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longroll.data import read_documents
from longroll.errors import LongrollError


def write_lines(path: Path, rows: list) -> Path:
    """Write JSON lines, gzipped if the name says so."""
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
    return path


def write_parquet(path: Path, rows: list) -> Path:
    """Write rows as Parquet."""
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return path


# written down once: other rows here would mix up every split made before
HELD_OUT = (0, 13, 26, 33)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_lines),
        ("a.jsonl.gz", write_lines),
        ("a.ndjson", write_lines),
        ("a.parquet", write_parquet),
    ],
)
def test_a_row_is_a_document(tmp_path: Path, name, write):
    path = write(tmp_path / name, [{"id": str(i), "text": f"row {i} ü"} for i in range(35)])
    everything = [f"row {i} ü" for i in range(35)]
    assert list(read_documents(path, split="all")) == everything
    assert list(read_documents(path, split="validation")) == [everything[i] for i in HELD_OUT]
    assert list(read_documents(str(path))) == [text for i, text in enumerate(everything) if i not in HELD_OUT]
    assert list(read_documents(path, split="all", text_column="id")) == [str(i) for i in range(35)]


@pytest.mark.parametrize(("name", "write"), [("a.jsonl", write_lines), ("a.parquet", write_parquet)])
def test_few_rows_give_the_end_of_each(tmp_path: Path, name, write):
    path = write(tmp_path / name, [{"text": "t" * 90 + "v" * 10}] * 3)
    assert list(read_documents(path)) == ["t" * 90] * 3
    assert list(read_documents(path, split="validation")) == ["v" * 10] * 3


@pytest.mark.parametrize(("name", "write"), [("a.jsonl", write_lines), ("a.parquet", write_parquet)])
class TestColumns:
    def test_content_then_the_only_strings(self, tmp_path: Path, name, write):
        path = write(tmp_path / name, [{"content": "yes", "url": "no"}])
        assert list(read_documents(path, split="all")) == ["yes"]
        path = write(tmp_path / name, [{"number": 3, "body": "yes"}])
        assert list(read_documents(path, split="all")) == ["yes"]

    def test_several_strings(self, tmp_path: Path, name, write):
        path = write(tmp_path / name, [{"title": "a", "body": "b"}])
        with pytest.raises(LongrollError, match=r"`text_column`; it has title, body"):
            list(read_documents(path))

    def test_missing(self, tmp_path: Path, name, write):
        path = write(tmp_path / name, [{"title": "a", "body": "b"}])
        with pytest.raises(LongrollError, match=r"no column 'story'.*title, body"):
            list(read_documents(path, text_column="story"))

    def test_not_text(self, tmp_path: Path, name, write):
        path = write(tmp_path / name, [{"text": 3, "body": "b"}])
        with pytest.raises(LongrollError, match=r"'text'.* holds int"):
            list(read_documents(path, split="all"))

    def test_null_is_left_out(self, tmp_path: Path, name, write):
        path = write(tmp_path / name, [{"text": "a"}, {"text": None}, {"text": "b"}])
        assert list(read_documents(path, split="all")) == ["a", "b"]


def test_shards_in_a_folder(tmp_path: Path):
    write_parquet(tmp_path / "0.parquet", [{"text": f"p{i}"} for i in range(20)])
    write_lines(tmp_path / "1.jsonl.gz", [{"text": f"j{i}"} for i in range(10)])
    assert list(read_documents(tmp_path, split="validation")) == ["p0", "p13", "j0"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b"[1, 2]\n", "line 1 is not a JSON object"),
        ("a.jsonl", b"\xff\xfe", "cannot be read as lines"),
        ("a.jsonl.gz", b"no gzip", "cannot be read as lines"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-12], "cannot be read as lines"),
        ("a.parquet", b"PAR1 nonsense", "cannot be read as Parquet"),
        ("a.jsonl", b"", "has no text"),
    ],
)
def test_damaged(tmp_path: Path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LongrollError, match=message):
        list(read_documents(tmp_path / name, split="all"))


def test_half_a_surrogate_pair(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}')
    assert list(read_documents(tmp_path / "a.jsonl", split="all")) == ["a?b"]


# every format in every compression


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
TEXTS = [f'row {i}, "quoted"\nü\t; {"z" * i}' for i in range(13)]


def rows_of(format: str) -> bytes:
    """TEXTS beside a number and an address, as a file of this format."""
    rows = [{"id": str(i), "url": f"http://{i}", "text": text} for i, text in enumerate(TEXTS)]
    if format == "jsonl":
        return "\n".join(map(json.dumps, rows)).encode()
    if format in ("array", "pretty"):
        return json.dumps(rows, indent=2 if format == "pretty" else None).encode()
    if format == "columns":
        return json.dumps({name: [row[name] for row in rows] for name in rows[0]}).encode()
    if format == "pandas":
        columns = {name: {str(i): row[name] for i, row in enumerate(rows)} for name in rows[0]}
        return json.dumps(columns).encode()
    if format == "parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    delimiter = {"csv": ",", "semicolons": ";", "tsv": "\t"}[format]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode()


FORMATS = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "array": (".json",),
    "pretty": (".json",),
    "columns": (".json",),
    "pandas": (".json",),
    "csv": (".csv",),
    "semicolons": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet",),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_in_every_compression(tmp_path: Path, format: str, compression: str):
    for suffix in FORMATS[format]:
        path = tmp_path / f"a{suffix}{compression}"
        path.write_bytes(COMPRESS[compression](rows_of(format)))
        assert list(read_documents(path, split="all")) == TEXTS
        assert list(read_documents(path, split="all", text_column="url")) == [
            f"http://{i}" for i in range(len(TEXTS))
        ]
        with pytest.raises(LongrollError, match=r"no column 'body'.*`text_column`"):
            list(read_documents(path, split="all", text_column="body"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("format", ["jsonl", "array", "csv"])
def test_byte_order_marks_tell_the_encoding_of_rows(tmp_path: Path, format: str, encoding: str):
    path = tmp_path / f"a{FORMATS[format][0]}"
    path.write_bytes(rows_of(format).decode().encode(encoding))
    assert list(read_documents(path, split="all", text_column="text")) == TEXTS


@pytest.mark.parametrize(("count", "end"), [(20, "c19"), (21, "c19, ...")])
def test_at_most_20_columns_are_named(tmp_path: Path, count: int, end: str):
    path = write_lines(tmp_path / "a.jsonl", [{f"c{i}": 0 for i in range(count)}])
    with pytest.raises(LongrollError) as error:
        list(read_documents(path))
    assert str(error.value).endswith(end)


def test_one_record_is_one_row(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps({"title": "t", "text": "the only one"}, indent=1))
    assert list(read_documents(tmp_path / "a.json", split="all")) == ["the only one"]


def test_cells_and_lines_of_any_size(tmp_path: Path):
    long = "word " * 200_000
    (tmp_path / "a.csv").write_text(f"id,text\n1,{long}\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": long}))
    for name in ("a.csv", "a.jsonl"):
        assert list(read_documents(tmp_path / name, split="all")) == [long]


def test_rows_without_text_are_counted(tmp_path: Path, caplog):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"body": "b"}, {"text": None}])
    assert list(read_documents(path, split="all")) == ["a"]
    assert "2 of 3 rows have no text in column 'text'" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[" * 100_000, "cannot be read as JSON"),
        ("a.jsonl", b'{"a":' * 100_000, "cannot be read as JSON"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        ("a.json", b'{"text": "a"', "is not JSON"),
        ("a.json", b'["a", "b"]', "no rows with named columns"),
        ("a.json", b"3", "no rows with named columns"),
        ("a.json", b'{"text": "a"}\n[1]\n', "line 2 is not a JSON object"),
        ("a.csv", b'id,text\n1,"never closed\n2,b\n', "cannot be read as a table"),
        ("a.csv", b"id,text\n1,a,b\n", "line 2 has 3 cells and the header 2"),
        ("a.csv", b"text,text\n1,a\n", "has 2 columns called 'text'"),
        ("a.csv", b"\xff\xfe\xfd", "cannot be read as a table"),
        ("a.csv.xz", lzma.compress(b"text\na\n" * 999)[:-20], "cannot be read as a table"),
        ("a.csv.bz2", bz2.compress(b"text\na\n" * 999)[:-20], "cannot be read as a table"),
        ("a.tsv.zst", pa.compress(b"text\na\n" * 999, codec="zstd", asbytes=True)[:-9], "cannot be read"),
        ("a.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), "name that ends in .gz"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "cannot be read as Parquet"),
        ("a.json", b"\0\0\0", "is not JSON"),
        ("a.tsv", b"", "has no text"),
        ("a.json", b" \n ", "has no text"),
    ],
)
def test_damaged_files_of_every_format(tmp_path: Path, name, content, message):
    (tmp_path / name).write_bytes(content)
    column = "text" if "called" in message else None
    with pytest.raises(LongrollError, match=message) as error:
        list(read_documents(tmp_path / name, split="all", text_column=column))
    assert "\n" not in str(error.value) and name in str(error.value)
