"""Tokenizer files damaged at random: they open and work, or one line says what is wrong; never bytes."""

from pathlib import Path

import numpy as np
import pytest
from test_rwkv_tokenizer import vocabulary

from damage import damaged
from longroll.data import ByteTokenizer, RWKVTokenizer, load_tokenizer
from longroll.data.hf_tokenizer import is_fault
from longroll.errors import LongrollError
from tokenizer_kinds import trained

KINDS = ("bytes", "sentencepiece", "words", "rwkv")
FEW = 25


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """Folders of whole tokenizers by kind."""
    folders = {}
    for kind in KINDS:
        folders[kind] = tmp_path_factory.mktemp(kind.replace(" ", "_"))
        if kind == "rwkv":
            vocabulary(folders[kind])
        else:
            made = trained(kind, bos="<s>", eos="</s>", add_bos=True)
            made.chat_template = "{{ bos_token }}{{ messages[0].content }}"
            made.save_pretrained(folders[kind])
    return folders


def test_a_panic_of_rust_is_a_fault_and_an_interrupt_is_none():
    panic = type("PanicException", (BaseException,), {})  # as pyo3 raises it
    assert is_fault(panic()) and is_fault(ValueError()) and not is_fault(KeyboardInterrupt())


def use(folder: Path) -> None:
    """Open a tokenizer and call all of it."""
    tokenizer = load_tokenizer(model_path=folder, vocab_size=256)
    assert not isinstance(tokenizer, ByteTokenizer)
    for text in ("The sky is blue.\n\n123 é 東京 🙂", "", " "):
        for ids in (tokenizer.encode(text), tokenizer.encode_inside(text)):
            assert ids.dtype == np.int32
            assert isinstance(tokenizer.decode(ids), str) and isinstance(tokenizer.decode_inside(ids), str)
            assert tokenizer.count_bytes(ids) >= 0
    assert isinstance(tokenizer.prefix_ids, tuple) and tokenizer.vocab_size >= 0
    if not isinstance(tokenizer, RWKVTokenizer):  # which has none
        tokenizer.chat_frame()


def try_damage(folder: Path, copy: Path, seed: int) -> str:
    """Damage one file of a copy and use it; what was said, or "" if nothing."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        (copy / path.name).write_bytes(path.read_bytes())
    victim = files[seed % len(files)]
    (copy / victim.name).write_bytes(damaged(victim.read_bytes(), seed))
    try:
        use(copy)
    except LongrollError as problem:
        assert "\n" not in str(problem)
        return f"{problem}"
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_one_line_or_works(whole, tmp_path: Path, kind: str):
    said = [try_damage(whole[kind], tmp_path, seed) for seed in range(FEW)]
    assert any(said)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_damaged_files(whole, tmp_path: Path, kind: str):
    said = [try_damage(whole[kind], tmp_path, seed) for seed in range(200)]
    assert sum(map(bool, said)) > 50


def test_a_tokenizer_that_does_not_load_is_no_reason_for_bytes(whole, tmp_path: Path):
    for path in whole["bytes"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(LongrollError, match="cannot be loaded"):
        load_tokenizer(model_path=tmp_path, vocab_size=256)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(LongrollError, match=r"cannot be loaded|damaged"):
        load_tokenizer(model_path=tmp_path, vocab_size=256)
