import logging

import pytest
import torch
from corpora import distinct, make_corpus

from longroll.data import long_sequences
from longroll.errors import LongrollError


def test_beginnings_of_long_documents():
    documents = distinct([11, 10, 25, 11, 3])
    found = long_sequences(make_corpus(documents), 10, 3)
    assert found.shape == (3, 11) and found.dtype == torch.int64
    assert sorted(found[:, 0].tolist()) == sorted(documents[i][0] for i in (0, 2, 3))
    assert all((row.diff() == 1).all() for row in found)
    assert (long_sequences(make_corpus(documents), 10, 3, seed=0) == found).all()


def test_further_pieces_only_if_needed():
    corpus = make_corpus(distinct([11, 40]))
    assert sorted(long_sequences(corpus, 10, 2)[:, 0].tolist()) == [1, 12]
    assert sorted(long_sequences(corpus, 10, 4)[:, 0].tolist()) == [1, 12, 23, 34]


def test_concatenated():
    documents = distinct([4, 3, 5])
    found = long_sequences(make_corpus(documents, separator_id=0), 4, 2, concatenate=True, seed=1)
    assert found.shape == (2, 5)
    text = found.flatten().tolist()
    assert 0 in text
    whole = [[*map(int, part.split())] for part in " ".join(map(str, text)).split(" 0 ")]
    assert all(part in [document[: len(part)] for document in documents] for part in whole)


def test_fewer_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="longroll"):
        found = long_sequences(make_corpus(distinct([11, 12, 5])), 10, 6)
    assert found.shape == (2, 11)
    assert "asked for 6 sequences of 10 tokens" in caplog.text and "going on with 2" in caplog.text


def test_too_little():
    corpus = make_corpus(distinct([11, 5]))
    message = (
        "asked for 2 sequences of 10 tokens.* 1 of 2 documents.* longest has 11 .*`length`.*`concatenate`"
    )
    with pytest.raises(LongrollError, match=message):
        long_sequences(corpus, 10, 2)
    with pytest.raises(LongrollError, match="or give more text") as error:
        long_sequences(corpus, 10, 2, concatenate=True)
    assert "--concatenate" not in str(error.value)
    assert long_sequences(corpus, 10, 1).shape == (1, 11)
    with pytest.raises(LongrollError, match="at least 1"):
        long_sequences(corpus, 0, 1)
