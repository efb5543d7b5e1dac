"""Turn a figure into an SVG that can live inside a page, many to a page, in light and dark."""

import hashlib
import html
import io
import re
from typing import TYPE_CHECKING

from longroll.printable import printable
from longroll.report.style import INK, TONES, WEB

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def to_svg(
    fig: "Figure", *, prefix: str | None = None, description: str | None = None, title: str | None = None
) -> str:
    """Return the figure as an `<svg>` element: no prolog, no date, colours as CSS variables, text as text.

    The same figure always gives the same string. Colours fall back to the light palette where the page does
    not define the variables.

    Args:
        fig: The figure.
        prefix: Put before every id in the SVG, another for each figure of a page; a hash by default.
        description: What a screen reader says.
        title: What the figure shows; a browser shows it where the pointer rests.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(WEB.rc):
        fig.savefig(buffer, format="svg", metadata=_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(
        r"<style type=\"text/css\">.*?</style>", "", text, flags=re.S
    )  # it would style the whole page
    text = re.sub(r"<defs>\s*</defs>\s*", "", text)
    text = _own_ids(text, prefix or "f" + hashlib.sha256(text.encode()).hexdigest()[:8])
    text = _page_fonts(text)
    text = _page_colours(text)
    text = re.sub(r"\n\s*", "\n", text)
    return _page_root(text, description, title)


def _own_ids(text: str, prefix: str) -> str:
    """Drop the ids nothing refers to and prefix the others."""
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r" id=\"([^\"]+)\"", lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    return re.sub(r"(?:xlink:)?href=\"#", f'href="#{prefix}-', text)


def _page_fonts(text: str) -> str:
    """Keep size and weight; let the family come from the page."""
    text = re.sub(r"font-family: [^;\"]+;? ?", "", text)
    return re.sub(r"font: ((?:\w+ )*?)([\d.]+px) [^;\"]+", lambda m: _font(m[1], m[2]), text)


def _font(words: str, size: str) -> str:
    weights = [word for word in words.split() if word.isdigit() or word == "bold"]
    return f"font-size: {size}" + "".join(f"; font-weight: {weight}" for weight in weights)


def _page_colours(text: str) -> str:
    """Replace each colour of the palette by its variable."""
    for tone in TONES:
        value = "currentColor" if tone is INK else f"var(--{tone.name}, {tone.light})"
        text = re.sub(rf"(?<=: ){tone.light}\b", value, text)
    return text


def _page_root(text: str, description: str | None, title: str | None) -> str:
    """Write the root element: scalable, never wider than drawn, named for screen readers."""
    end = text.index(">")
    box = re.search(r"viewBox=\"([^\"]+)\"", text[:end])
    if box is None:
        raise AssertionError("matplotlib wrote an <svg> without a viewBox")
    named = f' aria-label="{html.escape(printable(description))}"' if description else ""
    titled = f"\n<title>{html.escape(printable(title))}</title>" if title else ""
    width = float(box[1].split()[2])
    style = f"max-width:{width:g}px;stroke-linejoin:round;stroke-linecap:butt"
    root = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box[1]}"'
    return f'{root} width="100%" role="img"{named} style="{style}">{titled}{text[end + 1 :]}'
