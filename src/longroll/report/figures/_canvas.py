"""A figure drawn under the settings of its medium, and nothing left behind in matplotlib."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from longroll.report.style import Look

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def canvas(look: Look, height: float) -> Iterator["Figure"]:
    """Yield an empty figure of the medium's width; `height` is in points."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(look.rc):
        yield Figure(figsize=(look.width, height / 72), dpi=72, layout="constrained")
