"""The model card of a post-trained model: what was done to it, in README.md beside its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longroll.history import history
from longroll.measure.calibration import Calibration
from longroll.model import RecurrentLM
from longroll.printable import printable
from longroll.results import DiagnosisResult

_OPENED_BY = {
    "transformers": "transformers or fla opens the model without longroll",
    "state-spaces": "mamba-ssm opens the model without longroll",
    "rwkv": "BlinkDL's code opens the `.pth` file without longroll",
}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)


def model_card(lm: RecurrentLM, run: Mapping[str, Any], layout: str = "transformers") -> str:
    """Return Markdown with the metadata that the hub reads.

    Args:
        lm: the model; its config tells of the runs before this one.
        run: what identifies the run (`identity.describe_run`): `arguments`, `data`, fingerprints, `versions`.
        layout: whose names and files the model is saved in, as in `Checkpoint.layout`.
    """
    arguments, earlier = run["arguments"], history(lm.model.config)[:-1]
    rows, length = arguments["batch_size"], arguments["length"]
    data = {name: run[name] for name in ("data", "tokenizer", "text", "model") if name in run}
    head = _head(lm, layout)
    start = (
        "zero states" if arguments["intervention"] == "none" else f"states by `{arguments['intervention']}`"
    )
    lines = [
        *head,
        f"# {_plain(Path(lm.name).name)}, post-trained from {start}",
        f"{arguments['steps']} steps of {rows} x {length} tokens by longroll. "
        f"Sequences started from {start}. {_OPENED_BY[layout]}.",
        "",
        "| option | |", "|---|---|",
        *(f"| {name} | {_plain(str(value))} |" for name, value in (*arguments.items(), *data.items())),
        f"| processes | {run['world_size']} |",
        *(f"| {package} | {version} |" for package, version in run["versions"].items()),
    ]  # fmt: skip
    return "\n".join([*lines, *_before(earlier, history(lm.model.config, "calibrate"))]) + "\n"


def calibration_card(lm: RecurrentLM, found: Calibration, *, text: str) -> str:
    """Return the model card of a calibrated model: the scales that its weights hold.

    Args:
        lm: the model.
        found: what `calibrate` found.
        text: names the text that was read.
    """
    rows = [(name, ", ".join(f"{scale:.4g}" for scale in some)) for name, some in found.scales.items()]
    lines = [
        *_head(lm, "transformers"),
        f"# {_plain(Path(lm.name).name)}, calibrated by longroll",
        f"Nothing was trained: {found.what} is scaled in the weights, a number for each {found.unit}. "
        f"{_OPENED_BY['transformers']}.",
        "",
        f"Text: {_plain(text)}. {_plain(found.sentence)}",
        "",
        "| module | scales |", "|---|---|",
        *(f"| {_plain(name)} | {scales} |" for name, scales in rows),
    ]  # fmt: skip
    config = lm.model.config
    return "\n".join([*lines, *_before(history(config), history(config, "calibrate")[:-1])]) + "\n"


def with_diagnosis(card: str, runs: Sequence[DiagnosisResult]) -> str:
    """Put a section of diagnoses at the end of a card, in the place of an earlier one.

    Args:
        card: Markdown; what others wrote in it stays.
        runs: results of the model before its repair, after as many plain steps, after the repair: those
            there are.
    """
    kept = re.sub(r"\n## Diagnosis\n.*?(?=\n##? |\Z)", "", card, flags=re.DOTALL).rstrip()
    lines = ["", "", "## Diagnosis"]
    lines += ["| | nats in range | nats in the last octave | verdict |", "|---|---|---|---|"]
    for run in runs:
        levels = (run.level(name) for name in ("in_range", "far"))
        losses = ("not finite" if math.isnan(level) else f"{level:.3f}" for level in levels)
        lines.append(f"| {' | '.join([_plain(run.label), *losses, run.verdict])} |")
    lines.append("")
    for run in runs:
        read = f"{run.sequences} texts of {run.max_position} tokens, T = {run.train_length}"
        lines.append(f"- {_plain(run.label)} ({read}): {_plain(run.sentence)}")
    return kept + "\n".join(lines) + "\n"


def _head(lm: RecurrentLM, layout: str) -> list[str]:
    """Return the lines of metadata that the hub reads."""
    head = ["---", "tags: [longroll]"]
    if layout == "transformers":
        head.append("library_name: transformers")
    if _HUB_ID.fullmatch(lm.name) and not Path(lm.name).exists():
        head.append(f"base_model: {lm.name}")
    return [*head, "---"]


def _before(runs: Sequence[Mapping[str, Any]], calibrations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines on earlier post-training runs and calibrations."""
    told = ", ".join(f"{step['intervention']} ({step.get('steps', '?')} steps)" for step in runs)
    lines = ["", f"It had been post-trained before: {told}."] if runs else []
    scaled = ", ".join(f"{step['what']} by {step.get('unit', '?')}" for step in calibrations)
    return [*lines, "", f"Its decays had been calibrated before: {scaled}."] if calibrations else lines


def _plain(text: str | None) -> str:
    """Return text that Markdown shows as it is."""
    return re.sub(r"([\\`*_<>\[\]|~])", r"\\\1", printable(text or ""))
