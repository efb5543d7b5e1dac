"""Where lines and tables go: notices to stderr, results to stdout."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from longroll.cli._flags import in_flags, running
from longroll.printable import printable

if TYPE_CHECKING:
    from longroll.results import DiagnosisResult


class PlainConsole(Console):
    """A console that prints text as it is: no markup, no emoji codes, no control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Make rich text of a string; every string that is printed, in tables too, comes through here."""
        lines = [printable(line) for line in text.split("\n")]
        return super().render_str("\n".join(lines), **options | {"markup": False, "emoji": False})


console = PlainConsole(stderr=True)
out = PlainConsole()


_verbosity = 0


def set_verbosity(level: int) -> None:
    """Choose what stands on standard error beside errors.

    Args:
        level: -1 for nothing; 0 for progress and notices; 1 for what the libraries log, too.
    """
    global _verbosity
    _verbosity = level
    console.quiet = level < 0
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.setLevel(logging.INFO if level > 0 else logging.WARNING)
    if _Notices not in map(type, root.handlers):
        root.addHandler(_Notices())


class _Notices(logging.Handler):
    """Log records as lines on the console; Python's warnings without the line of code that gave them."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.name == "py.warnings":
            text = text.partition(": ")[2].partition("\n")[0]
        elif _verbosity > 0:
            text = f"{record.name}: {text}"
        style = "yellow" if record.levelno >= logging.WARNING else None
        console.print(in_flags(text, running), style=style, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Leave out the library's notices for the length of a with block."""
    logger = logging.getLogger("longroll")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def hush_libraries() -> None:
    """Keep bars and warnings of other libraries out of longroll's output, unless --verbose asks for them."""
    from transformers.utils import logging

    if _verbosity > 0:
        logging.set_verbosity_info()
        logging.disable_default_handler()  # its lines take the way of all others
        logging.enable_propagation()
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


LEVELS = {"in_range": "in range", "2x": "2x T", "8x": "8x T", "64x": "64x T", "far": "last octave"}


def levels_table(runs: Sequence[DiagnosisResult]) -> Table:
    """Return loss in nats (perplexity) of diagnoses side by side, and the std of the state at the end."""
    table = Table(title=f"{runs[0].model}: loss in nats (perplexity), T = {runs[0].train_length}")
    table.add_column("positions")
    several = len({run.sequences for run in runs}) > 1
    for run in runs:
        texts = f" ({run.sequences} texts)" if several else ""
        table.add_column(f"{run.label or ''}{texts}", justify="right")
    for key, name in LEVELS.items():
        if any(_measured(run, key) for run in runs):
            table.add_row(name, *(_loss(run, key) for run in runs))
    if all(run.states for run in runs):
        table.add_row(f"state std at {runs[0].train_length}", *(_std(run, at_end=False) for run in runs))
        table.add_row("state std at the end", *(_std(run, at_end=True) for run in runs))
    table.add_row("verdict", *(run.verdict for run in runs))
    return table


def _measured(run: DiagnosisResult, key: str) -> bool:
    """Return whether a run reaches a level, be its loss finite or not."""
    times = int(key.removesuffix("x")) if key.endswith("x") else 0
    return times * (run.train_length or 0) <= (run.max_position or 0) if times else True


def _loss(run: DiagnosisResult, key: str) -> str:
    value = run.level(key)
    if math.isnan(value):
        return "not finite" if _measured(run, key) else "-"
    return f"{value:.3f} ({math.exp(value):.2f})" if value < 50 else f"{value:.1f}"


def _std(run: DiagnosisResult, *, at_end: bool) -> str:
    """Return mean over layers of the state's standard deviation, at the training length or at the last
    position.
    """
    assert run.states is not None
    positions, length = run.states.position, run.train_length or 0
    index = -1 if at_end else max((i for i, p in enumerate(positions) if p <= length), default=0)
    stds = [layer.std[index] for layer in run.states.layers]
    return f"{sum(math.nan if std is None else std for std in stds) / len(stds):.3f}"
