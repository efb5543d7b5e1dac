"""Flags that the chosen intervention or task does not read: refused, or left out with a warning."""

import pytest
from typer.testing import CliRunner

from longroll.cli import app
from longroll.cli._posttrain import READ_BY_INTERVENTION, READ_BY_TASK, Choice, TaskName

GIVEN = {
    "instruction": "--no-instruction",
    "conv": "--no-conv",
    "windows": "--windows 2",
    "groups": "--groups 2",
    "pairs": "--pairs 2",
    "zero_probability": "--zero-probability 0.5",
}
TOLD = [("intervention", choice, READ_BY_INTERVENTION) for choice in Choice]
TOLD += [("task", task, READ_BY_TASK) for task in (None, *TaskName)]


@pytest.mark.parametrize(
    ("chosen", "value", "readers"), TOLD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_unread_flag_is_named_before_any_work(tmp_path, chosen, value, readers):
    choice = [f"--{chosen}", value] if value else []
    for name, values in readers.items():
        flag = "--" + name.replace("_", "-")
        given = GIVEN.get(name, f"{flag} 0.5").split()
        told = ["posttrain", "no/where/at/all", "--output", str(tmp_path / "o"), *given, *choice]
        ran = CliRunner().invoke(app, told)
        said = " ".join(f"{ran.stderr} {ran.exception}".split())
        assert (f"{flag} belongs to" in said) == (value not in values)
        assert ("no/where/at/all" in said) == (value in values or chosen == "task")
