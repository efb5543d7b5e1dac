"""The documentation site that `make docs` builds: its links resolve, and a browser shows it at two widths."""

import base64
import contextlib
import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SITE = Path(__file__).parent.parent / "site"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = {"desktop": 1280, "phone": 390}
SHOWN = (
    "index.html",
    "getting-started.html",
    "choose.html",
    "api.html",
    "cli.html",
    "families.html",
    "results.html",
)

pytestmark = pytest.mark.skipif(not SITE.is_dir(), reason="no site/: `make docs` builds it")


class Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        self.links |= {values[key] for key in ("href", "src") if values.get(key)}


@functools.cache
def page_of(path: Path) -> Page:
    return Page(path)


def test_links_inside_the_site_resolve():
    pages = [page for page in SITE.rglob("*.html") if page.name != "404.html"]
    assert len(pages) > 20
    broken = []
    for page in pages:
        for link in page_of(page).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            known = target.is_file() and target.is_relative_to(SITE.resolve())
            anchor = unquote(parts.fragment)
            if known and anchor and target.suffix == ".html" and not anchor.startswith("__"):
                known = anchor in page_of(target).anchors
            if not known:
                broken.append(f"{page.relative_to(SITE)}: {link}")
    assert not broken


def test_pages_load_nothing_from_a_network():
    for page in SITE.rglob("*.html"):
        assert not re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="(?:https?:)?//', page.read_text()), page


PROBE = """<!doctype html><body><pre id="found"></pre><script>
const seen = {};
async function look(name) {
  const frame = document.createElement("iframe");
  frame.width = WIDTH;
  frame.height = 900;
  frame.style.border = 0;
  const loaded = new Promise(done => { frame.onload = done; });
  frame.src = "/" + name;
  document.body.append(frame);
  await loaded;
  const page = frame.contentDocument, root = page.documentElement, images = [...page.images];
  images.forEach(image => { image.loading = "eager"; });
  await Promise.all(images.map(image => image.decode().catch(() => 0)));
  const heading = page.querySelector("h1");
  seen[name] = {
    title: page.title, heading: heading && heading.innerText, height: root.scrollHeight,
    overflow: root.scrollWidth - root.clientWidth,
    broken: images.filter(image => !image.naturalWidth).map(image => image.src)};
  frame.remove();
}
(async () => {
  for (const name of PAGES) await look(name);
  document.getElementById("found").textContent = btoa(unescape(encodeURIComponent(JSON.stringify(seen))));
})();
</script>"""


class Server(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if not self.path.startswith("/probe/"):
            return super().do_GET()
        width = str(int(self.path.removeprefix("/probe/")))
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PROBE.replace("WIDTH", width).replace("PAGES", json.dumps(SHOWN)).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address():
    handler = functools.partial(Server, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def browse(url: str, folder: Path) -> str:
    """The page as a browser leaves it; Chromium sometimes hangs as it starts, and is then started again."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --hide-scrollbars "
        "--virtual-time-budget=60000 --dump-dom"
    )
    for start in range(4):
        command = [BROWSER, *flags.split(), f"--user-data-dir={folder / str(start)}", url]
        with contextlib.suppress(subprocess.TimeoutExpired):
            return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    raise AssertionError("the browser does not start")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_shows_the_pages_without_sideways_scrolling(width, address, tmp_path):
    said = browse(f"{address}/probe/{WIDTHS[width]}", tmp_path)
    found = re.search(r'<pre id="found">([A-Za-z0-9+/=]+)</pre>', said)
    assert found, "the browser shows no pages"
    seen = json.loads(base64.b64decode(found[1]))
    assert {*seen} == {*SHOWN}
    for name, page in seen.items():
        assert page["heading"] and page["title"], name
        assert page["overflow"] <= 0, f"{name} is {page['overflow']} pixels too wide at {width}"
        assert page["height"] > 500 and not page["broken"], (name, page)
