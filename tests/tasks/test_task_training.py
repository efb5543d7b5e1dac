"""Rows to train on: the loss counts answers only, samples go on over windows, and a task can be learned."""

import itertools
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_task_commands import place, run  # noqa: F401
from transformers import Mamba2Config, Mamba2ForCausalLM

from longroll.data import ByteTokenizer, HFTokenizer
from longroll.errors import LongrollError
from longroll.model import RecurrentLM
from longroll.tasks import (
    BABILong,
    Copying,
    CopyRows,
    Niah,
    Passkey,
    Story,
    TaskRows,
    answer,
    copying_tokenizer,
)
from longroll.tasks._task import random_of
from longroll.training import PosttrainOptions, posttrain

BYTES = ByteTokenizer()
STORIES = [Story(("Mary moved to the office.",), "Where is Mary?", "office")]
BOOKS = ["It was a long and very dark night in the old house by the sea. " * 100]
TASKS = {
    "passkey": Passkey(BYTES, instruction=False),
    "niah": Niah(BYTES, new_tokens=9),
    "babilong": BABILong(BYTES, "qa1", STORIES, BOOKS, few_shot=False),
}


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("name", TASKS)
def test_windows_of_a_lane_make_whole_samples(name, windows):
    lanes, length, steps = 3, 600, 5 * windows
    rows = TaskRows([TASKS[name]], length, steps * lanes, lanes=lanes, windows=windows, seed=5)
    assert len(rows) == steps * lanes
    for lane in range(lanes):
        pieces = [rows[step * lanes + lane] for step in range(steps)]
        starts = [step for step, piece in enumerate(pieces) if piece["starts"]]
        assert starts[0] == 0 and set(np.diff(starts[1:])) <= {windows} and starts[1] <= windows
        for turn, (start, stop) in enumerate(pairwise(starts)):
            ids = torch.cat([piece["input_ids"] for piece in pieces[start:stop]])
            labels = torch.cat([piece["shift_labels"] for piece in pieces[start:stop]])
            learned = labels != -100
            assert torch.equal(labels[:-1][learned[:-1]], ids[1:][learned[:-1]])
            sample = TASKS[name].sample((stop - start) * length + 1, rng=random_of(1, 5, turn * lanes + lane))
            assert BYTES.decode(labels[learned]) == BYTES.decode(sample.answer)
            assert ids[: len(sample.prompt)].tolist() == sample.prompt.tolist()
    for step in range(steps):  # none is without an answer to learn from
        assert any((rows[step * lanes + lane]["shift_labels"] >= 0).any() for lane in range(lanes))


def test_prompts_can_be_learned_too():
    task = TASKS["passkey"]
    (row,) = TaskRows([task], 300, 1, seed=2, answers_only=False)
    sample = task.sample(301, rng=random_of(1, 2, 0))
    assert row["shift_labels"].tolist() == sample.tokens[1:].tolist()


def test_a_batch_smaller_than_a_sample_is_refused():
    with pytest.raises(LongrollError, match="`windows` 4"):
        TaskRows([TASKS["passkey"]], 300, 8, lanes=2, windows=4)


def test_copying_rows_are_packed_as_in_the_source():
    rows = CopyRows(Copying(BYTES), 20, context=220, shortest=8, longest=50, seed=3)
    lengths = set()
    for row in rows:
        text = BYTES.decode(row["input_ids"])
        labels = row["shift_labels"]
        assert len(text) == 219 and text[0] == "$"
        for whole in [part for part in text.split("$")[1:-1] if part.endswith(".")]:
            said, copied = whole[:-1].split("|")
            assert said == copied and 8 <= len(said) <= 50
            lengths.add(len(said))
        learned = "".join(chr(i) if i >= 0 else " " for i in labels.tolist())
        copies = [part.split("|")[1] for part in text.split("$")[1:-1]]
        assert learned.split() == copies or learned.split() == [*copies, learned.split()[-1]]
    assert len(lengths) > 25 and torch.equal(rows[7]["input_ids"], rows[7]["input_ids"])
    with pytest.raises(LongrollError, match="do not fit"):
        CopyRows(Copying(BYTES), 1, context=100)


def test_a_small_model_learns_to_copy_and_is_scored_for_it(tmp_path):
    """Strings of two letters: what is trained is what is scored, through the Trainer and back."""
    torch.manual_seed(0)
    letters = HFTokenizer(copying_tokenizer(), "copying")
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "state_size": 16, "num_heads": 6, "head_dim": 16}
    config = Mamba2Config(vocab_size=30, n_groups=1, chunk_size=16, pad_token_id=None, **shape)
    lm, task = RecurrentLM(Mamba2ForCausalLM(config)), Copying(letters)
    rows = CopyRows(task, 150 * 32, context=32, shortest=1, longest=2)
    options = PosttrainOptions(length=32, steps=150, batch_size=32, learning_rate=1e-2)
    log = posttrain(lm, rows, None, options, tmp_path / "copier")
    assert log[-2]["loss"] < 0.3 * log[0]["loss"]
    samples = [task.sample(2, rng=np.random.default_rng(number)) for number in range(20)]
    found = answer(lm, samples, stop_id=task.stop_id, forced=True)
    scores = [task.score(sample, *answers) for sample, answers in zip(samples, found, strict=True)]
    assert np.mean([score["forced_character"] for score in scores]) > 0.9
    assert np.mean([score["free_string"] for score in scores]) > 0.8


PAIRS = list(itertools.product(["passkey", "niah", "copying", "babilong"], ["sp", "fitted", "tbptt", "none"]))


@pytest.mark.parametrize(("task", "intervention"), [pair for pair in PAIRS if pair != ("copying", "tbptt")])
def test_every_intervention_trains_on_every_task(place, task, intervention, tmp_path):  # noqa: F811
    length = {"passkey": 180, "niah": 500, "copying": 110, "babilong": 200}[task]
    output = run(
        place, "posttrain", "model", "--task", task, "--facts", "babi", "--qa", "qa1", "--text", "books",
        "--no-instruction", "--train-length", length, "--steps", 2, "--batch-size", 2,
        "--intervention", intervention, "--output", tmp_path / "out", "--json", tmp_path / "log.json",
    )  # fmt: skip
    warned = "not stationary" in " ".join(output.split())
    assert warned == (task in ("passkey", "niah") and intervention in ("sp", "tbptt"))
    assert json.loads((tmp_path / "log.json").read_text())["task"] == task
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_what_cannot_be_trained_is_named(place, tmp_path):  # noqa: F811
    with pytest.raises(LongrollError, match="--intervention sp"):
        run(place, "posttrain", "model", "--task", "copying", "--intervention", "tbptt", "--output", tmp_path)
    with pytest.raises(LongrollError, match="--facts"):
        run(place, "posttrain", "model", "--task", "babilong", "--output", tmp_path / "out")


def test_evaluation_never_meets_training():
    """The streams of random numbers are apart, whatever the numbers."""
    seen = {random_of(1, seed, number).integers(2**62) for seed in range(3) for number in range(200)}
    other = {
        random_of(2, seed, length, depth, number).integers(2**62)
        for seed in range(3) for length in range(20) for depth in (0, 1) for number in range(5)
    }  # fmt: skip
    assert len(seen) == 600 and len(other) == 600 and not seen & other
