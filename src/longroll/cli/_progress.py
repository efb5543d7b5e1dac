"""Progress of long work, on standard error: a bar on a terminal, else a plain line every so often."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longroll.cli._console import console
from longroll.printable import printable

if TYPE_CHECKING:
    from transformers import TrainerCallback

FIRST, EVERY = 5.0, 30.0
"""Seconds until the first plain line, and from line to line; in long runs a twentieth of their time."""


def waiting(what: str) -> AbstractContextManager[Any]:
    """Show that something goes on whose end is not known."""
    return console.status(console.render_str(what)) if _on_terminal() else nullcontext()


@contextmanager
def progress(what: str, *, total: int | None) -> Iterator[Callable[..., None]]:
    """Show how much of `total` is done: call what it yields with the amount, and with a note on it."""
    with _shown() as show:
        yield lambda done, note="": show(what, done, total, note)


@contextmanager
def stages(label: str) -> Iterator[Callable[[str, int, int | None], None]]:
    """Show work in several stages: call what it yields with the stage, what is done of it, its total."""
    with _shown() as show:
        yield lambda stage, done, total: show(f"{label}: {stage}", done, total)


Show = Callable[..., None]
"""Takes the work's name, how much is done, the total if it is known, and a note."""


def _on_terminal() -> bool:
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def _shown() -> Iterator[Show]:
    if not _on_terminal():
        lines: dict[str, Lines] = {}
        yield lambda what, *done: lines.setdefault(what, Lines(what)).update(*done)
        return
    name, note = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[note]}"))
    columns = name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int | None, note: str = "") -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(printable(what), total=total, note=note)
            bar.update(tasks[what], completed=done, note=note)

        yield show


class Lines:
    """Plain lines on one piece of work: how much of it is done, a note, and the time left."""

    def __init__(self, what: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.what, self.clock = what, clock
        self.began = clock()
        self.due = self.began + FIRST
        self.first: tuple[float, int] | None = None  # when the first report came, and what was done then

    def update(self, done: int, total: int | None, note: str = "") -> None:
        """Print a line if one is due."""
        now = self.clock()
        self.first = self.first or (now, done)
        if now < self.due:
            return
        self.due = now + max(EVERY, (now - self.began) / 20)
        count = f"{done:,} of {total:,}" if total else f"{done:,}"
        parts = [f"{self.what}: {count}", note, self._left(now, done, total)]
        console.print(", ".join(part for part in parts if part), highlight=False, soft_wrap=True)

    def _left(self, now: float, done: int, total: int | None) -> str:
        assert self.first is not None
        since, before = self.first
        if not total or done <= before:
            return ""
        return f"{clock((total - done) * (now - since) / (done - before))} left"


def clock(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def training_progress(advance: Callable[..., None], *, tokens: int) -> TrainerCallback:
    """Return a Trainer callback that reports each step, the last logged loss and the tokens a second.

    Args:
        advance: what `progress` yields.
        tokens: that a process reads in a step.
    """
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        loss, began = "", 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began, self.before = time.perf_counter(), state.global_step

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                steps = state.global_step - self.before
                speed = steps * tokens * args.world_size / (time.perf_counter() - self.began)
                advance(state.global_step, f"{self.loss}{speed:,.0f} tokens/s")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                self.loss = f"loss {float(logs['loss']):.3f}, "

    return Report()
