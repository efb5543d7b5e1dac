"""Recipes: which intervention a text asks for, and what is given over what a recipe says."""

import dataclasses

import numpy as np
import pytest
import torch

import longroll
import zoo
from longroll.data import ByteTokenizer, Corpus, DocumentLengths, Lanes, Windows
from longroll.errors import LongrollError
from longroll.interventions.recipes import LONG_SHARE, RECIPES, WINDOWS, Settings, choose, enough_tokens
from longroll.measure.advice import advise
from longroll.measure.iid import IIDTest
from longroll.measure.stationarity import EndDrift
from longroll.state import StateKey
from longroll.tasks import Passkey, TaskRows
from longroll.training import PosttrainOptions, by_recipe

T, ROWS = 16, 2
KEY = StateKey(0, "recurrent")
IID = IIDTest({KEY: torch.tensor([9.0])}, {KEY: torch.tensor([10.0])})
LONG, SHORT = WINDOWS * T, WINDOWS * T - 1


def documents(*lengths: int) -> Corpus:
    return Corpus.from_texts(["a" * length for length in lengths], ByteTokenizer())


@pytest.mark.parametrize("seed", range(5))
def test_long_documents_are_those_of_enough_windows(seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 4 * LONG, size=random.integers(40, 80))
    share = lengths[lengths >= LONG].sum() / lengths.sum()
    expected = "tbptt" if share >= LONG_SHARE else "sp"
    assert choose("longroll", lengths, T, ROWS).intervention == expected
    assert choose("paper", lengths, T, ROWS).intervention == "sp"


@pytest.mark.parametrize(
    ("lengths", "lanes", "intervention"),
    [
        ([LONG] * 8, 2, "tbptt"),
        ([SHORT] * 80, 2, "sp"),
        ([LONG] * 8, 9, "sp"),  # a lane has fewer windows than a long document
        ([10 * LONG] + [SHORT] * 10, 2, "tbptt"),
        ([10 * LONG] + [SHORT] * 11, 2, "sp"),
    ],
)
def test_short_documents_and_little_text_ask_for_state_passing(lengths, lanes, intervention):
    found = choose("longroll", np.array(lengths), T, lanes)
    assert found.intervention == intervention, found.why


@pytest.mark.parametrize("seed", range(30))
def test_the_documents_of_a_text_decide_and_not_the_steps(seed):
    """The corpus of a command ends in the midst of a document, where the run has read enough."""
    random = np.random.default_rng(seed)
    kinds = [random.integers(LONG, 3 * LONG, 8), random.integers(2, LONG, 40)]
    lengths = random.permutation(np.concatenate(random.permutation(np.array(kinds, dtype=object))))
    texts, lm = ["a" * int(length) for length in lengths], zoo.lm_of("mamba2")
    counted = DocumentLengths.count(texts, ByteTokenizer(), enough_tokens(T, ROWS))
    assert counted.whole and counted.tokens.tolist() == list(lengths)
    expected = choose("longroll", lengths, T, ROWS)
    advised = advise("m", T, documents=counted, iid=IID, ends=EndDrift(0.0, 0.5), tokens_per_second=1.0)
    assert advised.intervention == expected.intervention and expected.why in advised.sentence
    for steps in (1, 2, 4, 16, 500):
        options = PosttrainOptions(T, steps=steps, batch_size=ROWS)
        corpus = Corpus.from_texts(texts, ByteTokenizer(), max_tokens=options.tokens + 1)
        found = by_recipe(lm, corpus, options, documents=counted)
        assert found.name == expected.intervention and expected.why in found.sentence
        alone = by_recipe(lm, corpus, options).sentence
        assert "too few for" not in alone, alone


def test_a_text_too_small_for_the_rows_gets_state_passing_however_few_the_steps():
    texts = ["a" * LONG] * 4
    counted = DocumentLengths.count(texts, ByteTokenizer(), enough_tokens(T, 5))
    for steps in (1, 500):
        options = PosttrainOptions(T, steps=steps, batch_size=5)
        corpus = Corpus.from_texts(texts, ByteTokenizer(), max_tokens=options.tokens + 1)
        found = by_recipe(zoo.lm_of("mamba2"), corpus, options, documents=counted)
        assert found.name == "sp" and "gives each of 5 rows 12.8 windows" in found.sentence


def test_a_corpus_that_was_cut_stands_for_a_longer_text_unless_it_is_read_again():
    text = ["a" * 100, "b" * 5_000]
    for steps, whole in ((5, False), (500, True)):
        corpus = Corpus.from_texts(text, ByteTokenizer(), max_tokens=5 * ROWS * T)
        options = PosttrainOptions(T, steps=steps, batch_size=ROWS)
        found = DocumentLengths.of(corpus, options.tokens)
        assert found.whole == whole and found.tokens.tolist() == [100, 60 if whole else 5_000]
        assert by_recipe(zoo.lm_of("mamba2"), corpus, options).name == ("sp" if whole else "tbptt")
    uncut = Corpus.from_texts(text, ByteTokenizer())
    assert uncut.rest is None and DocumentLengths.of(uncut, 1).whole


def test_a_bounded_number_of_whole_documents_tells_and_is_said():
    def texts():
        yield from ["a" * LONG] * 10
        raise AssertionError("read past what is enough")

    counted = DocumentLengths.count(texts(), ByteTokenizer(), 9 * LONG + 1 - LONG)
    assert not counted.whole and counted.tokens.tolist() == [LONG] * 9
    said = choose("longroll", counted.tokens, T, ROWS, whole=False)
    assert said.intervention == "tbptt"
    assert (
        said.why
        == "in 9 documents of the text, those of 16 or more windows of 16 tokens hold 100 % of the tokens"
    )
    huge = "to be or not to be, " * 100_000  # 2 MB
    counted = DocumentLengths.count([huge, "", "be"], ByteTokenizer(), 1)
    assert counted.tokens.tolist() == [len(huge)] and not counted.whole


@pytest.mark.parametrize("corpus", [documents(*[LONG] * 40), documents(*[20] * 400)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_are_the_recipe_s_where_none_are_given(corpus, recipe):
    lm, options = zoo.lm_of("mamba2"), PosttrainOptions(T, batch_size=ROWS, seed=3)
    found = by_recipe(lm, corpus, options, recipe=recipe)
    told = RECIPES[recipe].text.get(found.name, Settings())
    assert found.intervention.zero_probability == told.zero_probability and found.intervention.seed == 3
    assert found.options.recipe == recipe
    assert dataclasses.replace(options, recipe=recipe, **{
        name: getattr(told, name) for name in ("decay_speed", "learning_rate", "trainable")
    }) == found.options  # fmt: skip
    trained = {"all": "all weights", "scales": "all but the matrices"}[told.trainable]
    said = f"zero probability {told.zero_probability:g}, trains {trained}, decay speed {told.decay_speed:g}"
    assert said in found.sentence


def test_rows_of_text_are_text():
    lm, options = zoo.lm_of("mamba2"), PosttrainOptions(T, batch_size=ROWS)
    text = documents(*[LONG] * 40)
    for rows, name in ((Lanes(text, T, ROWS), "tbptt"), (Windows(text, T), "sp")):
        found, told = by_recipe(lm, rows, options), RECIPES["longroll"].text[name]
        assert found.name == name and found.options.trainable == told.trainable
        assert found.options.learning_rate == told.learning_rate


def test_what_is_given_wins():
    lm, corpus = zoo.lm_of("mamba2"), documents(*[LONG] * 40)
    options = PosttrainOptions(T, batch_size=ROWS, learning_rate=1e-4, decay_speed=7.0)
    for name in ("sp", "tbptt", "fitted", "random"):
        found = by_recipe(lm, corpus, options, intervention=name, zero_probability=0.25)
        assert found.name == name and found.intervention.zero_probability == 0.25
        assert (found.options.learning_rate, found.options.decay_speed) == (1e-4, 7.0)
    assert by_recipe(lm, corpus, options, intervention="none").intervention is None
    assert by_recipe(lm, corpus, options, intervention="random", std=0.5).intervention.std == 0.5
    for name, argument in (("tbptt", "momentum"), ("sp", "std"), ("random", "momentum")):
        with pytest.raises(
            LongrollError, match=f"`{argument}` is no argument of .*`intervention` (fitted|random)"
        ):
            by_recipe(lm, corpus, options, intervention=name, **{argument: 0.5})
    with pytest.raises(LongrollError, match="`recipe` other is not one of longroll, paper"):
        by_recipe(lm, corpus, options, recipe="other")


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("mamba2", {"lora_rank": 2}, "adapters are trained"),
        ("llama", {}, "no decays of its own"),
        ("mamba2", {"rope_scaling": "yarn:2"}, "scaled positions"),
    ],
)
def test_matrices_are_trained_where_they_have_to_be(family, options, why):
    lm, corpus = zoo.lm_of(family), documents(*[20] * 400)
    found = by_recipe(lm, corpus, PosttrainOptions(T, batch_size=ROWS, **options))
    told = RECIPES["longroll"].text[found.name]
    assert told.trainable != "all" and told.decay_speed != 1
    assert found.options.trainable == "all" and found.options.learning_rate == told.whole_rate
    assert (found.options.decay_speed == 1) == ("rope_scaling" not in options)
    slow = found.options.decay_speed == 1
    assert found.name == "sp" and told.zero_probability != told.frozen_zero_probability
    zero = told.frozen_zero_probability if slow else told.zero_probability
    assert found.intervention.zero_probability == zero
    assert why in found.sentence
    adapters = "lora_rank" in options
    assert f", trains {'adapters' if adapters else 'all weights'}, " in found.sentence


def test_a_task_is_learned_by_all_weights():
    rows = TaskRows([Passkey(ByteTokenizer(), instruction=False)], 200, 4, lanes=2)
    lm, options = zoo.lm_of("mamba2", vocab_size=256), PosttrainOptions(200, batch_size=2)
    found = by_recipe(lm, rows, options)
    assert found.name == "fitted" and found.options.trainable == "all"
    spread = TaskRows(rows.tasks, 200, 4, lanes=2, windows=2)
    found = by_recipe(lm, spread, options)
    assert found.name == "tbptt" and found.options.trainable == "all"
    assert found.options.learning_rate == RECIPES["longroll"].task["tbptt"].whole_rate


def test_classes_keep_the_papers_meaning_and_posttrain_takes_a_recipe(tmp_path):
    assert longroll.StatePassing().zero_probability == longroll.TBPTT().zero_probability == 0
    lm, corpus = zoo.lm_of("mamba2"), Corpus.from_texts(["to be or not " * 40] * 8, ByteTokenizer())
    kept = {}
    for name in ("longroll", "paper", "sp"):
        options = PosttrainOptions(T, steps=2, batch_size=ROWS)
        longroll.posttrain(zoo.lm_of("mamba2", vocab_size=256), corpus, name, options, tmp_path / name)
        (kept[name],) = longroll.load(tmp_path / name).model.config.longroll["posttrain"]
    told = by_recipe(lm, corpus, PosttrainOptions(T, steps=2, batch_size=ROWS))
    assert kept["longroll"]["intervention"] == told.name == "tbptt"
    assert kept["longroll"]["recipe"] == "longroll" and kept["longroll"]["zero_probability"] == 0.1
    assert kept["paper"]["recipe"] == "paper" and kept["paper"]["intervention"] == "sp"
    assert kept["sp"]["recipe"] is None
    for name in ("paper", "sp"):
        assert (kept[name]["decay_speed"], kept[name]["learning_rate"], kept[name]["trainable"]) == (
            1,
            5e-4,
            "all",
        )
    assert kept["longroll"]["trainable"] == RECIPES["longroll"].text["tbptt"].trainable
    assert "| recipe | longroll |" in (tmp_path / "longroll/README.md").read_text()
