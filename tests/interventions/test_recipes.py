"""Recipes: which intervention a text asks for, and what is given over what a recipe says."""

import dataclasses

import numpy as np
import pytest

import longroll
import zoo
from longroll.data import ByteTokenizer, Corpus
from longroll.errors import LongrollError
from longroll.interventions.recipes import LONG_SHARE, RECIPES, WINDOWS, Settings, choose
from longroll.tasks import Passkey, TaskRows
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
    told = RECIPES[recipe].text.get(found.name, Settings())
    assert found.intervention.zero_probability == told.zero_probability and found.intervention.seed == 3
    assert found.options.recipe == recipe
    assert dataclasses.replace(options, recipe=recipe, **{
        name: getattr(told, name) for name in ("decay_speed", "learning_rate", "trainable")
    }) == found.options  # fmt: skip
    trained = {"all": "all weights", "scales": "all but the matrices"}[told.trainable]
    said = f"zero probability {told.zero_probability:g}, trains {trained}, decay speed {told.decay_speed:g}"
    assert said in found.sentence


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
