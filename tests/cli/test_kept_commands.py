"""A measuring command that was killed goes on from what lies beside its result file."""

import json

import pytest

from longroll import LongrollError
from longroll.cli import app
from longroll.results import DiagnosisResult, LossResult


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    ("command", "kind", "flag"),
    [
        (("evaluate", "loss"), LossResult, "--output"),
        (("diagnose", "--no-explain"), DiagnosisResult, "--json"),
    ],
)
def test_a_command_killed_when_it_saves_goes_on(command, kind, flag, tmp_path, capfd, monkeypatch):
    for name, words in (("text", "To be or not to be, "), ("other", "that is the question. ")):
        (tmp_path / f"{name}.txt").write_text(words * 5000)
    place = tmp_path / "found.json" if flag == "--json" else tmp_path / "out"

    def run(text="text", *more):
        measured = (
            "--text",
            str(tmp_path / f"{text}.txt"),
            "--length",
            "256",
            "--sequences",
            "4",
            "--concatenate",
        )
        app([*command, "specimen", *measured, flag, str(place), *more], standalone_mode=False)
        return capfd.readouterr().err

    def die(*_):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(kind, "write", die)
        with pytest.raises(KilledError):
            run()
    (folder,) = tmp_path.rglob("*.kept")
    assert (folder / "reading-0-of-1.piece").is_file()
    with pytest.raises(LongrollError, match=r"\.kept holds results with text = "):
        run("other")
    with pytest.raises(LongrollError, match=r"\.kept holds results with chunk_size = None, not 64"):
        run("text", "--chunk-size", "64")
    said = run()
    assert f"Goes on from what is kept in {folder}" in " ".join(said.split()) and not folder.exists()
    (found,) = tmp_path.rglob("*.json")
    first = json.loads(found.read_text())
    assert "kept" not in run("other")
    assert json.loads(found.read_text())["curve"] != first["curve"]
