"""What a reproduction found, a row for each model and arm, and the page that puts it beside the paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longroll.files import write_whole
from longroll.printable import printable
from longroll.report.style import css_variables
from longroll.reproduce.checkpoints import ARMS, PAPER
from longroll.results import DiagnosisResult

_TEMPLATES = Path(__file__).parent.parent / "report" / "templates"
_FAR = 32_768  # the position of the paper's figures
_EARLY, _END = 0.5, 4  # remembrance of the first half of 4 T, predicted at 4 T


@dataclass(frozen=True)
class Row:
    """A model after one arm; losses as perplexities a token, None where they were not measured."""

    model: str
    arm: str
    """A key of `ARMS`, or `base`."""
    in_range: float | None
    """Over [0, T)."""
    far: float | None
    """Over the octave to 32k."""
    last: float | None
    """Over the last octave."""
    remembrance: float | None
    """Effective remembrance of the tokens before 2 T, predicted at 4 T."""
    std: float | None
    """Mean over layers of the state's standard deviation at the end, over that at T."""
    verdict: str
    paper_in_range: float | None
    """The paper's perplexity at 2k."""
    paper_far: float | None
    """The paper's perplexity at 32k."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def rows_of(results: Mapping[str, Mapping[str, DiagnosisResult]]) -> list[Row]:
    """Return a row for each result of `model -> arm -> diagnosis`, in the order given."""
    rows = []
    for model, arms in results.items():
        for arm, found in arms.items():
            at_range, at_far = PAPER.get(model, {}).get(arm, (None, None))
            rows.append(
                Row(
                    model=model,
                    arm=arm,
                    in_range=_perplexity(found.level("in_range")),
                    far=_perplexity(_octave(found, _FAR)),
                    last=_perplexity(found.level("far")),
                    remembrance=_remembered(found),
                    std=_grown(found),
                    verdict=found.verdict,
                    paper_in_range=at_range,
                    paper_far=at_far,
                )
            )
    return rows


HEADS = (
    "model", "post-trained by", "perplexity in range", "at 32k", "last octave", "remembrance at 4 T",
    "growth of the state's std", "verdict", "paper at 2k", "paper at 32k",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """Return a row as text under `HEADS`."""
    label = "base" if row.arm == "base" else ARMS[row.arm]
    values = (row.in_range, row.far, row.last)
    return [
        row.model, label, *(_text(value, 2) for value in values),
        _text(row.remembrance, 3), _text(row.std, 2), row.verdict,
        _text(row.paper_in_range, 2), _text(row.paper_far, 2),
    ]  # fmt: skip


def write_index(
    rows: Sequence[Row], pages: Mapping[str, Sequence[Path]], folder: Path, *, facts: Sequence[str]
) -> Path:
    """Write `index.html`: the table of all models, with a link to the page and figures of each.

    Args:
        rows: the rows of the table.
        pages: the files of each model, below `folder`.
        folder: where the page goes.
        facts: the facts of the run, a few words each.

    Raises:
        LongrollError: the place cannot be written.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("reproduce.html.j2").render(
        css=Markup(css_variables() + "\n" + (_TEMPLATES / "page.css").read_text("utf-8")),
        facts=[printable(fact) for fact in facts],
        heads=HEADS,
        rows=[cells(row) for row in rows],
        pages={
            name: [path.relative_to(folder).as_posix() for path in files] for name, files in pages.items()
        },
    )
    return write_whole(folder / "index.html", page.encode("utf-8"))


def _octave(found: DiagnosisResult, stop: int) -> float:
    """Return mean loss over [stop / 2, stop), from the bins of the curve; NaN where they do not reach
    there.
    """
    curve = found.curve
    if curve is None or curve.start is None or curve.stop is None or curve.stop[-1] < stop:
        return math.nan
    total, count = 0.0, 0
    for start, end, loss in zip(curve.start, curve.stop, curve.loss, strict=True):
        inside = min(end, stop) - max(start, stop // 2)
        if inside > 0:
            total, count = total + inside * (math.nan if loss is None else loss), count + inside
    return total / count


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < 100 else None


def _remembered(found: DiagnosisResult) -> float | None:
    kept, length = found.remembrance, found.train_length
    if kept is None or length is None or _END * length not in kept.ends:
        return None
    row = min(range(len(kept.starts)), key=lambda i: abs(kept.starts[i] - _EARLY * _END * length))
    return kept.mean[row][kept.ends.index(_END * length)]


def _grown(found: DiagnosisResult) -> float | None:
    if found.states is None or found.train_length is None:
        return None
    inside = max((i for i, p in enumerate(found.states.position) if p <= found.train_length), default=0)
    pairs = [(layer.std[inside], layer.std[-1]) for layer in found.states.layers]
    if any(value is None for pair in pairs for value in pair):
        return None
    before, after = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return after / before if before else None


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}" if value < 1000 else f"{value:.3g}"
