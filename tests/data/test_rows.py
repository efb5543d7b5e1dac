import gzip
import json
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
    assert list(read_documents(path, split="validation")) == [everything[i] for i in (9, 19, 29)]
    assert list(read_documents(str(path))) == [text for i, text in enumerate(everything) if i % 10 != 9]
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
        with pytest.raises(LongrollError, match=r"--text-column; it has title, body"):
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
    assert list(read_documents(tmp_path, split="validation")) == ["p9", "p19", "j9"]


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
