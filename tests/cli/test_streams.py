"""What goes to standard output and what to standard error."""

import json

import pytest

from longroll.cli import app


@pytest.fixture
def run(capfd, tmp_path):
    """`longroll [options] evaluate loss`: what it prints on standard output and on standard error."""
    (tmp_path / "text.txt").write_text("To be or not to be, that is the question. " * 1500)

    def run(*arguments: str, before: tuple[str, ...] = ()) -> tuple[str, str]:
        measure = ("evaluate", "loss", "specimen", "--text", str(tmp_path / "text.txt"), "--length", "1k")
        app([*before, *measure, *arguments], standalone_mode=False)
        return capfd.readouterr()

    return run


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_json_on_standard_output_is_alone_there(run, name):
    printed, errors = run("--sequences", "2", "--json", name)
    assert json.loads(printed)["max_position"] == 1024 and "perplexity" in errors


def test_quiet_prints_results_alone_and_verbose_what_libraries_log(run):
    more = ("--sequences", "9")  # more than the text has: a notice
    printed, errors = run(*more, before=("--quiet",))
    assert "perplexity" in printed and not errors
    printed, errors = run(*more)
    assert "perplexity" in printed and "not enough text" in errors and "loading configuration" not in errors
    printed, errors = run(*more, before=("--verbose",))
    assert "perplexity" in printed and "not enough text" in errors and "loading configuration" in errors


def test_a_grid_goes_to_standard_output_once(capfd):
    grid = ("evaluate", "copying", "specimen", "--lengths", "3,4", "--samples", "2", "--json", "-")
    app(grid, standalone_mode=False)
    printed, errors = capfd.readouterr()
    assert len(json.loads(printed)["cells"]) == 2 and "length" in errors
