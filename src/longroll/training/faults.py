"""Faults of a run that end in one line: a full disk, too little memory, another process that died."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from longroll import ranks
from longroll.errors import LongrollError, out_of_memory
from longroll.model import RecurrentLM
from longroll.training.options import PosttrainOptions
from longroll.training.plan import fitting_line

_FULL = ("No space left", "File too large", "Disk quota", "PytorchStreamWriter failed", "unexpected pos")


@contextlib.contextmanager
def faults_are_said(output: Path, lm: RecurrentLM, options: PosttrainOptions) -> Iterator[None]:
    """One line for a full disk, too little memory, and another process that died."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        if out_of_memory(error):
            raise LongrollError(_what_would_fit(options) + fitting_line(lm, options)) from error
        if lost := ranks.loss_of_another(error):
            raise LongrollError(f"{lost} Go on by `resume`.") from error
        if _is_full(error):
            mend = "Make room"
        elif isinstance(error, OSError) and _lies_in(error.filename, output):
            mend = "Mend that"
        else:
            raise
        raise LongrollError(
            f"`output` {output} cannot be written to: {error}. {mend} and go on by `resume`, where a "
            "checkpoint was written."
        ) from error


@contextlib.contextmanager
def full_disk_is_said(output: Path) -> Iterator[None]:
    """One line for a disk that is full while a result is written, which the same command writes again."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full(error):
            raise
        raise LongrollError(f"`output` {output} cannot be written to: {error}. Make room.") from error


def _is_full(error: BaseException) -> bool:
    return any(sign in str(error) for sign in _FULL)


def _lies_in(file: Any, folder: Path) -> bool:
    """Return whether the file of an OSError lies in `folder`."""
    return isinstance(file, str | os.PathLike) and Path(file).absolute().is_relative_to(folder.absolute())


def _what_would_fit(options: PosttrainOptions) -> str:
    tokens = f"{options.batch_size} x {options.length} tokens"
    mends = []
    if options.batch_size > 1:
        half = options.batch_size // 2
        mends.append(f"`batch_size` {half} with `accumulation` {options.accumulation * 2}")
    if not options.gradient_checkpointing:
        mends.append("`gradient_checkpointing`")
    if not options.lora_rank:
        mends.append("`lora_rank` 16, which trains fewer weights")
    return f"Out of memory in a micro-batch of {tokens}: take {', or '.join(mends) or 'a smaller model'}."
