"""The page in a real browser: nothing may stick out sideways, on a desk or on a phone."""

import json
import re

import pytest
from synthetic import KINDS, run, runs

from longroll.report import render

# Runs in a frame of the width under test, because a headless window has a least width of its own.
PROBE = """<!doctype html><body style="margin:0">
<iframe id="frame" style="width:{width}px;height:900px;border:0" src="page.html"></iframe>
<script>
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement
  page.querySelectorAll("details").forEach(d => d.open = true)
  const inside = e => e.closest(".scroll") || e.closest("svg")
  const out = [...page.body.querySelectorAll("*")].filter(e => !inside(e) || e.matches("svg, .scroll"))
    .filter(e => {{
      const r = e.getBoundingClientRect()
      return r.width && (r.right > root.clientWidth + 1 || r.left < -1) }})
    .map(e => e.tagName + "." + e.className)
  const texts = [...page.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().width).flatMap(s =>
    [...s.querySelectorAll("text")].filter(t => {{
      const r = t.getBoundingClientRect(), b = s.getBoundingClientRect()
      return r.left < b.left - 2 || r.right > b.right + 2 }}).map(t => t.textContent))
  const small = [...page.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().width)
    .map(s => 11 * s.getBoundingClientRect().width / s.viewBox.baseVal.width)
  const shown = [...page.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().width).length
  const sizes = {{ width: root.clientWidth, scroll: root.scrollWidth, small: Math.min(...small) }}
  result.textContent = JSON.stringify({{ ...sizes, out, texts, shown }})
}}
</script>
<pre id="result"></pre>"""


@pytest.mark.parametrize("width", [1280, 768, 390, 320])
@pytest.mark.parametrize("many", [False, True], ids=["two runs", "six runs"])
def test_nothing_sticks_out_sideways(browser, tmp_path, width, many):
    long = run("sp", label="a run with a rather long label", model="/a/very/long" * 12)
    tall = run("base", layers=24, heads=24)
    (tmp_path / "page.html").write_text(
        render([tall, long, *runs(*KINDS)[1:]] if many else runs("base", "tbptt")), "utf-8"
    )
    (tmp_path / "probe.html").write_text(PROBE.format(width=width), "utf-8")
    printed = browser(
        "--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom", page=tmp_path / "probe.html"
    )
    found = re.search(r'id="result">(\{.*?\})</pre>', printed, re.S)
    assert found, printed[-500:]
    seen = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["width"] == width or seen["width"] == width - 15  # a scroll bar
    assert seen["scroll"] <= seen["width"]
    assert not seen["out"]
    assert not seen["texts"], "text runs out of its figure"
    assert seen["shown"] >= 6
    assert seen["small"] >= 8.5, "type in a figure is too small to read"


@pytest.mark.parametrize("theme, dark", [("1", False), ("0", True)], ids=["light", "dark"])
def test_screenshot_is_drawn_on_the_ground_of_its_theme(browser, tmp_path, theme, dark):
    from matplotlib.image import imread

    (tmp_path / "page.html").write_text(render(runs("base", "tbptt")), "utf-8")
    shot = tmp_path / "shot.png"
    browser(
        "--window-size=1280,2400", f"--blink-settings=preferredColorScheme={theme}", f"--screenshot={shot}",
        page=tmp_path / "page.html",
    )  # fmt: skip
    pixels = imread(shot)[..., :3]
    assert (pixels[0, 0].mean() < 0.2) == dark
    assert (abs(pixels - pixels[0, 0]).max(axis=-1) > 0.3).mean() > 0.005  # something is written on it
    assert (abs(pixels[:, -8:] - pixels[0, 0]) < 0.02).all()  # and nothing at the right edge


def test_print_uses_light_paper(browser, tmp_path):
    (tmp_path / "page.html").write_text(render(runs("base", "tbptt")), "utf-8")
    browser(
        "--blink-settings=preferredColorScheme=0",
        "--no-pdf-header-footer",
        f"--print-to-pdf={tmp_path / 'out.pdf'}",
        page=tmp_path / "page.html",
    )  # fmt: skip
    data = (tmp_path / "out.pdf").read_bytes()
    assert data.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 8


PRINTED = """<!doctype html><body style="margin:0">
<iframe id="frame" style="width:673px;height:900px;border:0" src="page.html"></iframe>
<script>
frame.onload = () => {
  const page = frame.contentDocument
  const far = [...page.querySelectorAll("table :is(td, th)")].map(c => c.getBoundingClientRect().right)
  result.textContent = JSON.stringify({ cells: far.length, far: Math.max(...far) })
}
</script>
<pre id="result"></pre>"""


def test_print_keeps_all_columns(browser, tmp_path):
    bare = [run("sp", label=f"a run of a long name {i}") for i in range(12)]
    for one in bare:
        for section in ("excess", "states", "remembrance", "coverage", "tasks"):
            one.pop(section, None)
    page = render(bare).replace("@media print", "@media all").replace("<details>", "<details open>")
    (tmp_path / "page.html").write_text(page, "utf-8")
    (tmp_path / "probe.html").write_text(PRINTED, "utf-8")
    printed = browser("--virtual-time-budget=5000", "--dump-dom", page=tmp_path / "probe.html")
    seen = json.loads(re.search(r'id="result">(\{.*?\})</pre>', printed, re.S)[1])
    assert seen["cells"] > 13 * 10
    assert seen["far"] <= 673 + 1  # A4 without its margins
