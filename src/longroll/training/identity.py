"""What makes a run this run: a resumed one must be the same, or say what differs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from longroll import ranks
from longroll.data import Corpus
from longroll.data.windows import Item
from longroll.errors import LongrollError
from longroll.interventions import Intervention
from longroll.measure.held_out import HeldOutData
from longroll.model import RecurrentLM
from longroll.results import (
    fingerprint,
    fingerprint_of_arrays,
    package_versions,
    read_json,
    same_form,
    warn_of_changes,
)

# do not change what is learned
_FREE = (
    *("price", "save_steps", "cuda_graphs", "gradient_checkpointing", "report_to", "format"),
    *("on_not_finite", "deterministic"),
)
_SAMPLED = 8  # rows of a task that are compared
_TASK = {"data": "another `task`"}
_WHAT = {
    "model": "another model: its weights differ",
    "tokenizer": "another `tokenizer`",
    "text": "another `text`, or other rows of `task`",
    "held_out": "other held-out text",
}
"""What a run is of, the cause before what follows from it: another tokenizer makes another text."""

logger = logging.getLogger("longroll")


def describe_run(
    lm: RecurrentLM,
    data: Corpus | Dataset[Item],
    options: Any,
    intervention: Intervention | None,
    world_size: int,
    *,
    held_out: HeldOutData | None = None,
) -> dict[str, Any]:
    """Return what identifies a run, as JSON: arguments, model, text, tokenizer, task, processes, versions."""
    arguments = {name: value for name, value in vars(options).items() if name not in _FREE}
    arguments["intervention"] = "none" if intervention is None else intervention.name
    arguments |= settings_of(intervention)
    if lm.int8:
        arguments["dtype"] = "int8"
    content: dict[str, Any]
    if isinstance(data, Corpus):
        content = {"data": "text", "tokenizer": data.tokenizer}
        content["text"] = fingerprint_of_arrays([data.ids, data.offsets])
    else:
        tasks = getattr(data, "tasks", [getattr(data, "task", None)])
        names = [task.name for task in tasks if task is not None]
        content = {"data": " ".join([type(data).__name__, *names]), "tokenizer": None}
        content["text"] = fingerprint_of_arrays(_rows(data))
    return {
        "arguments": arguments,
        **content,
        "held_out": None if held_out is None else held_out.fingerprint,
        "model": fingerprint(lm),
        "world_size": world_size,
        "versions": package_versions(),
        "device": lm.device.type,
    }


def settings_of(intervention: Intervention | None) -> dict[str, Any]:
    """Return the arguments that an intervention was made with, besides its seed."""
    made = vars(intervention).items() if intervention else ()
    return {
        name: value
        for name, value in made
        if isinstance(value, (bool, int, float)) and not name.startswith("_") and name != "seed"
    }


def check_same_run(file: Path, now: dict[str, Any]) -> None:
    """Compare a run with the one that `file` describes.

    Other versions and devices are warned of. Another number of processes is the same run if they read as many
    rows together, which is said.

    Raises:
        LongrollError: for another model, text, tokenizer, task or argument.
    """
    before = read_json(file)
    if not (same_form(before, now) and _counts_rows(before)):
        raise LongrollError(f"`resume`: {file} describes no run of this longroll: name another `output`.")
    _refuse_others(before, now, _TASK)  # a task and an intervention have options of their own by default
    _check_rows(before, now)
    for name in {"intervention": None} | before["arguments"] | now["arguments"]:
        was, given = before["arguments"].get(name), now["arguments"].get(name)
        if name != "batch_size" and was != given:
            raise LongrollError(
                f"`resume`: the run was started with `{name}` {was}, not {given}: go on as it "
                "was started, or name another `output`."
            )
    _refuse_others(before, now, _WHAT)
    warn_of_changes(before, now)


def check_same_everywhere(own: Mapping[str, Any]) -> None:
    """Refuse processes of one run that were started to do something else each; every rank must call this.

    Args:
        own: what this process was started with, by names that a user knows.

    Raises:
        LongrollError: on every rank, naming the first rank that differs from rank 0, and in what.
    """
    first, *others = ranks.gather(dict(own))
    for rank, other in enumerate(others, start=1):
        for name, value in first.items():
            if other.get(name) != value:
                raise LongrollError(
                    f"Rank {rank} was started with `{name}` {other.get(name)}, and rank 0 with {value}: "
                    "start all processes by the same command, on the same files."
                )


def _counts_rows(run: dict[str, Any]) -> bool:
    counts = run["arguments"].get("batch_size"), run["world_size"]
    return all(isinstance(count, int) and count >= 1 for count in counts)


def _refuse_others(before: dict[str, Any], now: dict[str, Any], kinds: dict[str, str]) -> None:
    for name, what in kinds.items():
        was, given = before.get(name), now.get(name)
        if was != given:
            again = ", with the model loaded again if a run has trained it," if name == "model" else ""
            raise LongrollError(
                f"`resume`: the run was started with {what} ({was}, not {given}): go on as it was "
                f"started{again or ','} or name another `output`."
            )


def _check_rows(before: dict[str, Any], now: dict[str, Any]) -> None:
    """The rows of a micro-batch of all ranks must stay."""
    was, given = before["world_size"], now["world_size"]
    rows = before["arguments"]["batch_size"] * was
    if rows != now["arguments"]["batch_size"] * given:
        size, asked = before["arguments"]["batch_size"], now["arguments"]["batch_size"]
        mend = f"give `batch_size` {rows // given}"
        if rows % given:
            fitting = [n for n in range(1, rows + 1) if rows % n == 0]
            mend = (
                f"start {', '.join(map(str, fitting))} processes with `batch_size` {rows} over their number"
            )
        raise LongrollError(
            f"`resume`: the run was started with `batch_size` {size} on {_processes(was)}, {rows} rows "
            f"together, and would go on with `batch_size` {asked} on {_processes(given)}, {asked * given} "
            f"rows: {mend}, or name another `output`."
        )
    if was != given:
        logger.warning(
            "The run was started on %s and goes on on %d: its %d rows and their states are dealt again.",
            _processes(was), given, rows,
        )  # fmt: skip


def _processes(number: int) -> str:
    return f"{number} process" if number == 1 else f"{number} processes"


def _rows(data: Any) -> list[Any]:
    """Return some rows of a dataset, from its beginning to its end, and how many it has."""
    size = len(data)
    chosen = sorted({round(i * (size - 1) / (_SAMPLED - 1)) for i in range(_SAMPLED)}) if size else []
    items = [data[index] for index in chosen]
    return [[size], *(item[name] for item in items for name in sorted(item))]
