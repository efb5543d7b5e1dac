"""The examples run, show a repair, and serve the command line as plug-ins."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(file.stem for file in (ROOT / "examples").glob("*.py"))


def run(monkeypatch, *arguments):
    """A command in this process, from the folder that holds `examples`."""
    from longroll.cli import main

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["longroll", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_is_a_plugin(name, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    example = importlib.import_module(f"examples.{name}")
    example.main(str(tmp_path))
    said = re.findall("^(before|after): (.*)", capsys.readouterr().out, flags=re.MULTILINE)
    assert [when for when, _ in said] == ["before", "after"]
    assert "Holds" in said[1][1]
    build = ":build" if hasattr(example, "build") else ""
    lm_flags = ("--plugin", f"examples.{name}{build}", "--device", "cpu")
    measure = ("--length", 128, "--sequences", 4, "--no-explain", "--json", tmp_path / "base.json")
    assert run(monkeypatch, "diagnose", tmp_path / "base", *lm_flags, *measure) == 0
    found = json.loads((tmp_path / "base.json").read_text())
    assert found["train_length"] == example.TRAIN_LENGTH


def test_every_example_is_in_the_documentation():
    words = (ROOT / "docs" / "own-models.md").read_text()
    assert EXAMPLES and all(f"examples/{name}.py" in words for name in EXAMPLES)


def test_commands_take_a_plugin(tmp_path, monkeypatch, capsys):
    """A name that the plug-in knows; then the folder that posttrain made of it."""
    torch.manual_seed(0)
    flags = ("--plugin", "examples.own_gru:build", "--device", "cpu")
    trained = (
        "--steps",
        2,
        "--batch-size",
        2,
        "--output",
        tmp_path / "model",
        "--intervention",
        "sp",
        "--force",
    )
    assert run(monkeypatch, "posttrain", "gru", *flags, *trained) == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["plugin"] == "examples.own_gru:build"
    measure = ("--length", 64, "--sequences", 2)
    assert run(monkeypatch, "evaluate", "loss", tmp_path / "model", *flags, *measure) == 0
    copying = ("evaluate", "copying", tmp_path / "model", *flags, "--lengths", "3", "--samples", 2)
    assert run(monkeypatch, *copying) == 0
    capsys.readouterr()
    assert run(monkeypatch, "evaluate", "loss", tmp_path / "model") == 2
    assert "--plugin names what builds it (examples.own_gru:build)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        (
            "no_such_module",
            "--plugin no_such_module fails: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("own_modules:nothing", "--plugin own_modules:nothing: own_modules has no function nothing"),
        ("own_modules:VOCAB", "own_modules has no function VOCAB"),
        (
            "tests/own_modules.py",
            "--plugin tests/own_modules.py: name the module as import does: tests.own_modules",
        ),
        ("own_modules:build", "--plugin own_modules:build fails: ValueError: no weights here"),
        ("broken_plugin", "--plugin broken_plugin fails: SyntaxError: "),
        ("leaves", "--plugin leaves fails: SystemExit: 3"),
    ],
)
def test_a_broken_plugin_is_one_line(plugin, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_plugin.py").write_text("def build(:")
    (tmp_path / "leaves.py").write_text("import sys; sys.exit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["longroll", "diagnose", "broken", "--plugin", plugin])
    from longroll.cli import main

    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and words in said and "\n" not in said


def test_the_current_directory_is_searched_first(tmp_path, monkeypatch):
    import longroll

    (tmp_path / "only_here.py").write_text(
        "import own_modules\nbuild = lambda name: own_modules.build('gru')"
    )
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    assert longroll.load("any", plugin="only_here:build", device="cpu").name == "any"
