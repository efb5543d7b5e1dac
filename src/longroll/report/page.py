"""One HTML page that holds everything: verdict, levels, figures, numbers, and how they were made."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longroll.files import write_whole
from longroll.printable import printable
from longroll.report import units, verdict
from longroll.report.plates import Panel, Plate, plates
from longroll.report.runs import AnyRun, Run, common_unit, ordered
from longroll.report.style import PHONE, WEB, RunStyle, css_variables, run_styles
from longroll.report.svg import to_svg

_TEMPLATES = Path(__file__).parent / "templates"
_PROVENANCE = ("device", "threads", "seed", "seconds", "date")  # shown in this order, anything else after


def render(runs: Sequence[AnyRun], *, title: str | None = None) -> str:
    """Return the report on some runs as one self-contained HTML page.

    Nothing is fetched when it is opened; the same runs always give the same page.

    Args:
        runs: Results of `longroll diagnose`, or their JSON.
        title: The title; by default the base model's name and its training length.
    """
    import jinja2
    from markupsafe import Markup

    runs = ordered(runs)
    styled = list(zip(runs, run_styles(runs), strict=True))
    headline, further = verdict.statements(styled)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_printable,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(
        title=title or _title(runs[0]),
        facts=_facts(runs[0]),
        css=Markup(css_variables() + "\n" + (_TEMPLATES / "page.css").read_text("utf-8")),
        styles=[style for _, style in styled],
        headline=headline,
        further=further,
        summary=verdict.summary(styled),
        levels=verdict.levels(styled),
        notes=verdict.notes(styled),
        level_unit="bits per byte" if common_unit(runs) == "bits_per_byte" else "nats per token",
        plates=[_drawn(plate, f"p{i}") for i, plate in enumerate(plates(runs))],
        made=[_made(run, style) for run, style in styled],
    )


def _printable(value: Any) -> Any:
    """Drop control characters from text; markup of our own stays as it is."""
    return printable(value) if type(value) is str else value


def write_report(runs: Sequence[AnyRun], path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Write the page to `path`, whole or not at all, and return the path.

    Raises:
        LongrollError: The place cannot be written, or the runs hold nothing to report.
    """
    return write_whole(path, render(runs, title=title).encode("utf-8"))


def _drawn(plate: Plate, prefix: str) -> dict[str, Any]:
    """Draw a plate: a wide figure also in a narrow version for phones; small ones only in that."""
    panels = []
    for i, panel in enumerate(plate.panels):
        looks = (WEB, PHONE) if plate.wide else (PHONE,)
        panels.append(
            {
                "style": panel.style,
                "note": panel.note,
                "svgs": [_svg(plate, panel, f"{prefix}{i}{look.name[0]}", look) for look in looks],
            }
        )
    return {"plate": plate, "panels": panels}


def _svg(plate: Plate, panel: Panel, prefix: str, look: Any) -> Any:
    from markupsafe import Markup

    return Markup(
        to_svg(
            panel.draw(look),
            prefix=prefix,
            description=f"{panel.data.sentence()} {plate.look_for}",
            title=panel.data.sentence(),
        )
    )


def _title(run: Run) -> str:
    name = (run.model or run.label or "Recurrent language model").rstrip("/").split("/")[-1]
    return f"{name} past {units.position(run.train_length)} tokens" if run.train_length else name


def _facts(run: Run) -> list[str]:
    """List what the base is, in a few words each."""
    facts = [run.architecture] if run.architecture else []
    if run.parameters:
        facts.append(f"{units.parameters(run.parameters)} parameters")
    if run.train_length:
        facts.append(f"trained on {units.position(run.train_length)} tokens")
    if run.max_position:
        facts.append(f"measured to {units.position(run.max_position)}")
    if run.sequences:
        facts.append(f"{run.sequences:,} sequences")
    return facts


def _made(run: Run, style: RunStyle) -> dict[str, Any]:
    """List what is needed to make the run again."""
    found = run.provenance.to_json() if run.provenance else {}
    keys = [key for key in _PROVENANCE if key in found]
    keys += [key for key in found if key not in (*_PROVENANCE, "command", "versions")]
    items = [("model", run.model)] if run.model else []
    items += [(key.replace("_", " "), _plain(key, found[key])) for key in keys if found[key] is not None]
    versions = found.get("versions")
    if versions:
        items.append(("versions", _plain("versions", versions)))
    return {"style": style, "command": found.get("command") or "", "items": items}


def _plain(key: str, value: Any) -> str:
    if key == "seconds":
        return f"{value:,.1f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return str(value)
