"""Recipes: which intervention a text asks for, and what is given over what a recipe says."""

import dataclasses

import numpy as np
import pytest

import longroll
import zoo
from longroll.data import ByteTokenizer, Corpus
from longroll.errors import LongrollError
from longroll.interventions.recipes import LONG_SHARE, RECIPES, WINDOWS, Settings, choose
from longroll.training import PosttrainOptions, by_recipe

T, ROWS = 16, 2
LONG, SHORT = WINDOWS * T + 1, WINDOWS * T  # a window predicts the token after its last


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


@pytest.mark.parametrize("corpus", [documents(*[LONG] * 40), documents(*[20] * 400)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_are_the_recipe_s_where_none_are_given(corpus, recipe):
    lm, options = zoo.lm_of("mamba2"), PosttrainOptions(T, batch_size=ROWS, seed=3)
    found = by_recipe(lm, corpus, options, recipe=recipe)
    told = RECIPES[recipe].settings.get(found.name, Settings())
    assert found.intervention.zero_probability == told.zero_probability and found.intervention.seed == 3
    assert found.options.recipe == recipe
    assert dataclasses.replace(options, recipe=recipe, **{
        name: getattr(told, name) for name in ("decay_speed", "learning_rate")
    }) == found.options  # fmt: skip
    assert f"zero probability {told.zero_probability:g}, decay speed {told.decay_speed:g}" in found.sentence


def test_what_is_given_wins():
    lm, corpus = zoo.lm_of("mamba2"), documents(*[LONG] * 40)
    options = PosttrainOptions(T, batch_size=ROWS, learning_rate=1e-4, decay_speed=7.0)
    for name in ("sp", "tbptt", "fitted", "random"):
        found = by_recipe(lm, corpus, options, intervention=name, zero_probability=0.25)
        assert found.name == name and found.intervention.zero_probability == 0.25
        assert (found.options.learning_rate, found.options.decay_speed) == (1e-4, 7.0)
    assert by_recipe(lm, corpus, options, intervention="none").intervention is None
    assert by_recipe(lm, corpus, options, intervention="random", std=0.5).intervention.std == 0.5
    with pytest.raises(LongrollError, match="`recipe` other is not one of longroll, paper"):
        by_recipe(lm, corpus, options, recipe="other")


@pytest.mark.parametrize(("family", "options"), [("mamba2", {"lora_rank": 2}), ("llama", {})])
def test_decays_that_are_not_trained_have_no_speed(family, options):
    lm, corpus = zoo.lm_of(family), documents(*[20] * 400)
    options = PosttrainOptions(T, batch_size=ROWS, **options)
    found = by_recipe(lm, corpus, options)
    assert RECIPES["longroll"].settings[found.name].decay_speed != 1
    assert found.options.decay_speed == 1 and "no parameter that sets a decay is trained" in found.sentence


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
    assert {kept[name]["decay_speed"] for name in ("paper", "sp")} == {1}
    assert {kept[name]["learning_rate"] for name in kept} == {5e-4}
    assert "| recipe | longroll |" in (tmp_path / "longroll/README.md").read_text()
