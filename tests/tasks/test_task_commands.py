"""The task commands as a user runs them: small grids, resumption, mistakes."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM
from typer.testing import CliRunner

from longroll.cli import app
from longroll.errors import LongrollError
from tokenizer_kinds import trained


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny byte-level model, some books and bAbI files."""
    folder = tmp_path_factory.mktemp("tasks")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 16, "num_heads": 4, "head_dim": 16}
    config = Mamba2Config(vocab_size=256, n_groups=1, tie_word_embeddings=True, train_length=64, **shape)
    Mamba2ForCausalLM(config).save_pretrained(folder / "model")
    (folder / "books").mkdir()
    for i in range(12):
        (folder / "books" / f"{i}.txt").write_text(
            f"Chapter {i} of the long and sad story began here. " * 200
        )
    (folder / "babi").mkdir()
    for qa in ("qa1", "qa2"):
        for split in ("train", "test"):
            lines = "1 Mary moved to the office.\n2 Where is Mary? \toffice\t1\n"
            (folder / "babi" / f"{qa}_x_{split}.txt").write_text(lines * 3)
    return folder


def run(place: Path, *arguments: object) -> str:
    """Run a command in this process, in `place`; its standard output."""
    before = Path.cwd()
    os.chdir(place)
    try:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    finally:
        os.chdir(before)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


TASKS = {
    "passkey": ("--lengths", "300,1k", "--depths", "0.1,0.9", "--haystack", "books", "--no-instruction"),
    "niah": ("--lengths", "700", "--depths", "0.5"),
    "copying": ("--lengths", "4,9"),
    "babilong": ("--facts", "babi", "--books", "books", "--qa", "qa1,qa2", "--lengths", "0,2k"),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_grid_is_measured_and_kept(place, task):
    run(place, "evaluate", task, "model", *TASKS[task], "--samples", 2, "--output", task)
    found = json.loads((place / task / f"{task}.json").read_text())
    grid = found["tasks"][task]
    rows = len(grid.get("rows") or grid.get("depths") or [None])
    assert len(grid["accuracy"]) == len(grid["lengths"]) and {len(row) for row in grid["accuracy"]} == {rows}
    assert found["train_length"] == (None if task == "copying" else 64)
    assert found["provenance"]["versions"]["torch"]
    assert all(cell["samples"] == 2 and len(cell["examples"]) == 2 for cell in found["cells"])
    assert "<svg" in (place / task / f"task-{task}.svg").read_text()


def test_finished_cells_are_kept_and_other_settings_refused(place):
    command = ("evaluate", "copying", "model", "--samples", 2, "--json", "kept.json")
    run(place, *command, "--lengths", "4")
    first = json.loads((place / "kept.json").read_text())
    run(place, *command, "--lengths", "4,6")
    second = json.loads((place / "kept.json").read_text())
    assert second["cells"][0] == first["cells"][0] and len(second["cells"]) == 2  # `seconds` included
    for wrong in (("--seed", 1), ("--samples", 3)):
        with pytest.raises(LongrollError, match=r"kept\.json holds results with (seed|samples)"):
            run(place, *command, "--lengths", "4", *wrong)
    (place / "other.json").write_text('{"kind": "diagnosis"}')
    with pytest.raises(LongrollError, match=r"other\.json holds no results of a task"):
        run(place, *command[:-1], "other.json")


def test_baselines_stand_beside_the_plain_reading(place):
    files = []
    for reading in ("plain", "reset", "decay", "clip", "chunk"):
        files.append(f"{reading}.json")
        grid = ("--lengths", "400", "--depths", "0.5", "--samples", 2, "--reading", reading)
        room = ("--window", 300) if reading == "chunk" else ()  # the instruction alone is longer than T
        run(place, "evaluate", "passkey", "model", *grid, *room, "--json", files[-1])
    table = " ".join(run(place, "evaluate", "compare", *files, "--output", "compared").split())
    assert "passkey: accuracy" in table and (place / "compared" / "task-passkey.svg").is_file()
    labels = [json.loads((place / file).read_text())["label"] for file in files]
    assert labels == ["model", "model, reset", "model, decay", "model, clip", "model, chunk"]


def test_tasks_stand_in_the_report_of_their_diagnosis(place):
    measured = ("--text", "books", "--length", 256, "--sequences", 4, "--concatenate")
    run(place, "diagnose", "model", *measured, "--label", "base", "--json", "base.json")
    task = ("evaluate", "copying", "model", "--lengths", "4,9", "--samples", 2, "--json", "task.json")
    run(place, *task, "--label", "base")
    run(place, "report", "base.json", "task.json", "--output", "page")
    assert "length in letters" in (place / "page" / "report.html").read_text()
    (place / "task.json").unlink()
    run(place, *task, "--label", "other")
    with pytest.raises(LongrollError, match=r"task\.json .* labelled 'other'"):
        run(place, "report", "base.json", "task.json", "--output", "page")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("passkey", "model", "--lengths", "many"), "--lengths many"),
        (("passkey", "model", "--lengths", "50"), "length 50: .*--lengths"),
        (("passkey", "model", "--depths", "2"), "--depths 2"),
        (("passkey", "model", "--reading", "fast"), "--reading fast"),
        (("babilong", "model", "--facts", "./nowhere"), "--facts nowhere"),
        (("babilong", "model", "--facts", "babi", "--qa", "qa9"), "qa9"),
        (("compare", "model/config.json"), "config.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_named(place, arguments, named):
    with pytest.raises(LongrollError, match=named):
        run(place, "evaluate", *arguments)


class TestBos:
    """A tokenizer adds BOS itself: the choice is printed, measured and written down."""

    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("bos")
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 8, "num_heads": 4, "head_dim": 16}
        Mamba2ForCausalLM(Mamba2Config(vocab_size=340, n_groups=1, **shape)).save_pretrained(folder)
        trained("bytes", bos="<s>", eos="</s>", add_bos=True).save_pretrained(folder)
        return folder

    @pytest.mark.parametrize(("flag", "ids"), [((), [0]), (("--bos",), [0]), (("--no-bos",), [])])
    def test_the_choice_is_printed_and_kept(self, place, model, flag, ids):
        measured = ("--text", "books", "--length", 64, "--sequences", 4, "--concatenate", *flag)
        for command, file in (("evaluate loss", "loss.json"), ("diagnose", "diagnosis.json")):
            more = ("--train-length", 16, "--no-explain") if command == "diagnose" else ()
            said = run(place, *command.split(), model, *measured, *more, "--json", file)
            assert ("Documents begin with '<s>' (id 0)" if ids else "Documents begin without BOS") in said
            assert json.loads((place / file).read_text())["prefix_ids"] == ids
        task = ("--lengths", "400", "--depths", "0.5", "--samples", 1, "--json", "bos-task.json")
        run(place, "evaluate", "passkey", model, *task, *flag)
        assert json.loads((place / "bos-task.json").read_text())["settings"]["prefix_ids"] == ids
        (place / "bos-task.json").unlink()

    def test_a_task_reads_no_rows(self, place):
        with pytest.raises(LongrollError, match="--text-column body: --task passkey"):
            told = ("--task", "passkey", "--text-column", "body", "--output", "never")
            run(place, "posttrain", "model", *told)
