"""The tables of the pages are those that the result files give."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import tables  # noqa: E402

PAGES = [
    page for glob in tables.GLOBS for page in sorted(ROOT.glob(glob)) if "<!-- table:" in page.read_text()
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tables_are_those_of_the_result_files(page):
    text = page.read_text()
    assert tables.remade(text) == text, "python benchmarks/tables.py remakes it"
    assert text.count("<!-- table:") == text.count("<!-- /table -->")


def test_each_table_stands_in_a_page():
    named = {name for page in PAGES for name in re.findall(r"<!-- table: ([\w.-]+) -->", page.read_text())}
    assert named == {*tables.TABLES}


def test_a_changed_number_is_found():
    page = "<!-- table: kill-resume -->\n" + tables.TABLES["kill-resume"]() + "<!-- /table -->\n"
    assert tables.remade(page) == page
    assert tables.remade(page.replace("66", "67", 1)) == page
    with pytest.raises(SystemExit):
        tables.remade("<!-- table: none -->\n<!-- /table -->")


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0.0, "0"), (662.93, "663"), (12357.3, "12,400"), (0.0876, "0.0876"), (9.996, "10.0")],
)
def test_numbers_have_three_digits(number, shown):
    assert tables.digits(number) == shown
