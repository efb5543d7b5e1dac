"""`diagnose` names an intervention, its printed command takes it, and few steps do not change it."""

import _pydecimal
import argparse
import inspect
import json
import shlex
import typing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longroll.cli import app

T = 128


def ran(*arguments: object) -> str:
    found = CliRunner().invoke(app, list(map(str, arguments)))
    assert found.exit_code == 0, found.output + repr(found.exception)
    return " ".join(found.output.split())


@pytest.mark.parametrize(("size", "intervention"), [(16 * T, "tbptt"), (16 * T - 1, "sp")])
def test_diagnose_and_posttrain_choose_the_same_for_the_same_text(size, intervention, tmp_path):
    code = "".join(Path(inspect.getsourcefile(m)).read_text() for m in (argparse, typing, _pydecimal))
    code = code.encode("ascii", errors="ignore").decode()
    rows = [{"text": code[i * size : (i + 1) * size]} for i in range(len(code) // size)]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(map(json.dumps, rows)))
    read = ("--text", text, "--length", 16 * T, "--sequences", 4, "--concatenate", "--no-explain")
    said = ran("diagnose", "specimen", *read, "--seed", 3, "--json", tmp_path / "base.json")
    advice = json.loads((tmp_path / "base.json").read_text())["advice"]
    assert advice["intervention"] == intervention and advice["command"] in said
    name = {"tbptt": "TBPTT", "sp": "State Passing"}[intervention]
    assert f"Repair it by {name}: documents of 16 or more windows of 128 tokens hold " in said
    _, *command = shlex.split(advice["command"])
    assert "--force" in command
    command[-1] = str(tmp_path / "repaired")
    said = ran(*command, "--steps", 1, "--device", "cpu", "--seed", 5, "--json", tmp_path / "run.json")
    assert f"Recipe longroll: {name}, " in said and "documents of 16 or more windows of 128 tokens" in said
    assert json.loads((tmp_path / "run.json").read_text())["intervention"] == intervention
