import itertools
import re
from pathlib import Path

import pytest

from longroll.data import read_documents
from longroll.data._files import standard_library
from longroll.data._split import side_of
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


def test_limit_stops_after_whole_documents(tmp_path: Path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("ü" * 10, encoding="utf-8")  # 20 bytes
    assert len(list(read_documents(tmp_path, split="all", limit_bytes=41))) == 3
    assert len(list(read_documents(tmp_path, split="all", limit_bytes=40))) == 2
    assert list(read_documents(tmp_path, split="all", limit_bytes=0)) == []


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
        with pytest.raises(LongrollError, match="has no text"):
            list(read_documents(source))


def test_wrong_split(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(LongrollError, match=r"'test' in local text.*train, validation, all"):
        read_documents(tmp_path, split="test")
