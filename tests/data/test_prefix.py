"""What the tokenizer puts at a beginning stands at the beginning of every document, once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longroll.data import (
    ByteTokenizer,
    Corpus,
    HFTokenizer,
    Lanes,
    Windows,
    bytes_per_token,
    load_tokenizer,
    long_sequences,
)
from longroll.errors import LongrollError
from tokenizer_kinds import LINES, trained

BOS = 0
TEXTS = [f"{LINES[i % 2]} {i} {LINES[0]}" * (1 + i) for i in range(5)]


def tokenizer_of(kind: str = "bytes", bos: bool | None = None, **told) -> HFTokenizer:
    told = {"bos": "<s>", "eos": "</s>", "add_bos": True} | told
    return HFTokenizer(trained(kind, **told), kind, bos=bos)


class TestChoice:
    @pytest.mark.parametrize("kind", ["bytes", "prefix space", "sentencepiece"])
    def test_default_is_what_the_tokenizer_does(self, kind):
        for adds in (True, False):
            tokenizer = tokenizer_of(kind, add_bos=adds)
            whole = tokenizer.tokenizer("The sky")["input_ids"]
            assert [*tokenizer.prefix_ids, *tokenizer.encode("The sky").tolist()] == whole
            assert tokenizer.prefix_ids == ((BOS,) if adds else ())

    @pytest.mark.parametrize("adds", [True, False])
    def test_the_flag_decides(self, adds):
        assert tokenizer_of(bos=True, add_bos=adds).prefix_ids == (BOS,)
        assert tokenizer_of(bos=False, add_bos=adds).prefix_ids == ()

    def test_the_flag_is_refused_where_there_is_no_bos(self, tmp_path: Path):
        with pytest.raises(LongrollError, match=r"`bos`: .* no BOS token"):
            HFTokenizer(trained("bytes"), "t", bos=True)
        for named in ("bytes", None):
            with pytest.raises(LongrollError, match=r"`bos`: the tokens are bytes"):
                load_tokenizer(named, vocab_size=256, bos=True)
        assert load_tokenizer("bytes", bos=False).prefix_ids == ()

    def test_eos_is_no_beginning(self):
        from tokenizers import processors

        made = trained("bytes", bos="<s>", eos="</s>")
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", made.eos_token_id)]
        )
        assert HFTokenizer(made, "t").prefix_ids == ()


def test_every_document_begins_with_it_once():
    with_bos, without = (Corpus.from_texts(TEXTS, tokenizer_of(bos=bos)) for bos in (True, False))
    assert with_bos.prefix_ids == (BOS,) and with_bos.bytes == without.bytes
    for i in range(with_bos.documents):
        assert with_bos.document(i).tolist() == [BOS, *without.document(i).tolist()]
    joined = with_bos.joined()
    assert (joined == BOS).sum() == with_bos.documents
    assert with_bos.joined(prefix=False).tolist() == without.joined().tolist()


@given(max_tokens=st.integers(1, 90))
def test_a_limit_counts_it(max_tokens: int):
    tokenizer = ByteTokenizer()
    tokenizer.prefix_ids = (7, 7, 7)  # never in these texts
    texts = ["abc", "defgh", "", "ijklmnopqr" * 20]
    whole = Corpus.from_texts(texts, tokenizer)
    cut = Corpus.from_texts(texts, tokenizer, max_tokens=max_tokens)
    assert cut.ids.tolist() == whole.ids[:max_tokens].tolist()


@pytest.mark.parametrize("concatenate", [True, False])
@pytest.mark.parametrize("length", [20, 40, 77])
def test_every_measured_sequence_begins_with_it(length: int, concatenate: bool):
    corpora = [Corpus.from_texts(TEXTS, tokenizer_of(bos=bos)) for bos in (True, False)]
    sequences, plain = (long_sequences(corpus, length, 6, concatenate=concatenate) for corpus in corpora)
    assert sequences.shape == plain.shape == (6, length + 1)
    assert (sequences[:, 0] == BOS).all()
    if not concatenate:
        assert (sequences[:, 1:] != BOS).all()
        assert torch.equal(sequences[0, 1:], plain[0, :-1])


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    length=st.integers(1, 9),
    lanes=st.integers(1, 4),
)
def test_lanes_predict_every_token_once_and_start_with_it(sizes, length, lanes):
    ids = iter(range(10, 10_000))
    documents = [[1, *(next(ids) for _ in range(size))] for size in sizes]
    flat = np.array([id for document in documents for id in document], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    data = Lanes(Corpus(flat, offsets, 0, None, "", (1,)), length, lanes)
    predicted = []
    for item in (data[i] for i in range(len(data))):
        labels = item["shift_labels"][item["shift_labels"] >= 0].tolist()
        predicted += labels
        if item["starts"] and labels:
            assert item["input_ids"][0] == 1
    assert sorted(predicted) == sorted(id for document in documents for id in document[1:])


def test_windows_hold_it_once_a_document():
    corpus = Corpus.from_texts(TEXTS, tokenizer_of())
    data = Windows(corpus, 16)
    seen = sum(int((data[i]["input_ids"] == BOS).sum()) for i in range(len(data)))
    last = corpus.joined()[len(data) * 16 :]
    assert seen + int((last == BOS).sum()) == corpus.documents


def test_bits_per_byte_are_those_of_the_measured_texts():
    """Two kinds of text whose tokens stand for different numbers of bytes: only the measured kind counts."""
    for bos in (True, False):
        tokenizer = tokenizer_of(bos=bos)
        long, short = LINES[0] * 8, "東京 " * 400
        corpus = Corpus.from_texts([long, *["東京 "] * 400], tokenizer)
        length = len(tokenizer.encode(long)) + bos - 1
        sequences = long_sequences(corpus, length, 1)
        first = 0 if bos else len(tokenizer.decode(sequences[0, :1]).encode())
        expected = (len(long.encode()) - first) / length
        assert bytes_per_token(sequences, tokenizer) == pytest.approx(expected)
        assert corpus.bytes_per_token != pytest.approx(expected, rel=0.1) and short
    tokens = torch.randint(256, (3, 65))
    assert bytes_per_token(tokens, ByteTokenizer()) == 1.0
