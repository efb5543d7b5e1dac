import pytest
from synthetic import run, runs

from longroll.errors import LongrollError
from longroll.report import write_figures

NAMES = {
    "position",
    "excess",
    "states",
    "remembrance",
    "remembrance-map-base",
    "remembrance-map-tbptt",
    "coverage-base",
    "coverage-tbptt",
    "task-passkey",
}
STARTS = {"pdf": b"%PDF", "png": b"\x89PNG", "svg": b"<?xml"}


@pytest.mark.parametrize("format", STARTS)
def test_every_figure_is_written_the_same_each_time(tmp_path, format):
    paths = write_figures(runs("base", "tbptt"), tmp_path / "a", format)
    again = write_figures(runs("base", "tbptt"), tmp_path / "b", format)
    assert {path.stem for path in paths} == NAMES
    for one, two in zip(paths, again, strict=True):
        assert one.read_bytes() == two.read_bytes()
        assert one.read_bytes().startswith(STARTS[format])


def test_pdf_is_a_column_wide_with_truetype_fonts(tmp_path):
    position = write_figures(runs("base", "tbptt"), tmp_path)[0].read_bytes()
    assert b"/MediaBox [ 0 0 234 " in position  # 3.25 inches
    assert b"/CIDFontType2" in position or b"/TrueType" in position
    assert b"/Type3" not in position


def test_svg_needs_no_font_of_the_reader(tmp_path):
    for path in write_figures(runs("base", "tbptt"), tmp_path, "svg"):
        svg = path.read_text()
        assert "<text" not in svg
        assert "font-family" not in svg


def test_unsafe_and_equal_names_get_files_of_their_own(tmp_path):
    pair = [run("base", label="../a b"), run("sp", label="a/b")]
    paths = write_figures(pair, tmp_path / "out", "svg")
    assert len(set(paths)) == len(paths)
    assert {path.parent for path in paths} == {tmp_path / "out"}


def test_wrong_requests_are_said_clearly(tmp_path):
    with pytest.raises(LongrollError, match="gif"):
        write_figures([run("base")], tmp_path, "gif")
    (tmp_path / "file").write_text("")
    with pytest.raises(LongrollError, match="Cannot write"):
        write_figures([run("base")], tmp_path / "file")
