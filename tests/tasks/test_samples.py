"""Samples: exact lengths, depths, the same by seed, and the wording of the sources."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longroll.data import ByteTokenizer, Corpus, HFTokenizer, read_documents
from longroll.errors import LongrollError
from longroll.tasks import (
    BABILong,
    Copying,
    Niah,
    Passkey,
    Story,
    TextHaystack,
    copying_tokenizer,
    passkey,
    read_stories,
)
from longroll.tasks.babi import stories_of
from longroll.tasks.babilong import QAS, split_sentences
from longroll.tasks.babilong_prompts import LABELS, own_prompt
from longroll.tasks.haystack import NOISE

BYTES = ByteTokenizer()
SENTENCES = (
    "The sea was as calm that night as a pond in a garden. Nobody in the house knew why the lamp had gone "
    "out! Was it the wind that came through the open window of the hall? It grew dark and cold long before "
    "the morning. "
)
BOOKS = [SENTENCES * 40]
STORIES = [
    Story(("Mary moved to the bathroom.", "John went to the hallway."), "Where is Mary?", "bathroom"),
    Story(("Daniel went back to the hallway.",) * 3, "Where is Daniel?", "hallway"),
]


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE trained on text like that of the tasks, as GPT-NeoX's is on other text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokens.train_from_iterator([NOISE, *BOOKS, *map(own_prompt, QAS)], trainer)
    return HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokens), "bpe")


def tasks(tokenizer):
    corpus = Corpus.from_texts(BOOKS, tokenizer)
    return {
        "passkey": Passkey(tokenizer),
        "passkey in text": Passkey(tokenizer, haystack=TextHaystack(corpus, "books"), instruction=False),
        "niah": Niah(tokenizer, new_tokens=16),
        "babilong": BABILong(tokenizer, "qa1", STORIES, BOOKS),
        "babilong short": BABILong(tokenizer, "qa1", STORIES, BOOKS, few_shot=False),
    }


@pytest.mark.parametrize("name", tasks(BYTES))
@given(length=st.integers(2_000, 9_000), seed=st.integers(0, 99))
def test_length_is_met_and_the_seed_decides(name, length, seed):
    task = tasks(BYTES)[name]
    sample, again, other = (task.sample(length, rng=np.random.default_rng(s)) for s in (seed, seed, seed + 1))
    total = len(sample.tokens) if name != "niah" else len(sample.prompt) + 16
    assert total == length or (name == "niah" and length - len(NOISE) - 1 <= total <= length)
    assert np.array_equal(sample.tokens, again.tokens) and not np.array_equal(sample.tokens, other.tokens)
    if "babilong" not in name:
        assert BYTES.decode(sample.prompt).count(sample.target) == (2 if "passkey" in name else 1)


@pytest.mark.parametrize("name", tasks(BYTES))
def test_pieces_tokenise_as_the_text_they_make(name, bpe):
    task = tasks(bpe)[name]
    for seed in range(5):
        sample = task.sample(2_500, rng=np.random.default_rng(seed))
        text = bpe.decode(sample.tokens)
        again = bpe.encode(text)
        # only where a haystack is cut inside a word may the pieces differ from the whole
        assert abs(len(again) - len(sample.tokens)) <= 4
        assert len(text) > 1.5 * len(again)


@pytest.mark.parametrize("name", ["passkey", "passkey in text", "niah"])
def test_depth_is_where_the_needle_stands(name):
    task = tasks(BYTES)[name]
    places = []
    for depth in (0.0, 0.25, 0.5, 1.0):
        sample = task.sample(8_000, depth=depth, rng=np.random.default_rng(0))
        start, stop = sample.context
        places.append(BYTES.decode(sample.prompt[start:stop]).index(sample.target) / (stop - start))
        assert abs(places[-1] - depth) < 0.03
    assert places == sorted(places)


def test_a_length_that_is_too_short_is_named():
    for task in tasks(BYTES).values():
        with pytest.raises(LongrollError, match=r"length 40: .* takes at least .*`length`"):
            task.sample(40, rng=np.random.default_rng(0))


def test_passkey_is_built_as_in_the_source():
    """Description, noise, needle, noise, question, a line each."""
    sample = Passkey(BYTES).sample(600, depth=0.5, rng=np.random.default_rng(1))
    first, before, needle, after, question = BYTES.decode(sample.prompt).split("\n")
    assert first + "\n" == passkey.INSTRUCTION and question == f"{passkey.QUESTION[1:]} {passkey.CUE}"
    assert (NOISE + " " + NOISE + " " + NOISE).startswith(before) and before.startswith(after[:60])
    assert f"\n{needle}\n" == passkey.NEEDLE.format(key=sample.target)
    assert 10_000 <= int(sample.target) <= 99_999 and BYTES.decode(sample.answer) == f" {sample.target}"


def test_niah_is_built_as_in_the_source():
    """A description, lines of noise with the needle among them, the question and the start of its answer."""
    task = Niah(BYTES)
    sample = task.sample(4096, rng=np.random.default_rng(1))
    lines = BYTES.decode(sample.prompt).split("\n")
    needle = next(line for line in lines if sample.target in line)
    key = needle.split(" belongs to ")[1].split(" is ")[0]
    assert needle + "\n" == task.words.needle.format(key=key, value=sample.target) and len(sample.target) == 7
    assert lines[0] + "\n" == task.words.instruction and set(lines[1:-1]) == {NOISE, needle}
    assert lines[-1] == f"{task.words.question} {task.words.cue}".format(key=key)
    assert task.score(sample, BYTES.encode(f" {sample.target}, of course")) == {"accuracy": 1.0}
    assert task.score(sample, BYTES.encode(f" {sample.target[:-1]}")) == {"accuracy": 0.0}


def test_babilong_scatters_the_facts_in_order():
    task = BABILong(BYTES, "qa1", STORIES[:1], BOOKS)
    gaps = set()
    for seed in range(40):
        sample = task.sample(5_000, rng=np.random.default_rng(seed))
        start, stop = sample.context
        text = BYTES.decode(sample.prompt[start:stop])
        places = [text.index(f" {fact}") for fact in STORIES[0].facts]
        assert places == sorted(places)
        gaps.add(places[0])
        for fact in STORIES[0].facts:
            text = text.replace(f" {fact}", "", 1)
        assert set(split_sentences(text)[:-1]) <= set(split_sentences(BOOKS[0]))  # the last is cut to fit
    assert len(gaps) > 15


def test_books_without_sentences_are_refused():
    task = BABILong(BYTES, "qa1", STORIES, ["No. Yes. No. " * 100], few_shot=False)
    with pytest.raises(LongrollError, match="`books`"):
        task.sample(900, rng=np.random.default_rng(0))


def test_babilong_without_books_is_the_story():
    sample = BABILong(BYTES, "qa1", STORIES[:1], few_shot=False).sample(0, rng=np.random.default_rng(0))
    expected = " Mary moved to the bathroom. John went to the hallway.\nQuestion: Where is Mary?\nAnswer:"
    assert BYTES.decode(sample.prompt) == expected and BYTES.decode(sample.answer) == " bathroom."


def test_stories_come_with_all_facts_so_far_and_no_questions(tmp_path: Path):
    lines = [
        "1 A is in b.",
        "2 C is in d.",
        "3 Where is A? \tb\t1",
        "4 A is in e.",
        "5 Where is A? \te\t4",
        "1 F is in g.",
    ]
    (tmp_path / "en-10k").mkdir()
    file = tmp_path / "en-10k" / "qa1_single-supporting-fact_test.txt"
    file.write_text("\n".join([*lines, "2 Where is F? \tg\t1", ""]))
    assert read_stories(tmp_path, "qa1") == [
        Story(("A is in b.", "C is in d."), "Where is A?", "b"),
        Story(("A is in b.", "C is in d.", "A is in e."), "Where is A?", "e"),
        Story(("F is in g.",), "Where is F?", "g"),
    ]
    with pytest.raises(LongrollError, match="qa2"):
        read_stories(tmp_path, "qa2")
    file.write_text("A story without numbers.\n")
    with pytest.raises(LongrollError, match="line 1"):
        read_stories(tmp_path, "qa1")


def test_stories_of_the_published_dataset():
    row = {"input": "A is in b. C went to d.", "question": "Where is A? ", "target": "b"}
    assert stories_of([row]) == [Story(("A is in b.", "C went to d."), "Where is A?", "b")]
    with pytest.raises(LongrollError, match=r"`source` RMT-team/none .* hub"):  # offline, or no such name
        read_stories("RMT-team/none", "qa1")


@pytest.mark.parametrize("qa", QAS)
def test_the_examples_answer_as_the_metric_reads(qa):
    """The answer of each example stands in its text or question, and no label of the task anywhere."""
    prompt = own_prompt(qa)
    examples = prompt.split("Text:")[1:-1]
    assert len(examples) == 2 and prompt.endswith("Text:{context}\nQuestion: {question}\nAnswer:")
    for example in examples:
        asked, answer = example.strip().rsplit("\nAnswer: ", 1)
        assert answer.endswith(".") and answer.count(" ") == 0 and answer[:-1] in asked
        assert not any(label in example.lower() for label in LABELS[qa])


def test_copying_has_the_tokens_of_the_source():
    letters = HFTokenizer(copying_tokenizer(), "copying")
    assert letters.encode("az$|.*").tolist() == [0, 25, 26, 27, 28, 29] and letters.vocab_size == 30
    for tokenizer in (letters, BYTES):
        task = Copying(tokenizer)
        sample = task.sample(50, rng=np.random.default_rng(0))
        assert (
            tokenizer.decode(sample.tokens) == f"${sample.target}|{sample.target}."
            and len(sample.target) == 50
        )
        assert tokenizer.decode(np.array([task.stop_id])) == "."


def test_copying_is_scored_as_in_the_source():
    task = Copying(BYTES)
    sample = task.sample(10, rng=np.random.default_rng(0))
    right, wrong = sample.answer[:-1].copy(), sample.answer[:-1].copy()
    wrong[3] = BYTES.encode("|")[0]
    whole = {"string": 1.0, "character": 1.0}
    assert task.score(sample, right, sample.answer) == {
        f"{h}_{s}": v for h in ("forced", "free") for s, v in whole.items()
    }
    assert task.score(sample, right[:5], np.append(wrong, 0)) == {
        "forced_string": 0.0,
        "forced_character": 0.9,
        "free_string": 0.0,
        "free_character": 0.5,
    }
    assert task.score(sample, right[:0], sample.answer)["free_character"] == 0.0


def test_a_tokenizer_without_letters_is_refused(bpe):
    words = HFTokenizer(bpe.tokenizer, "bpe")
    words.encode = lambda text: bpe.encode(text + text)
    with pytest.raises(LongrollError, match="token for each letter"):
        Copying(words)


def test_any_text_can_be_the_haystack(tmp_path: Path):
    (tmp_path / "a.txt").write_text(BOOKS[0])
    corpus = Corpus.from_texts(read_documents(tmp_path, split="all"), BYTES)
    short = TextHaystack(corpus, "text")
    before, after = short.around(
        3 * corpus.tokens, 10, np.random.default_rng(0)
    )  # longer than the text: again
    assert len(before) == 3 * corpus.tokens and len(after) == 10
    assert np.array_equal(before[: corpus.tokens], before[corpus.tokens : 2 * corpus.tokens])
