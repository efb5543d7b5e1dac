from pathlib import Path

import numpy as np
import pytest
from corpora import make_corpus
from hypothesis import given
from hypothesis import strategies as st

from longroll.data import ByteTokenizer, Corpus, load_tokenizer
from longroll.errors import LongrollError


@given(st.lists(st.text(), min_size=1), st.integers(1, 50))
def test_documents_are_kept(texts: list[str], max_tokens: int):
    full = [text.encode() for text in texts if text]
    if not full:
        return
    corpus = Corpus.from_texts(texts, ByteTokenizer())
    assert [corpus.document(i).astype(np.uint8).tobytes() for i in range(corpus.documents)] == full
    assert corpus.tokens == corpus.bytes == len(b"".join(full)) and corpus.bytes_per_token == 1.0
    assert len(corpus.longest()) == max(map(len, full)) == corpus.lengths.max()
    assert corpus.max_id == max(b"".join(full))
    cut = Corpus.from_texts(texts, ByteTokenizer(), max_tokens=max_tokens)
    assert cut.ids.tolist() == corpus.ids[:max_tokens].tolist() and cut.bytes == cut.tokens
    assert (cut.lengths > 0).all() and cut.offsets[-1] == cut.tokens


def test_from_source_reads_no_more_than_asked():
    seen: list[tuple[int, int | None]] = []
    corpus = Corpus.from_source("stdlib", max_tokens=50_000, progress=lambda *now: seen.append(now))
    assert corpus.tokens == 50_000 and corpus.tokenizer == "bytes" and corpus.ids.dtype == np.int32
    assert seen[-1] == (50_000, 50_000) and len(seen) < 50
    again, other = (Corpus.from_source("stdlib", max_tokens=50_000, seed=seed) for seed in (0, 1))
    assert (corpus.ids == again.ids).all() and (corpus.ids != other.ids).any()


def test_progress_bar(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    assert Corpus.from_source(tmp_path, split="all", progress=True).tokens == 4


def test_a_huge_document_is_not_tokenised_for_its_beginning(bpe_folder: str):
    tokenizer = load_tokenizer(bpe_folder)
    text = "The sky is blue. Here we go. " * 2000
    whole = Corpus.from_texts([text], tokenizer)
    head = Corpus.from_texts([text], tokenizer, max_tokens=100)
    assert head.ids.tolist() == whole.ids[:100].tolist()
    assert head.bytes_per_token == pytest.approx(whole.bytes_per_token, rel=0.05)
    assert whole.bytes == len(text) and whole.separator_id == 0


def test_joined():
    corpus = make_corpus([[1, 2], [3], [4, 5]], separator_id=0)
    assert corpus.joined().tolist() == [1, 2, 0, 3, 0, 4, 5]
    assert corpus.joined(np.array([2, 0, 1])).tolist() == [4, 5, 0, 1, 2, 0, 3]
    assert make_corpus([[1, 2], [3]]).joined().tolist() == [1, 2, 3]
    assert make_corpus([[1, 2], [3]]).joined(np.array([1, 0])).tolist() == [3, 1, 2]


def test_document_indices():
    corpus = make_corpus([[1, 2], [3]])
    assert corpus.document(-1).tolist() == [3]
    with pytest.raises(IndexError):
        corpus.document(2)


def test_no_tokens():
    with pytest.raises(LongrollError, match="no tokens"):
        Corpus.from_texts([""], ByteTokenizer())
    with pytest.raises(LongrollError, match="`max_tokens` 0"):
        Corpus.from_texts(["a"], ByteTokenizer(), max_tokens=0)
