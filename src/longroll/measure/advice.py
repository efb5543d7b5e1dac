"""What to do about a diagnosis: which intervention, for how long, and why."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from longroll.data import DocumentLengths
from longroll.interventions.recipes import DEFAULT, NAMES, NON_STATIONARY, WINDOWS, choose, recipe_of
from longroll.measure._blame import Blame, scaling_factor
from longroll.measure.compare import Comparison
from longroll.measure.iid import IIDTest
from longroll.measure.judge import TOLERANCE
from longroll.measure.stationarity import EndDrift

STEPS, BATCH_SIZE = 500, 16
"""Steps of the paper (section 4) and rows of our default batch."""
WORTH_SAVING = 0.05
"""Nats in range: a repair that costs more is worth another try."""
CLIPS = 0.8
"""Share of the damage that states held in range win back, from which the reading that does so is named."""
_RESET = "from the last T tokens alone (`reading` reset), which forgets what lies before them"
_TRAINING = 3.5  # forward passes that a training step takes: the backward is two, the rest is the optimizer


@dataclass(frozen=True)
class Advice:
    """The next step."""

    intervention: str | None
    """Its short name; the name of the recipe that chooses it where the documents to train on are not known;
    None for a model that is better left alone."""
    sentence: str
    command: str | None = None
    steps: int = 0
    tokens: int = 0
    """Tokens that the repair reads."""
    seconds: float = 0.0
    """Estimate on this device, from the speed of the roll-out."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for results."""
        return asdict(self)


LEAVE_ALONE = Advice(None, "Leave it alone: a repair would only cost loss in range.")
ENOUGH = 16
"""Training lengths over which a model that holds is left alone; one that holds over fewer may break soon
after."""
SOUND = "Its states are sound, so no intervention on them would repair it"
NEITHER = (
    "Its recurrent states are not the cause, so no intervention on them would repair it, and no other "
    "reading of its attention helps either."
)
NO_STATE = Advice(None, "It has no recurrent state, so there is none to repair: an intervention needs one.")


def of_sound(length: int, train_length: int) -> Advice:
    """Return what to do with a model that holds over `length` positions."""
    if length >= ENOUGH * train_length:
        return LEAVE_ALONE
    return Advice(
        None,
        f"It holds as far as it was read, which does not tell whether it breaks soon after: read "
        f"{ENOUGH * train_length:,} positions or more (`length`).",
    )


def of_dtype(model: str, dtype: str, *, told: bool) -> Advice:
    """Return what to do where the loss in 16 bits is not finite.

    Args:
        model: its name, for the command.
        dtype: the dtype of its weights.
        told: whether float32 was tried, and is finite.
    """
    other = "float32" if dtype == "bfloat16" else "bfloat16"
    command = shlex.join(["longroll", "diagnose", model, "--dtype", other])
    if told:
        return Advice(
            None, f"Read it in {other}: the fault is {dtype}'s, which no repair of states removes.", command
        )
    why = "memory was too short to try float32, which would tell the dtype's fault from the states'"
    return Advice(None, f"Read it in {other} before any repair: {why}.", command)


def after_repair(
    model: str, repair: str | None, price: Comparison | None, rival: float | None = None
) -> Advice:
    """Return what to do with a model that was repaired and holds.

    Args:
        model: its name, for the command.
        repair: the intervention by its short name, where the config tells of one.
        price: against the control, else the model before; None where neither was given.
        rival: nats by which a fresh start of the model before reads lower far out; None where not known.
    """
    found = _of_price(model, repair, price)
    if rival is None or rival <= TOLERANCE:
        return found
    return replace(
        found,
        sentence=f"{found.sentence} The model before reads far text {rival:.2f} nats lower still {_RESET}.",
    )


def _of_price(model: str, repair: str | None, price: Comparison | None) -> Advice:
    holds = f"It holds after {NAMES.get(repair, repair)}" if repair else "It holds"
    if price is None:
        command = shlex.join(["longroll", "diagnose", model, "--against", "BASE.json"])
        return Advice(None, f"{holds}; its price in range shows against the model before.", command)
    paid = price.in_range
    if paid.high is None:
        dear = paid.mean > WORTH_SAVING
    else:
        dear = paid.sign > 0 and paid.high > WORTH_SAVING
    if dear:
        return Advice(
            None,
            f"{holds}, at a price in range. The default recipe of `longroll posttrain` may cost less, or "
            "fewer steps.",
        )
    return Advice(None, f"{holds}: keep it.")


REPAIRS = (
    "Training then covers the states past T. It adds no memory, does not repair the read-out, corrects no "
    "errors that a model writes into its state."
)
"""What a repair does and does not do: docs/choose.md."""


def advise(
    model: str | None,
    train_length: int,
    *,
    flags: Sequence[str] = (),
    documents: DocumentLengths | None = None,
    breaks: bool = True,
    iid: IIDTest,
    ends: EndDrift,
    tokens_per_second: float,
    severity: float = math.nan,
) -> Advice:
    """Choose an intervention for a model that reads worse past T than from a fresh start.

    State Passing and TBPTT repair every model of the paper; IID noise fails where states are not IID (paper,
    section 4), and State Passing where a text's end is no place to start another (section 6.2). Between the
    first two the default recipe decides (`longroll.interventions.recipes`), as `longroll posttrain` does.

    Args:
        model: its name, for the command; None: no command opens it.
        train_length: T.
        flags: what the command needs besides to open it.
        documents: lengths of the documents that a repair trains on; None: not known, and the recipe is named.
        breaks: whether its loss rises above its level in range, rather than only above a fresh start's: a
            model of the second kind is repaired too where `severity` is known and above the tolerance.
        iid: the test of its states at T.
        ends: how the ends of the texts differ.
        tokens_per_second: speed of a forward on this device.
        severity: nats above a fresh start over the last octave of positions.
    """
    tokens = STEPS * BATCH_SIZE * train_length
    seconds = tokens * _TRAINING / tokens_per_second
    real, noise = iid.ranks
    share = f"{100 * iid.share:.0f} % of its heads"
    ranks = f"effective rank {real:.3g}, noise of the same moments {noise:.3g}"
    named: tuple[str, ...] = ()
    if not ends.stationary:
        choice, name, named = NON_STATIONARY, NAMES[NON_STATIONARY], ("--intervention", NON_STATIONARY)
        why = (
            f"these texts end unlike they go on (drift {ends.drift:.2f}), so a passed final state "
            "does not suit the beginning of a text, and State Passing is the wrong tool"
        )
        if iid.share > 0:
            why += f"; check the result, since {share} have states that are not IID ({ranks})"
    else:
        choice, name, why = _by_recipe(documents, train_length)
        if iid.share > 0:
            why += (
                f"{share} have states that are not IID ({ranks}), so noise is a poor stand-in, the poorer "
                "the larger the model"
            )
        else:
            why += f"its states could be IID ({ranks}), yet Fitted Noise repaired the loss less where tried"
    # the diagnosis has read farther than the look of posttrain
    command = model and _command(model, flags, [*named, "--train-length", str(train_length), "--force"])
    if not (breaks or severity > TOLERANCE):
        might = f"a repair by {name} may win that back, at some loss in range"
        return Advice(None, f"It keeps its level, so leave it alone; {might}.")
    sentence = "" if breaks else "It keeps its level because far text is easier. "
    sentence += (
        f"Repair it by {name}: {why}. {REPAIRS} {STEPS} steps of {BATCH_SIZE} x {train_length} tokens take "
        f"about {_duration(seconds)} on this device; fewer often do."
    )
    if severity > TOLERANCE and math.isfinite(severity):
        sentence += f" Untrained, the model reads far text {severity:.2f} nats lower {_RESET}."
    return Advice(choice, sentence, command, STEPS, tokens, seconds)


def _by_recipe(documents: DocumentLengths | None, train_length: int) -> tuple[str, str, str]:
    """Return what the default recipe takes, its name, and the beginning of a reason."""
    if documents is None:
        recipe = recipe_of(DEFAULT)
        long = f"{NAMES[recipe.long]} for documents of {WINDOWS} or more windows of {train_length:,} tokens"
        return DEFAULT, f"recipe {DEFAULT} ({long}, {NAMES[recipe.short]} for shorter ones)", ""
    found = choose(DEFAULT, documents.tokens, train_length, BATCH_SIZE, whole=documents.whole)
    return found.intervention, NAMES[found.intervention], f"{found.why}, and "


def of_ablation(advice: Advice, held: dict[str, Any] | None) -> Advice:
    """Name the reading that clips states, where states held in range win back most of the damage.

    Args:
        advice: what the states call for.
        held: the row of all heads of a state ablation; None where none was made.
    """
    if advice.intervention is None or held is None or not held["low"] >= CLIPS:
        return advice
    share = f"{100 * held['recovered']:.0f} %"
    return replace(
        advice,
        sentence=f"{advice.sentence} Its states held in range (`reading` clip) win back {share} of the "
        "damage untrained and keep what lies before the last T tokens.",
    )


def of_blame(
    advice: Advice,
    blame: Blame,
    model: str | None,
    train_length: int,
    flags: Sequence[str] = (),
    *,
    length: int | None = None,
) -> Advice:
    """Return what to do with a hybrid, given which side of it does the damage.

    Args:
        advice: what its states alone would call for.
        blame: the shares of its states and its attention.
        model: its name, for the command; None: no command opens it.
        train_length: T.
        flags: what the command needs besides to open it.
        length: positions of the diagnosis, which a RoPE scaling brings into T, and which the command that
            reads with an attention window reads.
    """
    verdict, scaling = blame.verdict, blame.scaling
    if scaling is not None and length is not None:
        scaling = replace(scaling, factor=scaling_factor(length, train_length))
    if verdict in (None, "state"):
        return advice
    if verdict == "neither":
        return Advice(None, NEITHER)
    if scaling is not None:
        how = f"scale its rotary positions ({scaling})"
    elif blame.window is not None:
        how = f"read it with an attention window of {train_length} tokens (`reading` {blame.window})"
    else:
        how = "no reading that longroll has keeps it in range"
    scaled = [] if scaling is None else ["--rope-scaling", str(scaling)]
    if verdict == "both" and advice.intervention is None:  # it keeps its level
        return replace(advice, sentence=f"{advice.sentence} Its attention does damage too: {how}.")
    if verdict == "both":
        command = advice.command and " ".join([advice.command, *scaled])
        sentence = f"{advice.sentence} Its attention breaks too: {how}."
        return replace(advice, sentence=sentence, command=command)
    if scaling is None:
        command = None
        if model and blame.window is not None:
            reading = ["--reading", blame.window, "--window", str(train_length)]
            reading += [] if length is None else ["--length", str(length)]
            command = shlex.join(["longroll", "evaluate", "loss", model, *flags, *reading])
        return Advice(None, f"{SOUND}: {how}.", command)
    arguments = ["--intervention", "none", *scaled, "--train-length", str(train_length)]
    command = model and _command(model, flags, arguments)
    sentence = f"{SOUND}: {how}, and train it some steps from zero states."
    return replace(advice, intervention="none", sentence=sentence, command=command)


def not_split(advice: Advice, train_length: int) -> Advice:
    """Return the advice for a hybrid whose damage was not split between its states and its attention."""
    told = "Its attention may do the damage instead: `explain`, on texts of"
    return replace(advice, sentence=f"{advice.sentence} {told} {2 * train_length:,} tokens or more, tells.")


def _command(model: str, flags: Sequence[str], arguments: Sequence[str]) -> str:
    """Return the command of a repair, whose folder is another than the model's."""
    found = re.fullmatch(r"repaired(?:-(\d+))?", Path(model).name)
    output = "repaired" if found is None else f"repaired-{int(found[1] or 1) + 1}"
    return shlex.join(["longroll", "posttrain", model, *flags, *arguments, "--output", output])


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return "a minute"
