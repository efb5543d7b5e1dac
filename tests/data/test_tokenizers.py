import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longroll.data import ByteTokenizer, check_vocabulary, load_tokenizer
from longroll.errors import LongrollError


@given(st.text())
def test_bytes_round_trip(text: str):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == list(text.encode())
    assert (
        tokenizer.decode(ids)
        == tokenizer.decode(torch.from_numpy(ids))
        == tokenizer.decode(ids.tolist())
        == text
    )


def test_bytes_of_a_cut_character():
    assert ByteTokenizer().decode([97, 0xC3]) == "a\ufffd"
    with pytest.raises(LongrollError, match="not all bytes"):
        ByteTokenizer().decode([97, 256])


def test_hugging_face(bpe_folder: str, caplog):
    tokenizer = load_tokenizer(bpe_folder)
    text = "The sky is blue, ü and 日本. " * 40
    with caplog.at_level(logging.WARNING):
        ids = tokenizer.encode(text)
    assert not caplog.records  # longer than model_max_length, which is no concern here
    assert ids.dtype == np.int32 and 0 not in ids and ids.max() < tokenizer.vocab_size
    assert tokenizer.separator_id == 0
    assert tokenizer.decode(ids) == tokenizer.decode(torch.from_numpy(ids)) == text
    assert tokenizer.encode("").shape == (0,)


def test_tokenizer_json_alone(bpe_folder: str):
    folder, file = load_tokenizer(bpe_folder), load_tokenizer(Path(bpe_folder) / "tokenizer.json")
    assert file.encode("The sun").tolist() == folder.encode("The sun").tolist()


class TestChoice:
    def test_named(self, bpe_folder: str):
        assert isinstance(load_tokenizer("bytes", model_path=bpe_folder, vocab_size=5000), ByteTokenizer)

    def test_beside_the_model(self, bpe_folder: str):
        assert load_tokenizer(model_path=bpe_folder, vocab_size=256).name == bpe_folder
        assert load_tokenizer(None, model_path=Path(bpe_folder)).vocab_size > 256

    def test_beside_a_model_transformers_does_not_know(self, bpe_folder: str, tmp_path: Path):
        (tmp_path / "tokenizer.json").write_bytes((Path(bpe_folder) / "tokenizer.json").read_bytes())
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "rosa", "architectures": ["Rosa"]}))
        assert load_tokenizer(model_path=tmp_path).encode("The sun").size

    def test_bytes_if_the_vocabulary_fits(self, tmp_path: Path):
        assert isinstance(load_tokenizer(model_path=tmp_path, vocab_size=256), ByteTokenizer)
        assert isinstance(load_tokenizer(vocab_size=256), ByteTokenizer)

    def test_none(self, tmp_path: Path):
        with pytest.raises(LongrollError, match=r"no tokenizer beside the model.*`name_or_path`"):
            load_tokenizer(model_path=tmp_path, vocab_size=257)
        with pytest.raises(LongrollError, match="`name_or_path`"):
            load_tokenizer()


class TestErrors:
    def test_damaged(self, tmp_path: Path):
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(LongrollError, match="cannot be loaded"):
            load_tokenizer(str(tmp_path))

    def test_code_is_never_run(self, bpe_folder: str, tmp_path: Path):
        (tmp_path / "tokenizer_config.json").write_text(
            '{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}'
        )
        (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
        with pytest.raises(LongrollError, match="does not run"):
            load_tokenizer(tmp_path)

    def test_code_is_run_when_asked(self, bpe_folder: str, tmp_path: Path, monkeypatch):
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        for path in Path(bpe_folder).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "tokenizer_config.json").write_text(
            '{"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "eos_token": "<end>"}'
        )
        (tmp_path / "own.py").write_text(
            "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n"
        )
        found = load_tokenizer(tmp_path, trust_remote_code=True)
        assert type(found.tokenizer).__name__ == "Own" and found.separator_id == 0

    def test_missing(self, monkeypatch):
        from huggingface_hub import constants

        with pytest.raises(LongrollError, match="no such file or folder"):
            load_tokenizer(Path("no/such/folder"))
        with pytest.raises(LongrollError, match="not a name the hub could have"):
            load_tokenizer("/no/such/folder")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(LongrollError, match="cannot be loaded"):
            load_tokenizer("some/model")


def test_check_vocabulary():
    check_vocabulary(255, 256)
    with pytest.raises(LongrollError, match=r"gpt gives id 256, the model has 256 entries.*`tokenizer`"):
        check_vocabulary(256, 256, tokenizer="gpt")
