"""Width, type size, scale and unit of figures, and the numbers beside them."""

import csv

import numpy as np
import pytest
import typer
from synthetic import run, runs

from longroll.cli import app
from longroll.cli._figures import parse_width
from longroll.errors import LongrollError
from longroll.report import position_figure, write_figures
from longroll.report.figures._axes import whole_strides


def bare(name, **changes):
    """A run with a curve alone: one figure, quickly drawn."""
    found = run(name)
    for section in ("excess", "states", "remembrance", "coverage", "tasks"):
        found.pop(section, None)
    return found | changes


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("unit", ["nats", "perplexity"])
def test_csv_holds_the_numbers_of_the_curves(tmp_path, unit):
    pair = [bare("base"), bare("tbptt")]
    (path,) = write_figures(pair, tmp_path, "svg", y=unit)
    rows = rows_of(path.with_suffix(".csv"))
    curves = position_figure(pair, unit).axes[0].lines
    for name in ("base", "tbptt"):
        mine = [row for row in rows if row["run"] == name]
        points = np.array([[float(row["position"]), float(row[unit])] for row in mine])
        assert any(np.array_equal(points, line.get_xydata()) for line in curves)


def test_every_figure_has_its_numbers_and_says_what_it_shows(tmp_path):
    for path in write_figures(runs("base", "tbptt"), tmp_path, "svg"):
        rows = rows_of(path.with_suffix(".csv"))
        assert rows
        title = path.read_text().partition("<title>")[2].partition("</title>")[0]
        assert all(row["run"] in title for row in rows)
        assert "trained to 128" in title
        assert "<desc>" in path.read_text()


def test_missing_values_are_empty_cells_and_labels_stay_one_cell(tmp_path):
    base = bare("base", label='a "b", c')
    base["curve"] = base["curve"] | {"loss": [None, *base["curve"]["loss"][1:]], "position": [
        128.0, *(129.0 + np.arange(len(base["curve"]["loss"]) - 1))
    ]}  # fmt: skip
    (path,) = write_figures([base], tmp_path, "svg", y="nats")
    first, second, *_ = rows_of(path.with_suffix(".csv"))
    assert first["run"] == 'a "b", c'
    assert first["nats"] == ""
    assert float(second["nats"]) == base["curve"]["loss"][1]


@pytest.mark.parametrize("width", [2.5, 3.25, 7.0])
def test_width_and_type_are_as_asked(tmp_path, width):
    (path,) = write_figures([bare("base")], tmp_path, "pdf", width=width, font_size=7.5)
    assert f"/MediaBox [ 0 0 {72 * width:g} ".encode() in path.read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 0.5}, "width"),
        ({"font_size": 100}, "font_size"),
        ({"width": float("nan")}, "width"),
        ({"width": 2, "font_size": 12}, "font_size"),
        ({"x": "cubic"}, "x"),
        ({"y": "cubic"}, "cubic"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_a_file_is_written(tmp_path, options, said):
    with pytest.raises(LongrollError, match=said):
        write_figures([bare("base")], tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("low", "high"), [(8, 16384), (1, 100), (100, 101), (0.9, 1.1)])
@pytest.mark.parametrize("most", [4, 6, 12])
def test_ticks_of_a_linear_axis_are_few_and_inside(low, high, most):
    ticks = whole_strides(low, high, most)
    assert len(ticks) <= most
    assert all(low <= tick <= high for tick in ticks)


@pytest.mark.parametrize(
    "flags",
    [["--width", "85mm"], ["--format", "png"], ["--x", "linear"], ["--y", "nats"], ["--font-size", "9"]],
)
@pytest.mark.parametrize("command", ["report", "evaluate compare"])
def test_flags_of_figures_without_figures_are_refused(tmp_path, command, flags):
    if command != "report" and "--y" in flags:
        pytest.skip("a task has no loss")
    with pytest.raises(LongrollError, match=f"{flags[0]} is for figures"):
        app([*command.split(), str(tmp_path / "none.json"), *flags], standalone_mode=False)


@pytest.mark.parametrize(
    ("text", "inches"), [("3.25", 3.25), ("3.25in", 3.25), ("85mm", 85 / 25.4), (".5in", 0.5)]
)
def test_widths_are_inches_or_millimetres(text, inches):
    assert parse_width(text) == pytest.approx(inches)


@pytest.mark.parametrize("text", ["85cm", "-3", "nan", "wide", ""])
def test_other_widths_are_refused(text):
    with pytest.raises(typer.BadParameter, match="inches"):
        parse_width(text)
