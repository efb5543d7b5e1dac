"""The model card of a post-trained model: what was done to it, in README.md beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longroll.history import history
from longroll.model import RecurrentLM

_OPENED_BY = {
    "transformers": "transformers or fla opens the model without longroll",
    "state-spaces": "mamba-ssm opens the model without longroll",
    "rwkv": "BlinkDL's code opens the `.pth` file without longroll",
}


def model_card(lm: RecurrentLM, run: Mapping[str, Any], layout: str = "transformers") -> str:
    """Markdown with the metadata that the hub reads.

    Args:
        lm: the model; its config tells of the runs before this one.
        run: what identifies the run (`identity.describe_run`): `arguments`, `data`, fingerprints, `versions`.
        layout: whose names and files the model is saved in, as in `Checkpoint.layout`.
    """
    arguments, earlier = run["arguments"], history(lm.model.config)[:-1]
    rows, length = arguments["batch_size"], arguments["length"]
    head = ["---", "tags: [longroll]"]
    if layout == "transformers":
        head.append("library_name: transformers")
    if lm.name.count("/") == 1 and not Path(lm.name).exists():
        head.append(f"base_model: {lm.name}")
    start = (
        "zero states" if arguments["intervention"] == "none" else f"states by `{arguments['intervention']}`"
    )
    lines = [
        *head, "---",
        f"# {Path(lm.name).name}, post-trained from {start}",
        f"{arguments['steps']} steps of {rows} x {length} tokens by longroll. "
        f"Sequences started from {start}. {_OPENED_BY[layout]}.",
        "",
        "| option | |", "|---|---|",
        *(f"| {name} | {value} |" for name, value in arguments.items()),
        *(f"| {name} | {run[name]} |" for name in ("data", "tokenizer", "text", "model") if name in run),
        f"| processes | {run['world_size']} |",
        *(f"| {package} | {version} |" for package, version in run["versions"].items()),
    ]  # fmt: skip
    if earlier:
        told = ", ".join(f"{step['intervention']} ({step.get('steps', '?')} steps)" for step in earlier)
        lines += ["", f"It had been post-trained before: {told}."]
    return "\n".join(lines) + "\n"
