"""Held-out documents: a tenth of those with text, whatever lies between them and with whatever period."""

import json
from itertools import cycle, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longroll import LongrollError
from longroll.data import read_conversations, read_documents
from longroll.data._split import ONE_IN, deal, divide_documents, divide_files, side_of

EMPTY = st.sampled_from(["", " ", "\n\n", "\t"])
SIDES = ("train", "validation")


def sides(documents):
    return [list(divide_documents(documents, side)) for side in SIDES]


@given(
    pattern=st.lists(st.one_of(st.none(), EMPTY), min_size=1, max_size=30).filter(lambda p: None in p),
    count=st.integers(ONE_IN, 200),
)
def test_empty_documents_change_no_split(pattern, count):
    """`pattern` recurs: None stands for a document, a string for one without text."""
    whole = [f"document {i}" for i in range(count)]
    left, rows = iter(whole), []
    for one in cycle(pattern):
        text = one if one is not None else next(left, None)
        if text is None:
            break
        rows.append(text)
    train, validation = sides(rows)
    assert [train, validation] == sides(whole)
    assert sorted(train + validation) == sorted(whole)
    assert count // ONE_IN <= len(validation) <= -(-count // ONE_IN) and train


@given(period=st.integers(1, 60))
def test_no_period_falls_on_one_side(period):
    """The rows of each phase of a period lie on both sides, and about a tenth of them is held out."""
    count = 400 * period
    held = set(deal(range(count), "validation"))
    assert len(held) == count // ONE_IN
    for phase in range(period):
        rows = range(phase, count, period)
        assert 0.04 < len(held.intersection(rows)) / len(rows) < 0.18


@given(
    head=EMPTY,
    tail=st.lists(EMPTY).map("".join),
    inner=st.lists(st.sampled_from(["a", " ", "\n"]), max_size=200).map("".join),
    count=st.integers(1, ONE_IN - 1),
)
def test_few_documents_give_text_to_both_sides(head, tail, inner, count):
    """A document whose text spans ten characters or more has text on both sides, whatever surrounds it."""
    text = f"{head}begin{inner}ending{tail}"
    train, validation = sides([text, *[head] * 5] * count)
    assert len(train) == len(validation) == count
    assert all(a + b == text and a.strip() and b.strip() for a, b in zip(train, validation, strict=True))
    assert len(validation[0].rstrip()) == len(text.strip()) // ONE_IN


@pytest.mark.parametrize("period", [2, 3, 5, 10])
@pytest.mark.parametrize("blank", [0, -1])
def test_a_file_with_blank_rows_has_both_sides(period, blank, tmp_path):
    """Every row but one of a period is blank: no side is empty, and none is all."""
    rows = [{"text": f"row {i}" if i % period == blank % period else ""} for i in range(20 * period)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    train, validation = (list(read_documents(file, split=side)) for side in SIDES)
    assert len(train) == 18 and len(validation) == 2
    assert not set(train) & set(validation)


@pytest.mark.parametrize("content", [b" \n", b"", b"\xe9\xe8" * 99, b'[{"text": ""}]'])
def test_files_without_text_divide_no_folder(content, tmp_path):
    """Ten files of which those on one side hold no text: each of the others gives its own part."""
    held = [name for name in map("{}.json".format, range(400)) if side_of(name) == "validation"][:3]
    ending = ".json" if content.startswith(b"[") else ".txt"
    for name in held:
        (tmp_path / name).with_suffix(".json").write_bytes(content if ending == ".json" else b"[]")
    trained = [name for name in map("{}.txt".format, range(40)) if side_of(name) == "train"][:12]
    for name in trained:
        (tmp_path / name).write_text(name * 30)
    for name in [n for n in map("{}.txt".format, range(99)) if side_of(n) == "validation"][:3]:
        (tmp_path / name).write_bytes(content if ending == ".txt" else b"")
    files = sorted(tmp_path.iterdir())
    assert {part for _, part in divide_files(files, "validation")} == {"validation"}
    assert len(list(read_documents(tmp_path, split="validation"))) == 12


@pytest.mark.parametrize("count", [2, 5, 9, 10, 40])
def test_conversations_are_dealt_among_those_with_an_answer(count, tmp_path):
    asked = {"role": "user", "content": "?"}
    rows = []
    for i in range(count):
        rows += [[asked], [asked, {"role": "assistant", "content": str(i)}]]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    train, validation = (list(read_conversations(file, split=side)) for side in SIDES)
    assert len(validation) == max(1, count // ONE_IN) and len(train) + len(validation) == count
    assert not {talk[-1]["content"] for talk in train} & {talk[-1]["content"] for talk in validation}


def test_an_only_conversation_is_train(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "assistant", "content": "a"}]}))
    assert len(list(read_conversations(file, split="train"))) == 1
    with pytest.raises(LongrollError, match="a validation split wants two conversations"):
        list(read_conversations(file, split="validation"))


def test_documents_are_dealt_as_they_are_read():
    endless = (f"document {i}" for i in iter(int, 1))
    assert len(list(islice(divide_documents(endless, "validation"), 5))) == 5
