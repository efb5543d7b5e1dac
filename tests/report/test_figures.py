import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from synthetic import run, runs

from longroll import report
from longroll.errors import LongrollError
from longroll.report.figures._axes import even_ticks, octaves, round_ticks
from longroll.report.figures._labels import spread
from longroll.report.style import PAPER_COLUMN, PHONE, TONES, WEB, run_styles

SHARES = [
    {"what": what, "recovered": share, "low": share - 0.1, "high": share + 0.2}
    for what, share in (("rescan", 0.9), ("window+first", -0.05), ("state", 0.8), ("attention", 0.1))
]
BLAME = {
    "verdict": "state", "sentence": "The recurrent states do the damage.", "damage": 1.5, "factor": 16,
    "parts": SHARES[2:], "states": SHARES[:1], "attentions": SHARES[1:2], "together": SHARES[0],
}  # fmt: skip
FIGURES = {
    "blame": lambda look: report.blame_figure(run("base", blame=BLAME), look=look),
    "position": lambda look: report.position_figure(runs("base", "tbptt"), look=look),
    "bits": lambda look: report.position_figure(runs("base", "tbptt"), "bits_per_byte", look=look),
    "nats": lambda look: report.position_figure(runs("base", "tbptt"), "nats", look=look),
    "excess": lambda look: report.excess_figure(runs("base", "tbptt"), look=look),
    "states": lambda look: report.state_figure(runs("base", "tbptt"), look=look),
    "remembrance": lambda look: report.remembrance_curves(runs("base", "tbptt"), 8192, look=look),
    "map": lambda look: report.remembrance_map(run("base"), look=look),
    "coverage": lambda look: report.coverage_map(run("base"), look=look),
    "task": lambda look: report.task_heatmap(runs("base", "tbptt"), look=look),
}


@pytest.mark.parametrize("look", [WEB, PHONE, PAPER_COLUMN], ids=lambda look: look.name)
@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_clipped_and_no_labels_collide(name, look):
    fig = FIGURES[name](look)
    with matplotlib.rc_context(look.rc):
        fig.draw_without_rendering()
        page = fig.bbox.padded(0.5)
        for ax in fig.axes:
            for texts in (
                ax.get_xticklabels(),
                ax.get_yticklabels(),
                [t for t in ax.texts if len(t.get_text()) > 4],
            ):
                boxes = [t.get_window_extent() for t in texts if t.get_text() and t.get_visible()]
                for i, box in enumerate(boxes):
                    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
                    assert not any(box.overlaps(other) for other in boxes[:i]), texts


@pytest.mark.parametrize("name", FIGURES)
def test_svg_is_deterministic_inline_and_themed(name):
    svg = report.to_svg(FIGURES[name](WEB))
    assert svg == report.to_svg(FIGURES[name](WEB))
    root = ET.fromstring(svg)
    assert root.get("width") == "100%" and "viewBox" in root.attrib
    assert "<?xml" not in svg and "metadata" not in svg and "<style" not in svg and "<image" not in svg
    assert "DejaVu" not in svg  # the family comes from the page
    assert "var(--" in svg
    plain = re.sub(r"var\(--[\w-]+, #[0-9a-f]{6}\)", "", svg)
    assert not set(re.findall(r"#[0-9a-f]{6}\b", plain)) & {tone.light for tone in TONES}
    assert not re.findall(r": #[0-9a-f]{6}\b", plain), "a colour outside the palette would not turn dark"


def test_prefix_keeps_ids_apart():
    one, two = (report.to_svg(FIGURES["position"](WEB), prefix=prefix) for prefix in ("a", "b"))
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (one, two)]
    assert ids[0] and not ids[0] & ids[1]


def test_figures_leave_matplotlib_as_they_found_it():
    before = dict(matplotlib.rcParams)
    report.to_svg(FIGURES["position"](WEB))
    assert dict(matplotlib.rcParams) == before


def test_base_is_solid_repairs_are_dashed_in_colours_of_their_own():
    styles = run_styles(runs("base", "none", "random noise", "fitted noise", "state passing", "tbptt"))
    assert styles[0].dash == "solid"
    assert all(style.dash != "solid" for style in styles[1:])
    assert len({style.color for style in styles}) == len({str(style.dash) for style in styles}) == 6


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_run_colours_are_readable_on_the_page(theme):
    from longroll.report.figures._tiles import _contrast, _rgb
    from longroll.report.style import ABOVE, BELOW, INK, MUTED, PAPER, RUN_TONES, SPARE_TONES

    ground = _rgb(getattr(PAPER, theme))
    for tone in (*RUN_TONES.values(), *SPARE_TONES, INK, MUTED, ABOVE, BELOW):
        assert _contrast(_rgb(getattr(tone, theme)), ground) >= 4.5, tone


def test_position_ticks_are_octaves_of_the_training_length():
    ax = report.position_figure(runs("base", "tbptt")).axes[0]
    labels = [t.get_text() for t in ax.get_xticklabels()]
    assert labels == ["8", "16", "32", "64", "128", "256", "512", "1k", "2k", "4k", "8k", "16k"]
    assert 1500 in octaves(100, 40_000, 1500, 9)
    assert len(octaves(1, 2**40, None, 6)) <= 6


@pytest.mark.parametrize("low, high", [(3, 60), (2.8, 1e5), (1, 1e30), (9.1, 9.4), (0.01, 0.2)])
def test_value_ticks_are_few_and_inside(low, high):
    for ticks in (round_ticks(low, high, 6), even_ticks(low, high, 6)):
        assert 2 <= len(ticks) <= 6
        assert all(low - 1e-6 * high <= t <= high * (1 + 1e-6) for t in ticks)


def test_spread_keeps_order_and_distance():
    wanted = np.array([5.0, 1.0, 1.1, 1.2, 30.0])
    placed = spread(wanted, 2.0, 0.0, 40.0)
    assert (np.argsort(placed) == np.argsort(wanted)).all()
    assert np.diff(np.sort(placed)).min() >= 2 - 1e-9
    assert placed[4] == 30


def test_the_page_shows_which_side_is_to_blame():
    page = report.render([run("base", blame=BLAME)])
    assert "State or attention" in page and "states: rescan" in page and "Shapley" in page
    assert "State or attention" not in report.render([run("base")])


def test_wrong_requests_are_said_clearly():
    with pytest.raises(LongrollError, match="unit"):
        report.position_figure([run("base")], "bananas")
    with pytest.raises(LongrollError, match="bytes_per_token"):
        report.position_figure([run("base", bytes_per_token=None)], "bits_per_byte")
    with pytest.raises(LongrollError, match="remembrance end 77"):
        report.remembrance_curves([run("base")], 77)
    with pytest.raises(LongrollError, match="niah"):
        report.task_heatmap([run("base")], "niah")
    with pytest.raises(LongrollError, match="3 lengths x 1 depths"):
        report.task_heatmap(
            [run("base", tasks={"niah": {"lengths": [1, 2, 3], "depths": [0.5], "accuracy": [[1]]}})], "niah"
        )


def test_a_task_may_have_no_depths():
    tasks = {"babilong": {"lengths": [1024, 4096], "accuracy": [0.9, 0.4]}}
    report.to_svg(report.task_heatmap([run("base", tasks=tasks)], "babilong"))
