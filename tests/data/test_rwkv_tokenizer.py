"""Vocabulary files of RWKV World, against a plain search for the longest match."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longroll.data import RWKVTokenizer, load_tokenizer
from longroll.errors import LongrollError

WORDS = (" the", " quick", "\n\n", " state", "st", "sta", "ate", "é", " 東京", "🙂", "the state", "'\"", "\\")


def vocabulary(folder: Path, words=WORDS, name: str = "rwkv_vocab_v20230424.txt") -> Path:
    """All bytes and some words, as BlinkDL writes them: text as str, parts of characters as bytes."""
    lines = []
    for byte in range(256):
        literal = repr(chr(byte)) if byte < 128 else repr(bytes([byte]))
        lines.append(f"{byte + 1} {literal} 1")
    lines += [f"{257 + i} {word!r} {len(word.encode())}" for i, word in enumerate(words)]
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> RWKVTokenizer:
    return load_tokenizer(vocabulary(tmp_path_factory.mktemp("rwkv")))


def greedy(text: str) -> list[int]:
    tokens = {bytes([byte]): byte + 1 for byte in range(256)}
    tokens |= {word.encode(): 257 + i for i, word in enumerate(WORDS)}
    data, ids = text.encode(), []
    while data:
        size = max(size for size in range(1, 17) if data[:size] in tokens)
        ids.append(tokens[data[:size]])
        data = data[size:]
    return ids


@given(st.lists(st.sampled_from([*WORDS, *"stae qu\n", "日", "x"]), max_size=40).map("".join))
def test_the_longest_match_wins(tokenizer: RWKVTokenizer, text: str):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == greedy(text)
    assert tokenizer.decode(ids) == text and tokenizer.count_bytes(ids) == len(text.encode())


def test_id_0_ends_a_text(tmp_path: Path, tokenizer: RWKVTokenizer):
    assert tokenizer.separator_id == 0 and tokenizer.prefix_ids == ()
    assert (
        tokenizer.vocab_size == 257 + len(WORDS) and tokenizer.decode([0, *tokenizer.encode("a"), 0]) == "a"
    )
    assert load_tokenizer(vocabulary(tmp_path), bos=True).prefix_ids == (0,)


def test_a_vocabulary_with_an_id_0_has_no_separator(tmp_path: Path):
    (tmp_path / "v.txt").write_text("0 'a' 1\n1 'b' 1\n")
    tokenizer = load_tokenizer(tmp_path / "v.txt")
    assert tokenizer.separator_id is None and tokenizer.decode(tokenizer.encode("abba")) == "abba"
    with pytest.raises(LongrollError, match="`bos`"):
        load_tokenizer(tmp_path / "v.txt", bos=True)


def test_half_a_character_is_u_fffd(tokenizer: RWKVTokenizer):
    assert tokenizer.decode(tokenizer.encode("aé日")[:-1]).rstrip("\ufffd") == "aé"


def test_found_beside_the_model_before_code_is(tmp_path: Path):
    path = vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "model.pth").write_bytes(b"")
    for model in (tmp_path, str(tmp_path), tmp_path / "model.pth"):
        found = load_tokenizer(model_path=model, vocab_size=65_536)
        assert isinstance(found, RWKVTokenizer)
    found.save(tmp_path / "saved")
    saved = load_tokenizer(model_path=tmp_path / "saved")
    assert saved.encode(" the state").tolist() == found.encode(" the state").tolist() and path.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 'a'", "line 2"),
        ("1 'a' 2", "line 2"),
        ("x 'a' 1", "line 2"),
        ("-1 'a' 1", "line 2"),
        ("1 a 1", "line 2"),
        ("1 ['a'] 1", "line 2"),
        ("1 " + "(" * 5000 + " 1", "line 2"),
        ("7 'a' 1", "line 2"),
        ("no vocabulary", "line 2"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str):
    (tmp_path / "v.txt").write_text(f"7 'b' 1\n{line}\n")
    with pytest.raises(LongrollError, match=message):
        load_tokenizer(tmp_path / "v.txt")


def test_other_faults(tmp_path: Path):
    (tmp_path / "v.txt").write_text("7 'b' 1\n")
    with pytest.raises(LongrollError, match="no token for byte 0x61"):
        load_tokenizer(tmp_path / "v.txt").encode("ba")
    with pytest.raises(LongrollError, match="no token 9"):
        load_tokenizer(tmp_path / "v.txt").decode([9])
    for content in (b"", b"\xff\xfe"):
        (tmp_path / "w.txt").write_bytes(content)
        with pytest.raises(LongrollError, match=r"w\.txt"):
            load_tokenizer(tmp_path / "w.txt")


def test_found_in_a_hub_repository_before_its_code_is_run(tmp_path: Path, monkeypatch):
    path = vocabulary(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")

    def needs_code(*_, **told):
        assert not told["trust_remote_code"]
        raise ValueError("please pass the argument `trust_remote_code=True`")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", needs_code)
    monkeypatch.setattr("longroll.data._tokenizers.why_not_there", lambda *_: None)
    files = {("fla-hub/rwkv7", path.name): str(path)}
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, **_: files[name, file])
    found = load_tokenizer(model_path="fla-hub/rwkv7", vocab_size=65_536)
    assert isinstance(found, RWKVTokenizer) and found.encode(" the").tolist() == [257]
