"""`longroll doctor`: what this machine can run, and which kernels are in use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longroll.cli import _options as o

if TYPE_CHECKING:
    from rich.table import Table

    from longroll.families import Family

Families = Annotated[
    bool,
    typer.Option(
        "--families", help="Test the laws of the state on tiny models of every family; takes about a minute."
    ),
]
Markdown = Annotated[
    Path | None,
    typer.Option(
        help="With --families, write the table to this file, between its lines <!-- families --> and "
        "<!-- /families --> if it has them.",
        callback=o.file_to_write,
    ),
]

Packing = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Print whether documents that are packed into one row see each other in this model.",
    ),
]


def doctor(
    families: Families = False,
    markdown: Markdown = None,
    packing: Packing = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = False,
    plugin: o.PluginName = None,
    json: o.Json = None,
) -> None:
    """Print what this machine can run, which kernels are in use, and why."""
    from longroll.cli._console import hush_libraries, out
    from longroll.errors import LongrollError
    from longroll.results import DoctorResult, PackingResult

    if markdown is not None and not families:
        raise LongrollError("--markdown writes the table that --families makes: give both.")
    hush_libraries()
    if packing is not None:
        if families:
            raise LongrollError("`packing` tries one model and `families` tiny ones: give one of them.")
        result = try_packing(packing, device=device, trust_remote_code=trust_remote_code, plugin=plugin)
        for sentence in result["sentences"]:
            out.print(sentence, markup=False, soft_wrap=True)
        if json:
            PackingResult.from_json(result).write(json)
        return
    for name, given in (("device", device), ("trust_remote_code", trust_remote_code), ("plugin", plugin)):
        if given:
            raise LongrollError(f"`{name}` belongs to `packing`: give a model there too.")
    found = examine()
    if families:
        found["families"] = try_families()
        found["problems"] += [problem for row in found["families"] for problem in row["problems"]]
    out.print(f"{found['device']}; torch {found['versions']['torch']}, {found['threads']} threads")
    for name, value in found["versions"].items():
        out.print(f"  {name} {value}", highlight=False)
    out.print(_tried(found["families"], out.width) if families else _known(found["families"]))
    for problem in found["problems"]:
        out.print(f"! {problem}")
    out.print(found["specimen"])
    if markdown is not None:
        write_markdown(markdown, found["families"])
    if json:
        DoctorResult.from_json(found).write(json)


def examine() -> dict[str, Any]:
    """Return what `doctor` prints, as data."""
    import torch

    from longroll.errors import LongrollError
    from longroll.families import FAMILIES, register_packages
    from longroll.model import load
    from longroll.results import provenance

    made = provenance(seed=0, seconds=0.0)
    gpu = torch.cuda.is_available()
    problems = register_packages()
    rows = [
        {
            "family": name,
            "kind": family.kind,
            "state": "in, out, gradients" if family.recurrent else "rolls out; evaluation only",
            "kernel": in_use(family, gpu),
        }
        for name, family in FAMILIES.items()
    ]
    if not gpu:
        problems.append("no GPU: fine for small models; a 370m model takes hours here")
    try:
        load("specimen")
        specimen = "specimen: loads, self-check passed"
    except LongrollError as error:
        specimen = f"specimen: {error}"
    return {
        "kind": "doctor",
        "device": torch.cuda.get_device_name() if gpu else made["device"],
        "threads": made["threads"],
        "versions": made["versions"],
        "families": rows,
        "problems": problems,
        "specimen": specimen,
    }


def in_use(family: Family, gpu: bool) -> str:
    """Return what computes a family's recurrence on this machine, and why."""
    import torch

    from longroll import ops
    from longroll.conformance.table import paths
    from longroll.ops._backend import choose

    path = paths(family)[gpu]
    if family.op is None or not hasattr(ops, family.op):
        return path
    device = torch.device("cuda" if gpu else "cpu")
    return f"{path.split(',')[0]}, {choose(family.op, device, torch.bfloat16).reason}"


def try_families() -> list[dict[str, Any]]:
    """Return the laws, tried on this machine's GPU or else its CPU."""
    import torch

    from longroll.cli._progress import progress
    from longroll.conformance.table import tabulate
    from longroll.conformance.tiny import CONFIGS, ON_GPU

    with progress("families", total=len(CONFIGS | ON_GPU)) as advance:
        done = iter(range(1, len(CONFIGS | ON_GPU) + 1))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return tabulate(device=device, advance=lambda: advance(next(done)))


def try_packing(
    name: str, *, device: str | None, trust_remote_code: bool, plugin: str | None
) -> dict[str, Any]:
    """Return whether packed documents of a model see each other, as data."""
    from longroll.conformance.packing import open_for_packing, packing

    model, lm = open_for_packing(name, device=device, trust_remote_code=trust_remote_code, plugin=plugin)
    return {"model": name} | packing(model, lm).to_json()


def write_markdown(file: Path, rows: list[dict[str, Any]]) -> None:
    """Put the table into a file: in the place of the one it has, or as the whole of it."""
    from longroll.conformance.table import markdown
    from longroll.files import write_whole

    table, begin, end = markdown(rows), "<!-- families -->\n", "<!-- /families -->"
    text = file.read_text() if file.is_file() else begin + end + "\n"
    if begin not in text or end not in text:
        text = begin + end + "\n"
    before, after = text.split(begin)[0], text.split(end)[1]
    write_whole(file, f"{before}{begin}{table}{end}{after}".encode())


def _known(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Column, Table

    table = Table("family", "kind", "state", Column("recurrence in use", overflow="fold"))
    for row in rows:
        table.add_row(row["family"], row["kind"], row["state"], row["kernel"])
    return table


def _tried(rows: list[dict[str, Any]], width: int) -> Table:
    """Return the table; on a narrow terminal without what computes and what it is checked against
    elsewhere.
    """
    from rich.table import Column, Table

    from longroll.conformance.table import COLUMNS, cells

    here = "gpu" if rows[0]["gpu_tried"] else "cpu"
    shown = [key for key in COLUMNS if width >= 140 or key in ("family", "loads", "state", "gradient", here)]
    wrapped = ("cpu", "gpu", "reference")
    headings = (Column(COLUMNS[key], no_wrap=key not in wrapped, overflow="fold") for key in shown)
    more = "*: not tried on this machine" if width >= 140 else "from 140 columns on, and by --markdown: more"
    table = Table(*headings, caption=f"yes: bit for bit; to 1e-06: rounding; {more}")
    for row in rows:
        cell_of = dict(zip(COLUMNS, cells(row), strict=True))
        table.add_row(*(cell_of[key] for key in shown))
    return table
