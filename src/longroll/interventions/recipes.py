"""Recipes: the intervention and the settings that a repair takes where nobody names them.

`RECIPES` is the one place that holds them. The values of `longroll` are the least expensive of those measured
(docs/choose.md); `paper` is what Buitrago Ruiz and Gu publish.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from longroll.errors import LongrollError

NAMES = {
    "sp": "State Passing",
    "tbptt": "TBPTT",
    "fitted": "Fitted Noise",
    "random": "Random Noise",
    "none": "zero states (the control)",
}
"""Interventions as people call them."""


@dataclass(frozen=True)
class Settings:
    """What a recipe sets for one intervention."""

    zero_probability: float = 0.0
    """Share of the rows that start from the zero state."""
    decay_speed: float = 1.0
    """Learning rate of the decays as a multiple of the others'."""
    learning_rate: float = 5e-4
    """Peak of the schedule."""
    trainable: str = "all"
    """Which parameters are trained: `longroll.training.PosttrainOptions`."""
    frozen_zero_probability: float | None = None
    """Share of zero rows where no decays are trained; None: as elsewhere."""
    whole_rate: float = 5e-4
    """Peak of the schedule where all weights, or adapters of them, are trained after all."""


@dataclass(frozen=True)
class Recipe:
    """Which intervention a repair takes, by the documents of its text, and its settings."""

    long: str
    """Intervention for text whose documents are long."""
    short: str
    """Intervention for text whose documents are short."""
    text: Mapping[str, Settings] = field(default_factory=dict)
    """By intervention, for text; one that is not named here has the values of `Settings()`."""
    task: Mapping[str, Settings] = field(default_factory=dict)
    """The same for a task, which is to be learned: all weights are trained."""


COUNTED = 2**20
"""Tokens of whole documents that tell how long the documents of a text are."""
WINDOWS = 16
"""A document is long where it fills this many windows of the training length. On shorter ones State Passing
does as well or better (docs/ablation.md)."""
LONG_SHARE = 0.5
"""The documents of a text are long where long ones hold at least this share of its tokens."""
NON_STATIONARY = "fitted"
"""For tasks whose final states start no other text (paper, section 6.2)."""

_SCALES = Settings(
    zero_probability=0.1, decay_speed=30.0, learning_rate=1e-3, trainable="scales", whole_rate=3e-4
)
_PASSED = replace(_SCALES, zero_probability=0.5, frozen_zero_probability=0.1, decay_speed=100.0)
_ALL = Settings(zero_probability=0.1)
RECIPES = {
    "longroll": Recipe(
        long="tbptt",
        short="sp",
        text={"tbptt": _SCALES, "sp": _PASSED},
        task={"tbptt": _ALL, "sp": Settings(zero_probability=0.1, decay_speed=30.0)},
    ),
    "paper": Recipe(long="sp", short="sp"),
}
DEFAULT = "longroll"


@dataclass(frozen=True)
class Choice:
    """The intervention that a recipe takes, and why."""

    intervention: str
    """Its short name."""
    why: str
    """The reason, as the end of a sentence."""


def recipe_of(name: str) -> Recipe:
    """Return a recipe by its name.

    Raises:
        LongrollError: for a name that is not one.
    """
    if name not in RECIPES:
        raise LongrollError(f"`recipe` {name} is not one of {', '.join(RECIPES)}.")
    return RECIPES[name]


def enough_tokens(train_length: int, lanes: int) -> int:
    """Return the tokens of whole documents from which `choose` can tell.

    Args:
        train_length: T.
        lanes: rows of a batch, of all ranks together.
    """
    return max(COUNTED, WINDOWS * train_length * lanes)


def choose(recipe: str, lengths: np.ndarray, train_length: int, lanes: int, *, whole: bool = True) -> Choice:
    """Choose an intervention for training on text.

    TBPTT reads a document on from window to window, so states far past the training length come up only in
    documents of many windows. A lane of TBPTT reads at most its share of the text, which caps a document.
    The steps of a run play no part: few of them read the beginnings of the same documents.

    Args:
        recipe: a name in `RECIPES`.
        lengths: tokens of each document, (documents,).
        train_length: T.
        lanes: rows of a batch, of all ranks together.
        whole: whether the text has no other documents; of a longer text, `enough_tokens` tell.
    """
    asked = recipe_of(recipe)
    if asked.long == asked.short:
        return Choice(asked.long, f"recipe {recipe} takes it for every text")
    long = lengths >= WINDOWS * train_length
    share = float(lengths[long].sum() / lengths.sum())
    kind, percent = f"of {WINDOWS} or more windows of {train_length:,} tokens", f"{100 * share:.0f} %"
    per_lane = lengths.sum() / train_length / lanes
    if whole and per_lane < WINDOWS:
        why = f"the text gives each of {lanes} rows {per_lane:.1f} windows of {train_length:,} tokens"
        return Choice(asked.short, f"{why}, too few for {NAMES[asked.long]}")
    found = f"documents {kind} hold {percent} of the text's tokens"
    if not whole:
        count = f"{len(lengths):,} documents of the text" if len(lengths) > 1 else "a document of the text"
        found = f"in {count}, those {kind} hold {percent} of the tokens"
    if share >= LONG_SHARE:
        return Choice(asked.long, found)
    return Choice(asked.short, f"{found}, and {NAMES[asked.long]} needs {100 * LONG_SHARE:.0f} %")
