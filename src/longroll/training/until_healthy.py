"""Look before a repair, and end it in time: both on data that training does not read.

A look declines a model that holds. `UntilHealthy` measures a run as it goes, keeps the best checkpoint within
a budget in range, and ends the run when nothing is left to gain or the budget is spent. It decides by the
measures in Trainer's log alone, which a checkpoint keeps: a resumed run decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from longroll.errors import LongrollError
from longroll.measure.advice import LEAVE_ALONE
from longroll.measure.held_out import HeldOutData, Reading
from longroll.model import RecurrentLM
from longroll.training.checkpoints import checkpoint_of

PATIENCE = 2
"""Measures without progress, or over the budget, after which a run ends."""
PLACES = 2
"""Decimals of a loss in nats that count as progress."""
_LOGGED = ("held_out_in_range", "held_out_far", "held_out_holds")

Tell = Callable[[str], object]
"""Called with a sentence for the user."""


class Declined(LongrollError):
    """A run that would do no good: no model was written."""

    def __init__(
        self, message: str, *, reading: Reading | None = None, log: Sequence[dict[str, Any]] = ()
    ) -> None:
        super().__init__(message)
        self.reading = reading
        """Measurement before the run."""
        self.log = list(log)
        """Trainer's log of a run without a gain."""


class NoGain(Declined):
    """A run that ended without a better model within its price; its checkpoints stay."""


class Look(TrainerCallback):
    """Notes in Trainer's log, which checkpoints keep, what a look before the run read."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note it, in a run that begins."""
        if not state.global_step:
            state.log_history.append({"step": 0, "look": self.reading.to_json()})


def look_in(log: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return what a look before the run read, by Trainer's log; None where there was none."""
    return next((entry["look"] for entry in log if "look" in entry), None)


_LEFT = f"{LEAVE_ALONE.sentence} Nothing is trained or written without `force`."


def look(lm: RecurrentLM, held_out: HeldOutData, tell: Tell, *, left: str = _LEFT) -> Reading:
    """Measure whether a model breaks on held-out data, on every rank together.

    Args:
        lm: the model.
        held_out: the data.
        tell: told what was seen of a model that breaks.
        left: what is said of one that holds.

    Raises:
        Declined: for a model that holds.
    """
    reading = held_out.read(lm.eval())
    seen = f"{reading.sentence} (a look at {reading.read}, {reading.seconds:.1f} s)"
    if reading.holds:
        unread = "Positions farther out were not read: longroll diagnose reads them."
        raise Declined(f"{seen} {left} {unread}", reading=reading)
    tell(seen)
    return reading


@dataclass(frozen=True)
class Measure:
    """Held-out losses after a step, nats a token."""

    step: int
    in_range: float
    far: float
    holds: bool


@dataclass(frozen=True)
class Decision:
    """Decision that the measurements of a run lead to."""

    best: Measure | None
    """The best one within the budget; None: no measure is better far out and within it."""
    stop: str | None
    """Why the run ends; None: it goes on."""


def measures_of(log: Sequence[Mapping[str, Any]]) -> list[Measure]:
    """Return the measures in Trainer's log, the first of them before any step."""
    near, far, holds = _LOGGED
    return [Measure(e["step"], e[near], e[far], bool(e[holds])) for e in log if near in e]


def decide(measures: Sequence[Measure], price: float) -> Decision:
    """Choose the best measure, by its far loss, then its loss in range, to two decimals.

    Args:
        measures: the first is of the model before any step.
        price: nats in range that a repair may cost against it.
    """
    before, *after = measures
    within = [m for m in after if m.in_range - before.in_range <= price]
    better = [m for m in within if _gains(m, before)]
    best = min(better, key=lambda m: (round(m.far, PLACES), round(m.in_range, PLACES)), default=None)
    last = after[-PATIENCE:]
    if len(last) == PATIENCE and not any(m in within for m in last):
        return Decision(best, "the budget in range is spent")
    if best is not None and best.holds and sum(m.step > best.step for m in after) >= PATIENCE:
        return Decision(best, "the far loss is level, and nothing is gained any more")
    return Decision(best, None)


def _gains(measure: Measure, before: Measure) -> bool:
    """Return whether the far loss is lower; a finite loss is lower than one that is not."""
    return math.isfinite(measure.far) and not measure.far >= before.far


class UntilHealthy(TrainerCallback):
    """Measures an `InitialStateTrainer` as it trains, and ends it in time.

    Args:
        trainer: whose model is measured and whose log is written.
        held_out: what is read.
        price: as for `decide`.
        every: steps between two measures.
        tell: told of each measure.
        before: the reading of the model before any step; None: it is measured.
    """

    def __init__(
        self,
        trainer: Any,
        held_out: HeldOutData,
        *,
        price: float,
        every: int,
        tell: Tell,
        before: Reading | None = None,
    ) -> None:
        self.trainer, self.held_out, self.price, self.every, self.tell = trainer, held_out, price, every, tell
        self.before = before

    def decision(self) -> Decision:
        """Return what the log calls for."""
        return decide(measures_of(self.trainer.state.log_history), self.price)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the model before any step, unless a checkpoint or a look has it."""
        if state.best_global_step:  # the folder may have been moved
            state.best_model_checkpoint = str(checkpoint_of(args.output_dir, state.best_global_step))
        if not measures_of(state.log_history):
            self._note(state, self.before or self._read())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure, keep the best, and end the run in time."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        should_log = control.should_log  # which a log in between turns off
        self._note(state, self._read())
        control.should_log = should_log
        decision = self.decision()
        if decision.best is not None and decision.best.step == state.global_step:
            state.best_global_step, state.best_metric = state.global_step, decision.best.far
            control.should_save = True
        if decision.stop:
            control.should_save = control.should_training_stop = True

    def _read(self) -> Reading:
        lm, was_training = self.trainer.lm, self.trainer.base.training
        lm.eval()
        with self.trainer.accelerator.autocast():
            reading = self.held_out.read(lm)
        lm.train(was_training)
        return reading

    def _note(self, state: Any, reading: Reading) -> None:
        numbers = (reading.in_range, reading.far, float(reading.holds))
        self.trainer.log(dict(zip(_LOGGED, numbers, strict=True)))
        before = measures_of(state.log_history)[0]
        paid = f" ({reading.in_range - before.in_range:+.3f})" if state.global_step else ""
        levels = f"Step {state.global_step}: in range {reading.in_range:.3f}{paid}, far {reading.far:.3f}"
        if reading is self.before:  # whose sentence and seconds the look has told
            self.tell(f"{levels}, as the look read.")
        else:
            self.tell(f"{levels}. {reading.sentence} ({reading.seconds:.1f} s)")


def keep_best(trainer: Any, price: float, tell: Tell) -> dict[str, Any]:
    """Load the weights of the best measure whose checkpoint is there, and tell what they cost.

    Returns:
        `kept_step`; `paid` and `price`, nats in range; `holds`, whether the far loss of the kept model is
        level.

    Raises:
        NoGain: where no measure within the budget is better far out than the model before.
    """
    measures = measures_of(trainer.state.log_history)
    before, *after = measures
    there = [m for m in after if _is_there(trainer, m.step)]
    best = decide([before, *there], price).best
    if best is None:
        gained = [m for m in there if _gains(m, before)]
        stay = f"The checkpoints stay in {trainer.args.output_dir}; another run needs another `output`."
        raise NoGain(f"{_too_dear(before, gained, price)} {stay}", log=trainer.state.log_history)
    if best.step != trainer.state.global_step:
        trainer.state.best_global_step = best.step
        trainer.state.best_model_checkpoint = str(checkpoint_of(trainer.args.output_dir, best.step))
        trainer._load_best_model()
    paid = best.in_range - before.in_range
    why = decide(measures, price).stop or "all steps are done"
    tell(
        f"Kept step {best.step} of {trainer.state.global_step} ({why}): "
        f"far {before.far:.3f} -> {best.far:.3f}, in range {before.in_range:.3f} -> {best.in_range:.3f}, "
        f"which {'costs' if paid > 0 else 'gains'} {abs(paid):.3f} nats (budget: {price:g})."
    )
    if not best.holds:
        tell("The kept model still breaks. More `steps`, or a higher `price`, may repair it.")
    return {"kept_step": best.step, "paid": paid, "price": price, "holds": best.holds}


def _is_there(trainer: Any, step: int) -> bool:
    return step == trainer.state.global_step or checkpoint_of(trainer.args.output_dir, step).is_dir()


def _too_dear(before: Measure, gained: Sequence[Measure], price: float) -> str:
    if not gained:
        return "No measure is better far out than the model before. No model is saved."
    least = min(gained, key=lambda m: m.in_range)
    paid = least.in_range - before.in_range
    return (
        f"No measure within `price` {price:g} is better far out: step {least.step} costs {paid:.3f} nats in "
        f"range and reads {least.far:.3f} far out, from {before.far:.3f}. No model is saved: `resume` with a "
        f"`price` of {paid + 0.001:.3f} keeps it."
    )
