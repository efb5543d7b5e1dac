"""Every number with decimals in README, docs and recipes is in the result file that its page names.

A comment names the files, before the paragraphs, lists and tables that it covers, to the next such comment or
heading:

    <!-- numbers: recipes/results/gla.json, benchmarks/results/a.json#rows.0; settings: .1; cited: .27 .47 -->

`#` selects a part of a file. `a.json#x / a.json#y` (or `-`) is the ratio (or the difference) of two numbers.
`a.json#x means` are the means of the rows and the columns of the lists in it.
`settings` lists numbers that were chosen rather than measured, `cited` those of another publication.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
_GLOBS = ("README.md", "docs/**/*.md", "recipes/**/*.md", "benchmarks/**/*.md")
PAGES = sorted({page.relative_to(ROOT).as_posix() for glob in _GLOBS for page in ROOT.glob(glob)})
COMMENT = re.compile(r"<!--\s*numbers:\s*(.*?)\s*-->", re.DOTALL)
FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"<!-- table: [\w.-]+ -->.*?<!-- /table -->", re.DOTALL)
"""Tables that benchmarks/tables.py makes from result files; tests/test_tables.py checks these."""
HIDDEN = re.compile(r"`[^`\n]*`|\]\([^)\n]*\)|<!--.*?-->|https?://\S+", re.DOTALL)
"""Inline code, targets of links, comments."""
VERSION = re.compile(
    r"\b(python|pytorch|torch|transformers|triton|cuda|cudnn|numpy|fla|flash-linear-attention|mamba-ssm|peft|"
    r"causal-conv1d|lm-eval|trl|accelerate|arxiv|longroll)(\s+release)?(\s*[~<>=]=?\s*|:|\s+)"
    r"\d+(\.\d+)+[\w.+]*((,| to| and|-)\s*\d+(\.\d+)+[\w.+]*)*",
    re.IGNORECASE,
)
NUMBER = re.compile(
    r"(?<![\w.])\d*(?:,\d{3})*\.\d+(?:e[-+]?\d+)?(?![\w.]*\.\d|[bB]\b)(?=(\s?(%|ms|us|[kKMG]i?B?))?)"
)
"""A number with decimals, and its unit; 2.7B is the name of a model."""
UNITS = {"%": 1e2, "ms": 1e3, "us": 1e6, "k": 1e-3, "K": 1e-3, "M": 1e-6, "G": 1e-9}
UNITS |= {"KiB": 2.0**-10, "MiB": 2.0**-20, "GiB": 2.0**-30, "kB": 1e-3, "MB": 1e-6, "GB": 1e-9}


@dataclass
class Named:
    """What one comment names."""

    sources: list[str] = field(default_factory=list)
    exempt: set[str] = field(default_factory=set)


def named(comment: str) -> Named:
    found = Named()
    for part in comment.split(";"):
        kind, _, rest = part.strip().partition(":")
        if kind in ("settings", "cited"):
            found.exempt |= {number.strip(",") for number in rest.split()}
        elif part.strip():
            found.sources += [source.strip() for source in part.split(",")]
    return found


@cache
def numbers_of(source: str) -> tuple[float, ...]:
    """The numbers that a source holds: all of a file, of a part of it, or one that two of them give."""
    pair = re.fullmatch(r"(.+?)\s+([-/])\s+(.+)", source)
    if pair:
        left, right = numbers_of(pair[1]), numbers_of(pair[3])
        assert len(left) == len(right) == 1, f"{source}: each side must select one number"
        return (left[0] / right[0] if pair[2] == "/" else left[0] - right[0],)
    path, _, part = source.removesuffix(" means").partition("#")
    assert (ROOT / path).is_file(), f"{path} is no file of this repository"
    value = json.loads((ROOT / path).read_text())
    for key in part.split(".") if part else ():
        value = value[int(key)] if isinstance(value, list) else value[key]
    return tuple(_means(value) if source.endswith(" means") else _leaves(value))


def _means(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        numbers = [entry for entry in value if isinstance(entry, int | float)]
        if value and len(numbers) == len(value):
            yield sum(numbers) / len(numbers)
        rows = [entry for entry in value if isinstance(entry, list)]
        if rows and len({len(row) for row in rows}) == 1:
            yield from (mean for column in zip(*rows, strict=True) for mean in _means(list(column)))
        for entry in value:
            yield from _means(entry)


def _leaves(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _leaves(entry)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def is_in(number: str, unit: str | None, sources: list[str]) -> bool:
    """Whether a printed number is one of the sources', rounded to as many places; signs are left out."""
    digits, _, exponent = number.replace(",", "").partition("e")
    power = int(exponent or 0)
    half = 0.5 * 10.0 ** (power - len(digits.partition(".")[2])) * (1 + 1e-6)
    shown = float(digits) * 10.0**power
    scales = {1.0, UNITS.get(unit or "", 1.0)}
    return any(
        abs(abs(value) * scale - shown) <= half
        for source in sources
        for value in numbers_of(source)
        for scale in scales
    )


def untraced(text: str) -> list[str]:
    """The numbers of a page that no file named for them holds, each with its line."""
    blank = lambda match: re.sub(r"[^\n]", " ", match[0])  # noqa: E731
    text = TABLE.sub(blank, FENCE.sub(blank, text))
    comments = {text.count("\n", 0, found.end()): named(found[1]) for found in COMMENT.finditer(text)}
    text = VERSION.sub(blank, HIDDEN.sub(blank, text))
    faults, current = [], Named()
    for i, line in enumerate(text.split("\n")):
        if line.startswith("#"):
            current = Named()
        current = comments.get(i, current)
        for found in NUMBER.finditer(line):
            if found[0] not in current.exempt and not is_in(found[0], found[2], current.sources):
                where = ", ".join(current.sources)
                faults.append(
                    f"line {i + 1}: {found[0]} {f'is not in {where}' if where else 'names no file'}"
                )
    return faults


@pytest.mark.parametrize("page", PAGES)
def test_every_number_is_in_the_result_file_named_for_it(page):
    faults = untraced((ROOT / page).read_text())
    assert not faults, f"{page}: " + "; ".join(faults)


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_the_output_of_the_quickstart_is_that_of_its_result_file(page):
    """Fenced blocks are not read above."""
    file = max((ROOT / "recipes/results").glob("quickstart_cpu_*.json"))
    ran, text = json.loads(file.read_text()), (ROOT / page).read_text()
    said = " ".join(text.split())
    assert f"Before: {ran['sentence_before']}" in said and f"After: {ran['sentence_after']}" in said
    seconds = re.search(r"about (\d+) seconds", said)
    assert seconds and abs(int(seconds[1]) - ran["seconds"]) < 10
    if table := [line for line in text.split("\n") if line.startswith("│")]:
        for row, when in (("in range", "loss_in_range"), ("last octave", "loss_far")):
            cells = next(line for line in table if row in line)
            assert all(f"{ran[f'{when}_{side}']:.3f}" in cells for side in ("before", "after"))


PAGE = """# Title
<!-- numbers: {file}#levels; settings: 5e-4 .1; cited: .27 -->
The loss falls from 5.69 to **.98** nats, 12.5 % of it, with a rate of .1; the paper has .27.

| | far |
|---|---|
| ours | {number} |
"""
RESULT = {"levels": {"before": 5.6919, "after": [0.985], "share": 0.1249}, "other": 7.77}


@pytest.fixture
def result(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(RESULT))
    numbers_of.cache_clear()
    yield "a.json"
    numbers_of.cache_clear()


CASES = {
    **dict.fromkeys(("5.692", "0.98", ".99", ".27", "python 3.11", "`3.14`", "[a](b-1.5.md)", "2.7B"), True),
    **dict.fromkeys(("5.70", "7.77", "3.14", "1.0e-3"), False),
}


@pytest.mark.parametrize(("number", "traced"), CASES.items())
def test_a_number_that_no_file_holds_is_found(result, number, traced):
    found = untraced(PAGE.format(file=result, number=number))
    assert bool(found) != traced
    assert all(fault.startswith("line 7: ") for fault in found)


def test_a_comment_ends_at_the_next_heading(result):
    page = f"<!-- numbers: {result} -->\n5.69\n\n5.692\n## Next\n5.69\n"
    assert untraced(page) == ["line 6: 5.69 names no file"]


def test_ratios_and_differences_are_computed(result):
    before, after = f"{result}#levels.before", f"{result}#levels.after"
    assert untraced(f"<!-- numbers: {before} / {after} -->\nIt is 5.78 x.") == []
    assert untraced(f"<!-- numbers: {before} - {after} -->\nIt costs 4.71.") == []
    assert untraced(f"<!-- numbers: {before} - {after} -->\nIt costs 4.70.") != []
    with pytest.raises(AssertionError, match="one number"):
        untraced(f"<!-- numbers: {result}#levels - {after} -->\nIt costs 4.71.")


def test_means_are_those_of_rows_and_columns(result):
    (Path(ROOT) / result).write_text(json.dumps({"a": [[0.5, 1.5], [1.25, 2.0]]}))
    for number, traced in {"1.00": True, "1.62": True, ".88": True, "1.75": True, "1.31": False}.items():
        assert (untraced(f"<!-- numbers: {result} means -->\n{number}") == []) == traced, number


def test_a_missing_file_is_named(result):
    with pytest.raises(AssertionError, match=r"b\.json is no file"):
        untraced("<!-- numbers: b.json -->\n1.5")
