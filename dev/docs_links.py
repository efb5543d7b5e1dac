"""Hook of mkdocs: pages and files outside docs/ become part of the site, and links to them resolve.

Links in Markdown files are relative to the place of the file in the repository. The site holds a copy of each
file outside docs/ that a page links to. `<!-- README: The tree -->` is replaced by that section of README.md.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
PAGES = {
    "benchmarks.md": "benchmarks/README.md",
    "recipes.md": "recipes/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "code-of-conduct.md": "CODE_OF_CONDUCT.md",
    "security.md": "SECURITY.md",
}
"""Pages of the site, by the files of the repository that they are made from."""
_HOME = {source: page for page, source in PAGES.items()} | {"README.md": "index.md"}
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_SECTION = re.compile(r"<!-- README: (.+?) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and each file outside docs/ that a page links to."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    linked: set[str] = set()
    for file in files.documentation_pages():
        text = Path(str(file.abs_src_path)).read_text(encoding="utf-8")
        for _, target in _links(text):
            place = _in_repository(file.src_uri, target)
            if place is not None and _page_of(place) == f"repository/{place}" and (ROOT / place).is_file():
                linked.add(place)
    for place in sorted(linked):
        copied = File.generated(
            config,
            f"repository/{place}",
            abs_src_path=str(ROOT / place),
            inclusion=InclusionLevel.NOT_IN_NAV,
        )
        files.append(copied)
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Turn links that are relative to the repository into links that are relative to the page."""

    def relinked(found: re.Match[str]) -> str:
        place = _in_repository(page.file.src_uri, found[2])
        if place is None:
            return found[0]
        target = _page_of(place)
        if (ROOT / place).is_dir() or files.get_file_from_path(target) is None:
            return found[0]  # mkdocs reports it
        relative = posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")
        return f"{found[1]}{relative}{found[3]}"

    markdown = _outside_fences(markdown, lambda text: _LINK.sub(relinked, text))
    return _SECTION.sub(lambda found: _section(found[1]), markdown)


def _section(heading: str) -> str:
    """Return what stands under a heading of README.md."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", readme, re.DOTALL | re.MULTILINE)
    if found is None:
        raise PluginError(f"README.md has no section {heading!r}.")
    return found[1]


def _links(text: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    _outside_fences(text, lambda part: str(found.extend((m[1], m[2]) for m in _LINK.finditer(part))))
    return found


def _outside_fences(text: str, change: Any) -> str:
    """Apply `change` to what stands outside code blocks."""
    done, end = [], 0
    for code in _FENCE.finditer(text):
        done += [change(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*done, change(text[end:])])


def _in_repository(page: str, target: str) -> str | None:
    """Where in the repository a link of a page leads; None: out of it."""
    if re.match(r"[a-z]+:|/|#|<", target):
        return None
    source = PAGES.get(page, f"docs/{page}")
    if page.startswith("repository/"):
        source = page.removeprefix("repository/")
    place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    return None if place.startswith("..") else place


def _page_of(place: str) -> str:
    """The page or file of the site that a file of the repository becomes."""
    if place in _HOME:
        return _HOME[place]
    return place.removeprefix("docs/") if place.startswith("docs/") else f"repository/{place}"
