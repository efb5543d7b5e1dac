"""State tracking, associative recall and RULER's other needles: by their definitions."""

import itertools

import numpy as np
import pytest
from typer.testing import CliRunner

import zoo
from longroll import LongrollError
from longroll.cli import app
from longroll.cli._numbers import parse_counts
from longroll.cli._tasks import warn_of
from longroll.data import ByteTokenizer, HFTokenizer
from longroll.data.lanes import IGNORED
from longroll.results import TaskResult, read_results
from longroll.tasks import (
    Copying,
    Niah,
    Passkey,
    Recall,
    Row,
    StateTracking,
    TaskRows,
    TrackingRows,
    Variables,
    evaluate_grid,
    recall_tokenizer,
    tracking_tokenizer,
    training_rows,
)
from longroll.tasks.evaluate import grid, summary
from longroll.tasks.state_tracking import TAGGED, product_table
from longroll.training import PosttrainOptions, by_recipe

TRACKING = HFTokenizer(tracking_tokenizer(), "tracking")
RECALL = HFTokenizer(recall_tokenizer(), "recall")


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("group", ["parity", "z7", "s3", "a4", "s4", "a5", "s5"])
def test_a_table_is_a_group(group):
    table = product_table(group)
    n = len(table)
    assert n == {"parity": 2, "z7": 7, "s3": 6, "a4": 12, "s4": 24, "a5": 60, "s5": 120}[group]
    assert (table[0] == np.arange(n)).all() and (table[:, 0] == np.arange(n)).all()
    assert all(sorted(row) == list(range(n)) for row in (*table, *table.T))
    a, b, c = rng().integers(n, size=(3, 2000))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    commutes = (table == table.T).all()
    assert commutes == (group in ("parity", "z7"))


@pytest.mark.parametrize("group", ["parity", "s3", "s5"])
@pytest.mark.parametrize("length", [1, 5, TAGGED, TAGGED + 1, 300])
def test_a_word_and_its_products(group, length):
    task = StateTracking(TRACKING, group)
    sample = task.sample(length, rng=rng(length))
    ids = sample.tokens[:-1].tolist()
    assert ids[0] == task.start and ids[-1] == task.ask_id and len(ids) == length + 2
    place = {token: i for i, token in enumerate(task.elements.tolist())}
    state, right = 0, []
    for token in ids[1:-1]:
        state = task.table[state, place[token]]
        right.append(task.elements[state])
    expected = [*right[-TAGGED:], right[-1]]
    assert sample.target.split() == [str(token) for token in expected]
    assert len(sample.answer) == len(expected)
    assert task.score(sample, np.array([]), np.array(expected)) == {"tagged": 1.0, "free": 1.0}
    wrong = np.array([*expected[:-1], -1])
    assert task.score(sample, np.array([]), wrong) == {"tagged": 1.0, "free": 0.0}


@pytest.mark.parametrize(("points", "swaps", "elements"), [(3, 3, 6), (4, 6, 24), (5, 10, 120)])
def test_words_of_swaps_reach_the_whole_group(points, swaps, elements):
    """The identity and the transpositions, each its own inverse, are read; products are of the group."""
    task = StateTracking(TRACKING, f"s{points}-swaps")
    assert len(task.table) == elements and len(task.drawn) == 1 + swaps and task.drawn[0] == 0
    assert (task.table[task.drawn, task.drawn] == 0).all()
    read, told = set(), set()
    for i in range(40):
        row = TrackingRows([task], 64, 40)[i]
        read |= set(row["input_ids"].tolist()) - {task.start, task.ask_id}
        told |= set(row["shift_labels"].tolist()) - {IGNORED}
        sample = task.sample(50, rng=rng(i))
        assert set(sample.tokens[1:51].tolist()) <= set(task.elements[task.drawn].tolist())
    assert read == set(task.elements[task.drawn].tolist()) and told == set(task.elements.tolist())


@pytest.mark.parametrize("group", ["z5-swaps", "parity-swaps", "s6-swaps", "s5-swap", "s5-swaps-swaps"])
def test_groups_that_are_none(group):
    with pytest.raises(LongrollError, match=f"groups` {group}: give parity"):
        StateTracking(TRACKING, group)


def test_rows_of_words_are_labelled_by_their_products():
    task = StateTracking(TRACKING, "s3")
    rows = TrackingRows([task], 64, 10, seed=3)
    row = rows[4]
    ids, labels = row["input_ids"].tolist(), row["shift_labels"].tolist()
    place, state = {token: i for i, token in enumerate(task.elements.tolist())}, 0
    assert ids[0] == task.start and labels[0] == IGNORED and len(ids) == len(labels) == 64
    for token, label in itertools.islice(zip(ids, labels, strict=True), 1, None):
        state = state if token == task.ask_id else task.table[state, place[token]]
        assert label == task.elements[state]
    assert any(task.ask_id in row["input_ids"] for row in map(rows.__getitem__, range(10)))


@pytest.mark.parametrize("pairs", [1, 8, 64])
def test_recall_tells_every_pair_once_and_asks_for_all(pairs):
    task = Recall(RECALL, pairs)
    sample = task.sample(4 * pairs + 50, rng=rng())
    ids = sample.tokens.tolist()
    assert len(ids) == 4 * pairs + 50
    told = dict(zip(ids[: 2 * pairs : 2], ids[1 : 2 * pairs : 2], strict=True))
    asked = ids[-2 * pairs :]
    assert len(told) == pairs and dict(zip(asked[::2], asked[1::2], strict=True)) == told
    assert not set(ids[2 * pairs : -2 * pairs]) & set(task.keys.tolist())
    assert task.score(sample, np.array([]), sample.answer) == {"recalled": 1.0, "first": 1.0}
    half = np.where(np.arange(len(sample.answer)) >= pairs, sample.answer, -1)
    assert task.score(sample, np.array([]), half)["recalled"] == pytest.approx(
        (half == sample.answer)[::2].mean()
    )
    labels = TaskRows([task], 4 * pairs + 49, 4)[0]["shift_labels"]
    learned = labels[labels != IGNORED].tolist()
    assert len(learned) == pairs and set(learned) <= set(task.values.tolist())


@pytest.mark.parametrize("needles", ["multikey", "multivalue"])
@pytest.mark.parametrize("depth", [None, 0.0, 0.5, 1.0])
def test_several_needles(needles, depth):
    tokenizer = ByteTokenizer()
    task = Niah(tokenizer, needles=needles)
    sample = task.sample(3000, depth=depth, rng=rng())
    text, wanted = tokenizer.decode(sample.prompt), sample.target.split()
    assert 3000 - len(task.line) < len(sample.prompt) + 128 <= 3000
    assert len(wanted) == (4 if needles == "multivalue" else 1)
    question = text[text.rindex("Which") :]
    key = question.split(" to ")[1].split("?")[0]
    lines = [line for line in text.splitlines() if line.startswith("The number that belongs to ")][:4]
    assert all(any(f"to {key} is {value}." in line for line in lines) for value in wanted)
    assert sum(f"to {key} is" in line for line in lines) == len(wanted) and len(lines) == 4
    if depth == 0.0:
        assert wanted[0] in lines[0]
    said = np.frombuffer(f" {' and '.join(wanted)}.".encode(), dtype=np.uint8).astype(np.int32)
    assert task.score(sample, said) == {"accuracy": 1.0}
    some = np.frombuffer(wanted[0].encode(), dtype=np.uint8).astype(np.int32)
    assert task.score(sample, some) == {"accuracy": 1 / len(wanted)}


def test_variables_follow_a_chain_in_order():
    tokenizer, task = ByteTokenizer(), Variables(ByteTokenizer(), hops=4)
    sample = task.sample(2500, rng=rng(1))
    chain, text = sample.target.split(), tokenizer.decode(sample.prompt)
    assert 2500 - len(task.line) < len(sample.prompt) + 30 <= 2500 and len(chain) == 5
    told = [f"VAR {name} = VAR {before}\n" for before, name in itertools.pairwise(chain)]
    assert f"VAR {chain[0]} = " in text
    assert [text.index(line) for line in told] == sorted(text.index(line) for line in told)
    said = np.frombuffer(" ".join(chain[:2]).encode(), dtype=np.uint8).astype(np.int32)
    assert task.score(sample, said) == {"accuracy": 0.4}


def test_grids_run_on_a_model():
    lm = zoo.lm_of("mamba2", vocab_size=200)
    for rows, lengths in (
        ([Row("s3", StateTracking(TRACKING, "s3")), Row("s5", StateTracking(TRACKING, "s5"))], [8, 100]),
        ([Row("4 pairs", Recall(RECALL, 4))], [40, 80]),
    ):
        cells = evaluate_grid(lm, rows, lengths, samples=6, batch_size=4)
        assert [cell["length"] for cell in cells] == sorted(lengths * len(rows))
        assert all(0 <= score["mean"] <= 1 for cell in cells for score in cell["scores"].values())


@pytest.mark.parametrize(
    ("task", "tokenizer", "length"),
    [("recall", RECALL, 80), ("tracking", TRACKING, 32), ("variables", ByteTokenizer(), 900)],
)
def test_rows_to_train_on_by_name(task, tokenizer, length):
    rows = training_rows(task, tokenizer, length=length, rows=6)
    assert len(rows) == 6
    for item in map(rows.__getitem__, range(6)):
        assert item["input_ids"].shape == item["shift_labels"].shape == (length,) and item["starts"]
        assert (item["shift_labels"] != IGNORED).any()
    with pytest.raises(LongrollError, match="`task` chess is not one of passkey"):
        training_rows("chess", tokenizer, length=length, rows=6)


def test_mistakes_are_named():
    for make, said in (
        (lambda: StateTracking(TRACKING, "d4"), "`groups` d4: give parity, z2 to z120"),
        (lambda: StateTracking(TRACKING, "s6"), "`groups` s6"),
        (lambda: StateTracking(ByteTokenizer(), "s5"), "has none for '10'.*smaller group"),
        (lambda: Recall(ByteTokenizer()), "recall_tokenizer"),
        (lambda: Recall(RECALL, 65), "`pairs` 65"),
        (lambda: Niah(ByteTokenizer(), needles="many"), "`needles` many"),
        (lambda: Niah(ByteTokenizer(), needles="multikey", prompts="official"), "`prompts` official"),
        (lambda: Variables(ByteTokenizer(), hops=0), "`hops` 0"),
        (lambda: Recall(RECALL, 8).sample(20, rng=rng()), "length 20"),
    ):
        with pytest.raises(LongrollError, match=said):
            make()


@pytest.mark.parametrize(
    ("windows", "hybrid", "warned"), [(1, True, False), (2, False, False), (2, True, True)]
)
def test_a_hybrid_is_warned_of_samples_over_several_rows(windows, hybrid, warned, capsys):
    rows = TaskRows([Recall(RECALL, 2)], 32, 4, lanes=2, windows=windows)
    warn_of("recall", rows, "none", hybrid=hybrid)
    assert ("attention of a hybrid starts each row" in capsys.readouterr().err.replace("\n", " ")) == warned


def test_a_grid_names_what_a_guess_scores():
    lm = zoo.lm_of("mamba2", vocab_size=200)
    groups = [Row(group, StateTracking(TRACKING, group)) for group in ("parity", "s5")]
    for rows, chance in ((groups, [1 / 2, 1 / 120]), ([Row("4 pairs", Recall(RECALL, 4))], [1 / 64])):
        table = grid(evaluate_grid(lm, rows, [40], samples=2), rows, [40], rows[0].task.metric)
        whole = chance if len(chance) == 1 else [*chance, sum(chance) / 2]
        assert table["chance"] == pytest.approx(whole)
    passkeys = [Row(0.5, Passkey(ByteTokenizer()), 0.5)]
    cells = [{"length": 300, "row": 0.5, "scores": {"accuracy": {"mean": 0, "low": 0, "high": 1}}}]
    assert "chance" not in grid(cells, passkeys, [300], "accuracy")


@pytest.mark.parametrize("group", ["parity", "z5", "s3-swaps"])
def test_a_guess_scores_the_chance_that_is_named(group):
    task = StateTracking(TRACKING, group)
    drawn = [task.sample(100, rng=rng(i)) for i in range(200)]
    guesses = rng(999).choice(task.elements, size=(200, TAGGED + 1))
    scores = [task.score(sample, guess, guess) for sample, guess in zip(drawn, guesses, strict=True)]
    assert abs(np.mean([score["tagged"] for score in scores]) - task.chance) < 0.02


def test_the_names_of_variables_count_in_either_case():
    task = Variables(ByteTokenizer())
    sample = task.sample(900, rng=rng())
    first, second, *_ = sample.target.split()
    written = task.encode(f" {first.lower()}, {second}")
    assert task.score(sample, written) == {"accuracy": 2 / 5}


def test_what_is_asked_for_twice_is_measured_once(tmp_path):
    flags = ["--lengths", "8,8", "--groups", "parity, parity", "--samples", "2", "--device", "cpu"]
    ran = CliRunner().invoke(
        app, ["evaluate", "tracking", "specimen", *flags, "--json", str(tmp_path / "t.json")]
    )
    assert ran.exit_code == 0, ran.output
    (found,) = read_results(tmp_path / "t.json", TaskResult, otherwise="")
    assert found.tasks["tracking"].names == ["parity"] and len(found.cells) == 1
    assert "chance" in ran.output and "0.50" in ran.output
    assert parse_counts("4, 8,4", "--pairs") == [4, 8]


def test_scores_that_are_all_alike_have_an_interval():
    for values in ([0.25], [0.25] * 4, [0.5, 0.5]):
        found = summary(values)
        assert found["low"] < found["mean"] == values[0] < found["high"]
    assert summary([1.0] * 4) == summary([1, 1, 1, 1])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Recall(TRACKING), "recall needs a token for each key and value, and tracking has none"),
        (lambda: StateTracking(RECALL, "parity"), "tracking needs a token for each element"),
        (lambda: Copying(RECALL), "copying needs a token for each letter"),
        (lambda: Passkey(RECALL), "recall.*no answer of passkey can be read"),
        (lambda: Niah(TRACKING), "no answer of niah"),
        (lambda: Variables(RECALL), "no answer of variables"),
    ],
)
def test_a_tokenizer_of_other_words_is_refused(make, said):
    with pytest.raises(LongrollError, match=said):
        make()


def test_state_passing_is_not_chosen_for_words_and_warned_of(capsys):
    rows = training_rows("tracking", TRACKING, length=32, rows=16, groups=["s3"])
    options = PosttrainOptions(length=32, batch_size=4)
    lm = zoo.lm_of("mamba2", vocab_size=200)
    assert by_recipe(lm, rows, options).intervention.name == "fitted"
    warn_of("tracking", rows, "sp", hybrid=False)
    assert "wrong tool for tracking" in " ".join(capsys.readouterr().err.split())
    warn_of("copying", training_rows("copying", ByteTokenizer(), length=220, rows=4), "sp", hybrid=False)
    assert "Warning" not in capsys.readouterr().err
