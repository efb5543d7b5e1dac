"""Result files: what is written opens again, older files open, and a faulty one is named with its field."""

import copy
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import zoo
from longroll import diagnose
from longroll.errors import LongrollError
from longroll.results import (
    KINDS,
    SCHEMA_VERSION,
    DiagnosisResult,
    LossResult,
    Section,
    TaskResult,
    read_json,
    read_result,
    read_results,
)

ROOT = Path(__file__).parents[2]
PUBLISHED = [
    file for place in ("recipes", "benchmarks") for file in (ROOT / place / "results").glob("*.json")
]
OURS = sorted(file for file in PUBLISHED if json.loads(file.read_text()).get("kind") in KINDS)

DIAGNOSIS = {
    "kind": "diagnosis",
    "label": "base",
    "verdict": "fades",
    "train_length": 8,
    "edge": None,
    "levels": {"in_range": 1.0, "2x": None, "far": 2.5},
    "curve": {"position": [0.5, 2.0], "loss": [1.0, 1.5], "start": [0, 2], "stop": [2, 4]},
    "coverage": {"map": [[0.5, 1.0]], "significant": [[True, False]], "layers": [3]},
    "remembrance": {"starts": [0, 1], "ends": [2], "mean": [[0.0], [0.5]]},
}
TASK = {
    "kind": "task",
    "task": "passkey",
    "label": "base",
    "train_length": 8,
    "settings": {"samples": 2},
    "cells": [{"length": 8, "row": 0.5, "samples": 2, "scores": {"accuracy": {"mean": 0.5}}}],
    "tasks": {"passkey": {"lengths": [8, 16], "depths": [0.1, 0.5], "accuracy": [[1, 0], [0.5, 0.5]]}},
}


def holds(data, other, at="") -> None:
    """Every field of `data` is in `other`, equal and of the same type."""
    assert type(data) is type(other), at
    if isinstance(data, dict):
        for name in data:
            assert name in other, f"{at}.{name}"
            holds(data[name], other[name], f"{at}.{name}")
    elif isinstance(data, list):
        assert len(data) == len(other), at
        for i, pair in enumerate(zip(data, other, strict=True)):
            holds(*pair, f"{at}[{i}]")
    else:
        assert data == other, at


def test_there_are_published_results():
    kinds = {json.loads(file.read_text())["kind"] for file in OURS}
    assert kinds >= {"diagnoses", "tasks", "benchmark"}


@pytest.mark.parametrize("file", OURS, ids=lambda file: file.name)
def test_a_published_file_opens_and_keeps_every_field(file):
    result = read_result(file)
    holds(json.loads(file.read_text()), result.to_json())


@pytest.mark.parametrize("name", ["gla", "granite", "passkey", "babilong"])
def test_a_file_of_several_runs_gives_them_one_by_one(name):
    runs = read_results(
        *(ROOT / "recipes/results").glob(f"{name}_*.json"),
        DiagnosisResult,
        TaskResult,
        otherwise="is neither",
    )
    assert len(runs) > 2 and all(run.label for run in runs)


@pytest.mark.parametrize("data", [DIAGNOSIS, TASK], ids=lambda data: data["kind"])
def test_what_is_written_opens_as_it_was(tmp_path, data):
    data = data | {"a field of my own": [{"deep": None}]}
    result = KINDS[data["kind"]].from_json(data)
    assert read_result(result.write(tmp_path / "x.json")) == result
    written = read_json(tmp_path / "x.json")
    assert written["schema_version"] == SCHEMA_VERSION and written["a field of my own"] == [{"deep": None}]
    assert result.to_json() == written


def test_a_changed_result_keeps_what_the_schema_does_not_name():
    result = DiagnosisResult.from_json(DIAGNOSIS | {"mine": 1})
    changed = result.changed(label="other")
    assert changed.to_json() == result.to_json() | {"label": "other"} and result.label == "base"


def unnamed(section):
    """Fields of a section that its dataclass does not name."""
    if isinstance(section, Section):
        yield from vars(section).keys() - {field.name for field in fields(section)}
        section = vars(section)
    inner = section.values() if isinstance(section, dict) else section if isinstance(section, list) else ()
    for value in inner:
        yield from unnamed(value)


def test_the_schema_names_every_field_of_a_diagnosis():
    """Two models, one of them held against the other: every section is there."""
    lm = zoo.lm_of("mamba2", vocab_size=64)
    tokens = torch.randint(64, (8, 65), generator=torch.Generator().manual_seed(0))
    before = diagnose(lm, tokens, train_length=16)
    result = diagnose(lm, tokens, train_length=16, against=before, control=before).result()
    assert result.coverage and result.iid and result.remembrance and result.comparisons
    assert set(unnamed(result)) == set()


def test_numbers_that_are_not_finite_become_null():
    loss = {"model": "m", "sequences": 1, "max_position": 2, "bytes_per_token": None}
    curve = {"position": [1.0], "loss": [float("nan")]}
    result = LossResult.from_json(loss | {"curve": curve, "loss": [float("inf"), 1.0]})
    assert result.curve.loss == [None] and result.loss == [None, 1.0]


def changed(data, place, value):
    data = copy.deepcopy(data)
    *outer, last = place
    inner = data
    for part in outer:
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return data


FAULTS = [
    (DIAGNOSIS, ("levels", "in_range"), "1.0", "levels.in_range must be a number, not a string"),
    (DIAGNOSIS, ("levels", "2x"), True, "levels.2x must be a number, not true"),
    (DIAGNOSIS, ("levels", "far"), float("nan"), "levels.far must be a finite number, not NaN"),
    (DIAGNOSIS, ("levels", "far"), 10**400, "levels.far must be a finite number, not a huge number"),
    (DIAGNOSIS, ("levels", "far"), ..., "levels.far is missing"),
    (DIAGNOSIS, ("verdict",), ..., "verdict is missing"),
    (DIAGNOSIS, ("label",), 3, "label must be a string, not 3"),
    (DIAGNOSIS, ("train_length",), 2.5, "train_length must be a whole number, not 2.5"),
    (DIAGNOSIS, ("train_length",), 0, "train_length must be greater than or equal to 1"),
    (DIAGNOSIS, ("curve", "loss", 1), {}, "curve.loss[1] must be a number, not an object"),
    (DIAGNOSIS, ("curve", "loss"), [1.0], "curve: loss has 1 entries, position has 2"),
    (DIAGNOSIS, ("curve",), [1], "curve must be an object, not a list"),
    (DIAGNOSIS, ("coverage", "map"), [[1.0], []], "coverage.map[1] must not be empty"),
    (DIAGNOSIS, ("coverage", "significant"), [[True]], "coverage: significant[0] has 1 entries"),
    (DIAGNOSIS, ("remembrance", "mean", 0), [1, 2], "remembrance: mean[0] has 2 entries for 1 ends"),
    (DIAGNOSIS, ("schema_version",), SCHEMA_VERSION + 1, "schema_version 2 is newer than 1"),
    (DIAGNOSIS, ("schema_version",), "1", "schema_version must be a whole number, not a string"),
    (TASK, ("cells", 0, "row"), [], "cells[0].row must be a number, not a list"),
    (TASK, ("tasks", "passkey", "accuracy"), [[1]], "tasks.passkey: accuracy has shape"),
    (TASK, ("tasks", "passkey", "lengths"), [], "tasks.passkey.lengths must not be empty"),
]


@pytest.mark.parametrize(("data", "place", "value", "said"), FAULTS, ids=[fault[3] for fault in FAULTS])
def test_a_fault_is_one_line_with_file_and_field(tmp_path, data, place, value, said):
    file = tmp_path / "base.json"
    file.write_text(json.dumps(changed(data, place, value)))
    with pytest.raises(LongrollError) as error:
        read_result(file)
    assert str(error.value).startswith(f"{file}: {said}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 10_000 + "]" * 10_000, "is nested too deeply"),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, "is nested too deeply"),
        ('{"kind": 1' + "0" * 5_000 + "}", "is not JSON"),
        ("[]", "not a result"),
        ("null", "not a result"),
        ('{"kind": []}', "not a result"),
        ('{"kind": "diagnosi"}', "not a result"),
    ],
)
def test_what_is_no_result_is_one_line_with_the_file(tmp_path, text, said):
    file = tmp_path / "base.json"
    file.write_text(text)
    with pytest.raises(LongrollError) as error:
        read_result(file)
    assert str(error.value).startswith(str(file)) and said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "bytes.json").write_bytes(b'{"kind": "\xff\xfe"}')
    for name in ("bytes.json", "none.json", "."):
        with pytest.raises(LongrollError, match=rf"{name}"):
            read_result(tmp_path / name)
