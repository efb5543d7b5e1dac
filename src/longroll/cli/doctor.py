"""`longroll doctor`: what this machine can run, and which kernels are in use."""

from __future__ import annotations

from longroll.cli import _options as o


def doctor(json: o.Json = None) -> None:
    """Say what this machine can run and which kernels are in use, with the reason."""
    from rich.table import Table

    from longroll.cli._console import out
    from longroll.results import write_json

    found = examine()
    out.print(f"{found['device']}; torch {found['versions']['torch']}, {found['threads']} threads")
    for name, value in found["versions"].items():
        out.print(f"  {name} {value}", highlight=False)
    table = Table("family", "kind", "state", "recurrence in use")
    for row in found["families"]:
        table.add_row(row["family"], row["kind"], row["state"], row["kernel"])
    out.print(table)
    for problem in found["problems"]:
        out.print(f"! {problem}")
    out.print(found["specimen"])
    if json:
        write_json(json, found)


def examine() -> dict:
    """What `doctor` prints, as data."""
    import torch

    from longroll.cli._console import quiet
    from longroll.errors import LongrollError
    from longroll.families import FAMILIES
    from longroll.model import load
    from longroll.results import provenance

    quiet()
    made = provenance(seed=0, seconds=0.0)
    gpu = torch.cuda.is_available()
    rows, problems = [], []
    for name, family in FAMILIES.items():
        rows.append(
            {
                "family": name,
                "kind": family.kind,
                "state": "in, out, gradients" if family.recurrent else "KV cache; evaluation only",
                "kernel": _kernel(family, gpu),
            }
        )
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


def _kernel(family, gpu: bool) -> str:
    op = {"mamba": "selective_scan", "mamba2": "ssd"}.get(family.kind)
    if op is None:
        return "transformers' attention"
    where = "GPU, plain PyTorch: no fused kernel takes a state yet" if gpu else "CPU"
    return f"ops.{op}, chunked ({where})"
