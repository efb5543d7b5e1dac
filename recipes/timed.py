"""Training for so many seconds rather than steps, and rows made beforehand: for recipes sharing one GPU."""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from longroll.data import Windows
from longroll.training import PosttrainOptions, posttrain

BEGAN = time.time()
torch.backends.cudnn.allow_tf32 = False  # full and chunked forward have to agree to 1e-3
MANY = 30_000  # steps; more than any run here has time for


class TimeBudget(TrainerCallback):
    """Ends training at a time of day; the learning rate follows the clock: 3 % warm-up, cosine to 0."""

    def __init__(self, end: float) -> None:
        self.begin, self.end = 0.0, end

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Set the learning rate."""
        if state.global_step <= 3:
            self.begin = time.time()  # kernels are compiled in the first steps
        done = min(1.0, (time.time() - self.begin) / max(1e-3, self.end - self.begin))
        rate = min(1.0, (done + 1e-3) / 0.03) * (0.5 + 0.5 * np.cos(np.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop in time."""
        if time.time() >= self.end:
            control.should_training_stop = True


def train(
    lm: Any,
    rows: Any,
    intervention: Any,
    output: Path,
    *,
    seconds: float | None,
    steps: int,
    callbacks: Sequence[TrainerCallback] = (),
    **how: Any,
) -> dict[str, Any]:
    """`posttrain`, ended `seconds` after the script began (None: after `steps`); what came of it."""
    began = time.time()
    how = {"bf16": lm.device.type == "cuda", "save_steps": 10**9} | how
    if seconds is not None:
        callbacks = [*callbacks, TimeBudget(BEGAN + seconds)]
        how, steps = how | {"schedule": "constant", "warmup": 0.0}, MANY
    options = PosttrainOptions(steps=steps, **how)
    log = posttrain(lm, rows, intervention, options, output, callbacks=[*callbacks])
    losses = [[entry["step"], round(entry["loss"], 4)] for entry in log if "loss" in entry]
    told = {
        "steps": max(entry["step"] for entry in log),
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "decay_speed": options.decay_speed,
        "train_seconds": round(time.time() - began, 1),
        "losses": losses[:: max(1, len(losses) // 20)],
    }
    print(output.name, {key: told[key] for key in ("steps", "train_seconds")}, losses[-1:], flush=True)
    return told


def attempt(job: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a job returns; None where it fails, and print why: one of many jobs does not end all."""
    try:
        return job(*arguments)
    except Exception:
        traceback.print_exc()
        print(
            "failed:", *(argument for argument in arguments if isinstance(argument, str | tuple)), flush=True
        )
        return None


class MixedRows(Dataset):
    """Rows of a task; every so many lanes one of plain text, all of whose tokens are learned."""

    def __init__(self, rows: Any, text: Windows | None, *, every: int) -> None:
        self.rows, self.text, self.every = rows, text, every

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.text is not None and index % self.every == 0:
            return self.text[index // self.every % len(self.text)]
        return self.rows[index]


class StoredRows(Dataset):
    """The first `kept` rows of a data set, made beforehand by several processes, again and again.

    Making a row can cost as much as reading it (milliseconds for BABILong), in the process that has to keep
    the GPU busy.
    """

    def __init__(self, rows: Any, kept: int, *, lanes: int, workers: int = 1) -> None:
        self.items, self.lanes = len(rows), lanes
        self.kept = min(kept, self.items) // lanes * lanes
        parts = np.array_split(np.arange(self.kept), workers)
        _source.append(rows)
        if workers > 1:
            with multiprocessing.get_context("fork").Pool(workers) as pool:
                made = pool.map(_make, parts)
        else:
            made = [_make(parts[0])]
        _source.pop()
        ids, labels, starts = (np.concatenate(columns) for columns in zip(*made, strict=True))
        self.ids, self.labels = torch.from_numpy(ids), torch.from_numpy(labels)
        self.starts = torch.from_numpy(starts)

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        at = index % self.kept
        return {"input_ids": self.ids[at], "shift_labels": self.labels[at], "starts": self.starts[at]}


_source: list[Any] = []  # found there by forked processes: rows need not pickle


def _make(part: np.ndarray) -> tuple[np.ndarray, ...]:
    items = [_source[-1][int(index)] for index in part]
    names = ("input_ids", "shift_labels", "starts")
    return tuple(np.stack([item[name].numpy() for item in items]) for name in names)


def wait_for(path: Path) -> None:
    """Wait until another process has written a file."""
    while not path.exists():
        time.sleep(0.2)
