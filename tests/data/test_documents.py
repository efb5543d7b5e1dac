import gzip
import itertools
import lzma
import os
import re
from pathlib import Path

import pytest

from longroll.data import read_documents
from longroll.data._compressed import unreadable
from longroll.data._files import standard_library
from longroll.data._split import ONE_IN, divide_documents, side_of
from longroll.errors import LongrollError


def many_files(root: Path, count: int = 40) -> dict[str, str]:
    """Write `count` documents in nested folders; their texts by name."""
    written = {f"part{i}.txt": f"text number {i} ü\n" for i in range(count)}
    for i, (name, text) in enumerate(written.items()):
        folder = root / f"folder{i % 3}"
        folder.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text, encoding="utf-8")
    return written


# the standard library


def test_stdlib_is_read_whole_and_without_its_tests():
    paths = [file.as_posix() for file in standard_library()]
    assert len(paths) > 300
    assert any(path.endswith("/argparse.py") for path in paths)
    assert not any(
        re.search(r"/(site-packages|dist-packages|__pycache__|tests?|idle_test)/", path) for path in paths
    )
    assert paths == [file.as_posix() for file in standard_library()]


def test_stdlib_splits_do_not_overlap_and_follow_names():
    train, validation = (list(read_documents("stdlib", split=split)) for split in ("train", "validation"))
    everything = list(read_documents("stdlib", split="all"))
    assert len(train) + len(validation) == len(everything)
    assert 0.05 < len(validation) / len(everything) < 0.2
    assert sum(map(len, validation)) > 500_000
    argparse = next(file for file in standard_library() if file.name == "argparse.py")
    assert argparse.read_text(encoding="utf-8") in (
        train if side_of("argparse.py") == "train" else validation
    )


def test_the_side_of_a_name_never_changes():
    # written down once: another value here would mix up every split made before
    names = ("argparse.py", "typing.py", "__init__.py", "README.md", "case.py", "minidom.py", "_pydecimal.py")
    assert [name for name in names if side_of(name) == "validation"] == [
        "case.py",
        "minidom.py",
        "_pydecimal.py",
    ]


def test_stdlib_is_lazy():
    assert next(read_documents())


# folders


def test_folder_skips_what_is_not_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "noending").write_text("second")
    (tmp_path / "sub" / "bom.txt").write_bytes(b"\xef\xbb\xbfthird")
    (tmp_path / "binary.bin").write_bytes(b"abc\0def")
    (tmp_path / "latin.txt").write_bytes("ü".encode("latin-1") * 20)
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "spaces.txt").write_text(" \n\n")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert list(read_documents(tmp_path, split="all")) == ["first", "third", "second"]


def test_folder_is_divided_by_names(tmp_path: Path):
    written = many_files(tmp_path)
    for split in ("train", "validation"):
        expected = {text for name, text in written.items() if side_of(name) == split}
        assert expected and set(read_documents(tmp_path, split=split)) == expected
    moved = tmp_path / "elsewhere"  # the place of a file does not matter
    (tmp_path / "folder0").rename(moved)
    assert set(read_documents(str(tmp_path), split="validation")) == {
        text for name, text in written.items() if side_of(name) == "validation"
    }


def test_small_folder_gives_the_end_of_each_file(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a" * 90 + "b" * 10)
    (tmp_path / "b.txt").write_text("c" * 45 + "d" * 5)
    assert list(read_documents(tmp_path)) == ["a" * 90, "c" * 45]
    assert list(read_documents(tmp_path, split="validation")) == ["b" * 10, "d" * 5]


def test_files_of_one_name_give_the_end_of_each(tmp_path: Path):
    for i in range(12):
        (tmp_path / f"{i:02}").mkdir()
        (tmp_path / f"{i:02}" / "text.txt").write_text("t" * 9 + "v")
    assert list(read_documents(tmp_path, split="validation")) == ["v"] * 12


def test_seed_shuffles_files(tmp_path: Path):
    many_files(tmp_path)
    plain = list(read_documents(tmp_path, split="all"))
    shuffled = list(read_documents(tmp_path, split="all", seed=1))
    assert plain != shuffled == list(read_documents(tmp_path, split="all", seed=1))
    assert sorted(plain) == sorted(shuffled)


# single files, limits and lists


def test_one_file_is_one_document(tmp_path: Path):
    file = tmp_path / "book.md"
    file.write_text("é" * 95 + "\r\nend", encoding="utf-8", newline="")
    assert list(read_documents(file, split="all")) == ["é" * 95 + "\r\nend"]
    assert "".join(itertools.chain(*(read_documents(file, split=s) for s in ("train", "validation")))) == (
        "é" * 95 + "\r\nend"
    )


def test_several_sources_take_turns(tmp_path: Path):
    for name, count in (("a", 3), ("b", 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.txt").write_text(f"{name}{i}")
    sources = f"{tmp_path}/a, {tmp_path}/b"
    assert list(read_documents(sources, split="all")) == ["a0", "b0", "a1", "a2"]


def test_a_comma_in_a_name(tmp_path: Path):
    (tmp_path / "a,b.txt").write_text("one")
    assert list(read_documents(f"{tmp_path}/a,b.txt", split="all")) == ["one"]


# errors


@pytest.mark.parametrize(
    "source", ["nothing.txt", "/no/such/folder", "~/no/such/folder", "data/x.parquet", Path("x")]
)
def test_missing_is_said_at_once(source):
    with pytest.raises(LongrollError, match="no such file or folder"):
        read_documents(source)


@pytest.mark.parametrize("source", ["", " , "])
def test_empty_source(source):
    with pytest.raises(LongrollError, match="source of text is empty"):
        read_documents(source)


def test_binary_file(tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(b"\0\1\2")
    with pytest.raises(LongrollError, match="is not text"):
        read_documents(tmp_path / "model.bin")


@pytest.mark.parametrize("content", [b"", b"  \n", b"\xff\xfe\xfd"])
def test_no_text(tmp_path: Path, content: bytes):
    (tmp_path / "a.txt").write_bytes(content)
    for source in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(LongrollError, match=r"has no text( that can be read| \(split 'train'\))"):
            list(read_documents(source))


def test_a_long_file_is_divided_as_it_is_read():
    def documents():
        yield from map(str, range(ONE_IN))
        raise AssertionError("read on")

    assert next(divide_documents(documents(), "train")) == "1"


def test_wrong_split(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(LongrollError, match=r"'test' in local text.*train, validation, all"):
        read_documents(tmp_path, split="test")


# what is skipped


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder of which only `good.txt` and `damaged.txt` can be read."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "good.txt").write_text("good words " * 200)
    (folder / "damaged.txt").write_bytes(b"good words " * 200 + b"\x97")
    (folder / "latin.txt").write_bytes("naïve café ".encode("latin-1") * 90)
    (folder / "image.png").write_bytes(b"\x89PNG\0\0\0")
    (folder / "paper.pdf").write_bytes(b"%PDF-1.4\n")
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"words " * 5000)[:-12])
    (folder / "empty.txt").write_text(" ")
    (folder / "package.json").write_text('{"name": "a", "version": "1"}')
    (folder / "broken").symlink_to(folder / "nowhere")
    return folder


def test_what_is_skipped_is_counted_and_named(mixed: Path, caplog):
    texts = list(read_documents(mixed, split="all"))
    assert texts == ["good words " * 200 + "\ufffd", "good words " * 200]
    for said in (
        "7 files not read",
        "1 not UTF-8 (latin.txt: byte 0xef at 2)",
        "1 binary (image.png: NUL byte at 4)",
        "1 of a format that is not read (paper.pdf",
        "1 damaged (cut.txt.gz",
        "1 empty (empty.txt)",
        "1 without rows of text (package.json: does not say which column",
        "1 a broken link (broken",
        "read as U+FFFD (damaged.txt: 1)",
    ):
        assert said in caplog.text
    assert len(caplog.records) == 1 and "\n" not in caplog.records[0].getMessage()


def test_what_was_not_reached_is_not_blamed(mixed: Path, caplog):
    next(documents := read_documents(mixed, split="all"))
    documents.close()
    assert "latin" not in caplog.text


@pytest.mark.parametrize("where", ["file", "folder", "rows"])
def test_permissions_are_called_permissions(tmp_path: Path, monkeypatch, where):
    """The tests may run as root, whom no file forbids anything: opening refuses in its place."""
    path = tmp_path / ("a.jsonl" if where == "rows" else "a.txt")
    path.write_text("{}")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(LongrollError, match=r"no permission to read"):
        list(read_documents(tmp_path if where == "folder" else path, split="all"))


def test_a_folder_that_may_not_be_entered_is_named(tmp_path: Path, monkeypatch, caplog):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert list(read_documents(tmp_path, split="all")) == ["text"]
    assert "1 no permission to read (closed)" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_byte_order_marks_tell_the_encoding(tmp_path: Path, encoding: str, suffix: str):
    text = "naïve café 東京 🙂 " * 200
    compress = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(text.encode(encoding)))
    for source in (tmp_path, tmp_path / f"a.txt{suffix}"):
        assert list(read_documents(source, split="all")) == [text]


@pytest.mark.parametrize(
    ("encoding", "words", "damage"),
    [("utf-8", "a \ufffd b ", b"\x97"), ("utf-16", "\ubfef\xbd ", b"\x00\xd8")],
)
def test_only_what_is_not_in_the_encoding_counts_as_damage(tmp_path: Path, caplog, encoding, words, damage):
    """U+FFFD may stand in a text, and its bytes in UTF-8 are other characters in UTF-16."""
    (tmp_path / "a.txt").write_bytes((words * 300).encode(encoding) + damage)
    assert list(read_documents(tmp_path, split="all")) == [words * 300 + "\ufffd"]
    assert "read as U+FFFD (a.txt: 1)" in caplog.text


def test_a_short_text_with_a_tenth_of_damage_is_read(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"123456789\x97")
    assert list(read_documents(tmp_path / "a.txt", split="all")) == ["123456789\ufffd"]
    (tmp_path / "a.txt").write_bytes(b"12345678\x97")
    with pytest.raises(LongrollError, match="not UTF-8"):
        list(read_documents(tmp_path / "a.txt", split="all"))


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (OSError(5, "Input/output error"), "damaged (Input/output error)"),
        (EOFError("ended\nearly"), "damaged (ended early)"),
        (EOFError(), "damaged (EOFError)"),
    ],
)
def test_a_failed_read_says_what_it_says(problem: Exception, said: str):
    assert str(unreadable(problem)) == said


class TestTextColumn:
    """The flag is honoured or refused, never ignored."""

    def test_refused_where_there_are_no_columns(self, mixed: Path):
        with pytest.raises(LongrollError, match=r"`text_column` body: .*plain text"):
            read_documents(mixed / "good.txt", text_column="body")
        with pytest.raises(LongrollError, match=r"`text_column` body: stdlib is plain text"):
            read_documents("stdlib", text_column="body")
        (mixed / "package.json").unlink()
        with pytest.raises(LongrollError, match=r"`text_column` body: .*no file with columns"):
            read_documents(mixed, text_column="body")

    def test_of_a_folder_only_rows_are_read(self, tmp_path: Path, caplog):
        (tmp_path / "README.md").write_text("of the data")
        (tmp_path / "a.csv").write_text("id,body\n1,first\n2,second\n")
        assert list(read_documents(tmp_path, split="all", text_column="body")) == ["first", "second"]
        assert "1 without columns (README.md)" in caplog.text
        (tmp_path / "b.json").write_text('[{"other": "x"}]')
        with pytest.raises(LongrollError, match=r"b\.json has no column 'body'"):
            list(read_documents(tmp_path, split="all", text_column="body"))


def test_no_such_user(tmp_path: Path):
    with pytest.raises(LongrollError, match="no such file or folder"):
        read_documents("~nobody-of-this-name/text.txt")


@pytest.mark.parametrize("split", ["train", "validation", "all"])
def test_what_cannot_be_read_is_named_whichever_side_it_is_on(tmp_path: Path, caplog, split: str):
    many_files(tmp_path)
    bad = ["case.py", *(f"old{i}.txt" for i in range(11))]
    assert {side_of(name) for name in bad} == {"train", "validation"}
    for name in bad:
        (tmp_path / name).write_bytes("naïve café ".encode("latin-1") * 90)
    list(read_documents(tmp_path, split=split))
    assert "12 files not read: 12 not UTF-8 (" in caplog.text and len(caplog.records) == 1
