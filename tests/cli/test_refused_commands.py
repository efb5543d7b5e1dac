"""A command that is refused leaves no folder, no file and no kept piece."""

import pytest
from typer.testing import CliRunner

from longroll.cli import app
from longroll.errors import LongrollError

SHORT = ("--length", "99m", "--sequences", "4")
REFUSED = {
    "diagnose": ("diagnose", "specimen", *SHORT),
    "diagnose a model that is not there": ("diagnose", "no/model"),
    "evaluate loss": ("evaluate", "loss", "specimen", *SHORT),
    "evaluate a window": ("evaluate", "loss", "specimen", "--window", "8"),
    "evaluate passkey": ("evaluate", "passkey", "specimen", "--haystack", "no/text", "--lengths", "64"),
    "calibrate": ("calibrate", "specimen", *SHORT),
    "posttrain": ("posttrain", "specimen", "--text", "no/text"),
    "posttrain with a scaled position": ("posttrain", "specimen", "--rope-scaling", "yarn:4", "--steps", "1"),
    "posttrain with a price of nothing": ("posttrain", "specimen", "--price", "0.1", "--steps", "1"),
    "reproduce": ("reproduce", "--text", "no/text", "--models", "130m", "--device", "cpu"),
    "reproduce with arms": ("reproduce", "--text", "no/text", "--interventions", "all"),
    "report": ("report", "no.json"),
    "plan": ("plan", "no/model"),
    "doctor": ("doctor", "no/model"),
}


@pytest.mark.parametrize("place", ["out", "new/out"])
@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_command_leaves_nothing(what, place, tmp_path):
    arguments = [*REFUSED[what]]
    if arguments[0] not in ("plan", "doctor"):
        arguments += ["--output", str(tmp_path / place)]
    if arguments[0] not in ("report", "reproduce"):
        arguments += ["--json", str(tmp_path / place / "found.json")]
    ran = CliRunner().invoke(app, arguments)
    assert isinstance(ran.exception, LongrollError), (ran.exception, ran.output)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("command", ["posttrain", "calibrate", "diagnose"])
def test_an_output_that_is_a_file_is_named_so(command, tmp_path):
    (tmp_path / "mine").write_text("mine")
    ran = CliRunner().invoke(app, [command, "no/model", "--output", str(tmp_path / "mine")])
    assert "it is a file. Name a folder" in f"{ran.output} {ran.exception}"
    assert (tmp_path / "mine").read_text() == "mine"
