"""Mutated result files: `report` and `evaluate compare` draw them or say in one line what is wrong."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from longroll.cli import app
from longroll.errors import LongrollError
from longroll.results import read_result

LONG = 10_000
SECTIONS = {
    "levels": {"in_range": 1.0, "2x": None, "far": 2.5},
    "curve": {
        "position": [0.5, 2.0, 6.0],
        "loss": [1.0, 1.5, 2.0],
        "start": [0, 2, 4],
        "stop": [2, 4, 8],
        "low": [0.5, 1.0, 1.5],
        "high": [1.5, 2.0, 2.5],
    },
    "excess": {"position": [8, 16], "mean": [0.5, 1.0], "low": [0.0, 0.5], "high": [1.0, 1.5]},
    "states": {"position": [4, 16], "layers": [{"layer": 0, "std": [0.1, 0.2]}]},
    "coverage": {
        "layers": [0],
        "map": [[0.5, -2.0]],
        "significant": [[False, True]],
        "causal": [{"what": "layer 0 head 1", "recovered": 0.5}],
    },
    "remembrance": {"starts": [0, 4], "ends": [8, 16], "mean": [[0.0, 0.0], [0.5, None]], "distance": "tv"},
    "tasks": {"niah": {"lengths": [8, 16], "depths": [0.1, 0.5], "accuracy": [[1, 0], [0.5, None]]}},
    "texts": {"fingerprint": "f", "in_range": [1.0, 1.1], "far": [2.0, 2.1]},
    "advice": {"sentence": "Repair it."},
    "provenance": {"command": "longroll", "versions": {"torch": "2"}, "seconds": 1.5},
}
DIAGNOSIS = {
    "kind": "diagnosis",
    "schema_version": 1,
    "label": "base",
    "verdict": "fades",
    "sentence": "Breaks at t ~ 12.",
    "model": "a/b",
    "parameters": 10,
    "train_length": 8,
    "max_position": 16,
    "bytes_per_token": 1.0,
    "edge": 12,
}
TASK = {
    "kind": "task",
    "task": "niah",
    "label": "base",
    "train_length": 8,
    "settings": {"samples": 2},
    "cells": [{"length": 8, "row": 0.5, "samples": 2, "scores": {"accuracy": {"mean": 0.5}}}],
    "tasks": {
        "niah": SECTIONS["tasks"]["niah"] | {"low": [[0.5, 0], [0, None]], "high": [[1, 1], [1, None]]}
    },
}
VALUES = st.sampled_from(
    [
        *(None, True, False, 0, -1, 1, 2.5, 10**9, 2**53 + 1, 10**30, 10**400, 1e308, -1e308, 5e-324),
        *(float("nan"), float("inf"), -float("inf"), "", "1", "[/x]", "base [fp16]", "\x1b[31m", "\ud800"),
        *("$x$", "<b>", "a\nb", "x" * 300, [], {}, [[]], [None], [1], ["a"], [[1, 2], [3]], {"a": 1}, "DEEP"),
    ]
)


def places(data, at=()):
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for part, value in inner:
        yield (*at, part)
        yield from places(value, (*at, part))


@st.composite
def mutated(draw, data):
    """A valid file with one to three faults, as text."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(data))
        if not found:
            break
        *outer, last = draw(st.sampled_from(found))
        inner = data
        for part in outer:
            inner = inner[part]
        how = draw(st.sampled_from(["drop", "set", "set", "set", "fill", "add"]))
        if how == "drop":
            del inner[last]
        elif how == "fill" and isinstance(inner[last], list):
            inner[last] = [copy.deepcopy(draw(VALUES))] * draw(st.integers(0, 4))
        elif how == "add" and isinstance(inner, dict):
            inner[draw(st.sampled_from(["[/x]", "\x1b", "kind", "schema_version"]))] = draw(VALUES)
        else:
            inner[last] = copy.deepcopy(draw(VALUES))
    return json.dumps(data).replace('"DEEP"', "[" * LONG + "]" * LONG)


@st.composite
def diagnoses(draw):
    """A mutated diagnosis of one section: each section draws its own figures."""
    name = draw(st.sampled_from(sorted(SECTIONS)))
    return draw(mutated(DIAGNOSIS | {name: SECTIONS[name]}))


def draws_or_says(folder: Path, text: str, *command: str) -> None:
    file = folder / "mutated.json"
    file.write_text(text)
    arguments = [str(file) if part == "FILE" else part for part in command]
    ran = CliRunner().invoke(app, [*arguments, "--output", str(folder / "out")])
    if ran.exception is not None:
        assert isinstance(ran.exception, LongrollError), ran.exception
        said = str(ran.exception)
        assert "mutated.json" in said and "\n" not in said and said.isprintable(), said
    assert "\x1b" not in ran.output


QUICK = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))


@QUICK
@given(text=diagnoses())
@pytest.mark.filterwarnings("ignore")
def test_report(tmp_path, text):
    draws_or_says(tmp_path, text, "report", "FILE")


@QUICK
@given(text=mutated(TASK))
@pytest.mark.filterwarnings("ignore")
def test_compare(tmp_path, text):
    draws_or_says(tmp_path, text, "evaluate", "compare", "FILE")


@settings(QUICK, max_examples=200)
@given(text=st.one_of(mutated(DIAGNOSIS | SECTIONS), mutated(TASK)))
def test_the_reader(tmp_path, text):
    """What opens is written and opens again as the same."""
    file = tmp_path / "mutated.json"
    file.write_text(text)
    try:
        result = read_result(file)
    except LongrollError as error:
        assert "mutated.json" in str(error) and str(error).isprintable()
        return
    assert read_result(result.write(file)).to_json() == read_result(file).to_json()


NAMES = [
    *(
        "[/x]",
        "base [fp16]",
        "[bold red]a[/]",
        ":smile:",
        "a\x1b[31mb\x07",
        "<script>alert(1)</script>",
        "\\[",
    ),
]


def shown(name: str) -> str:
    return "".join(character if character.isprintable() else " " for character in name)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_as_they_are(tmp_path, monkeypatch, name):
    """Labels, models and tasks in tables and progress bars: no markup, no control characters."""
    from longroll.cli import _console, _progress
    from longroll.results import DiagnosisResult

    monkeypatch.setenv("COLUMNS", "200")
    task = TASK | {"label": name, "task": name, "tasks": {name: TASK["tasks"]["niah"]}}
    (tmp_path / "task.json").write_text(json.dumps(task))
    ran = CliRunner().invoke(app, ["evaluate", "compare", str(tmp_path / "task.json")])
    assert ran.exit_code == 0, ran.exception
    assert shown(name) in ran.output and "\x1b" not in ran.output and "\x07" not in ran.output
    named = {"label": name, "model": name, "verdict": name}
    diagnosis = DiagnosisResult.from_json(DIAGNOSIS | SECTIONS | named)
    with _console.out.capture() as printed:
        _console.out.print(_console.levels_table([diagnosis]), width=200)
        _console.out.print(name)
    assert printed.get().count(shown(name)) == 4
    with _progress.progress(name, total=1), _progress.stages(name) as advance:
        advance(name, 1, 1)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_text_on_the_page_and_in_figures(tmp_path):
    name = " ".join(NAMES)
    named = dict.fromkeys(("label", "model", "verdict", "sentence", "architecture"), name)
    tasks = {name: SECTIONS["tasks"]["niah"] | {"metric": name, "unit": name}}
    told = {"command": name, "device": name, "versions": {name: name}}
    diagnosis = DIAGNOSIS | SECTIONS | named | {"tasks": tasks, "provenance": told}
    (tmp_path / "base.json").write_text(json.dumps(diagnosis))
    figures = ("--figures", str(tmp_path / "figures"), "--format", "svg")
    ran = CliRunner().invoke(
        app, ["report", str(tmp_path / "base.json"), "--output", str(tmp_path), *figures]
    )
    assert ran.exit_code == 0, ran.exception
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    for text in (page, *(file.read_text() for file in (tmp_path / "figures").glob("*.svg"))):
        assert all(c.isprintable() or c in "\n\t\u2060\u00a0" for c in text)
